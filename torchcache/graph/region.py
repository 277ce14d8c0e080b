"""The part of a mark that was cut out of a graph, as what a region stands for, and the node's call of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from torchcache import dynamo
from torchcache.call import Region
from torchcache.digest.cpu import digest_bytes
from torchcache.dynamo import hint
from torchcache.errors import Unreadable
from torchcache.graph.beside import Beside
from torchcache.graph.closed import are_plain, of_torch
from torchcache.graph.parts import Part
from torchcache.graph.sizes import Rows, same_shape
from torchcache.graph.state import ModuleState, Paths, Places
from torchcache.identity.identity import Identity, Seen
from torchcache.identity.program import Program
from torchcache.identity.state import State
from torchcache.identity.steady import Steady
from torchcache.logging import warn_once
from torchcache.regions import add_call, add_region, kept_call, region_of
from torchcache.returned import unaliased
from torchcache.store.select import concatenate
from torchcache.values.layout import dense, inverted, memory_order

Tensors = Sequence[torch.Tensor]
Original = Callable[..., Sequence[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the pass found out about a region; never changes.

    Parameters
    ----------
    module : fx.GraphModule
        The original: it takes data, then state, then sizes.
    data, state, outputs : tuple of torch.Tensor
        Fake tensors, as traced.
    rows : Rows
        How its sizes follow the number of rows.
    parts : tuple of Part
        The marked calls that it is part of.
    digest : bytes
        Digest of all that is written in the graph.
    closed : bool
        Whether the graph calls nothing but torch.
    """

    module: fx.GraphModule
    data: tuple[torch.Tensor, ...]
    state: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    rows: Rows
    parts: tuple[Part, ...]
    digest: bytes
    closed: bool


class GraphIdentity:
    """Who computes a region: its graph, the state that it reads, and the programs of what it calls.

    A graph that calls nothing but torch has the program of torch: settings of what trains beside it are no part. For
    others it is that of the marked calls.

    Parameters
    ----------
    parts : sequence of (Identity, str or None)
        The identities of the marked calls, and the user's own names for them.
    graph : bytes
        Digest of all that is written in the graph.
    closed : bool
        Whether the graph calls nothing but torch.
    places : Places
        Where the marked modules hold the state.

    Attributes
    ----------
    changed : list of str
        Names of the tensors that differed when it last became another, as far as they are known.
    rewritten : set of int
        Empty: a graph writes to nothing.
    """

    def __init__(
        self, parts: Sequence[tuple[Identity, str | None]], graph: bytes, closed: bool, places: Places
    ) -> None:
        self._parts = parts
        self._graph = graph
        self._closed = closed
        self._state = State()
        self._places = places
        self.changed: list[str] = []
        self.rewritten: set[int] = set()
        self._named = all(name is not None for _, name in parts)
        self._given = threading.local()

    @contextlib.contextmanager
    def reading(self, state: Tensors, rows: Rows) -> Iterator[None]:
        """Calls within this block, on this thread, read ``state``, and their graph has ``rows``."""
        before = self.look().tensors, self.rows
        self._given.state, self._given.rows = list(state), rows
        try:
            yield
        finally:
            self._given.state, self._given.rows = before

    @property
    def rows(self) -> Rows | None:
        """How many rows a call on this thread runs at a time, and of which inputs; ``None`` outside of calls."""
        return getattr(self._given, "rows", None)

    def look(self) -> Seen:
        """The state that a call on this thread reads."""
        return Seen(getattr(self._given, "state", []))

    def current(self, seen: Seen | None = None) -> bytes:
        """16 bytes that name graph, programs and state as they are now.

        Parameters
        ----------
        seen : Seen or None
            What ``look`` returned just now; ``None`` looks.

        Raises
        ------
        Bypass
            When a program reads something that has no identity.
        """
        tensors = (seen or self.look()).tensors
        programs, before = self._programs_now(tensors), self._state.digest
        # The graph of a named mark may be that of several of its parts.
        state = (self._places.digest if self._named else self._state.current)(tensors)
        if before and self._state.digest != before:
            self.changed = self._places.names([tensors[index] for index in self._state.changed])
        return digest_bytes(b"part" + self._graph + b"".join(map(digest_bytes, [*programs, state])))

    def gone(self) -> bool:
        """Whether the state that was last named is no more."""
        return self._places.gone() if self._named else self._state.gone

    def of_classes(self, given: tuple[type, ...]) -> bytes:
        """Empty: what was taken from arguments is written in the graph."""
        return b""

    def steady(self) -> Steady:
        """The state as it is now, to find later whether it stayed so; the graph is given these very tensors."""
        return Steady(self.look().tensors, self._named, None)

    # What it was answered is written in the graph.
    asks_for_gradients = asks_for_inference = False

    def outside(self) -> None:
        """``None``: a graph writes to nothing."""

    def changes(self) -> list[str]:
        """Names of what is not as it was when ``current`` was last asked."""
        found = [name for program in self._programs(self.look().tensors) for name in program.changes()]
        if not found and self._state.digest and not self._state.unchanged(self.look().tensors):
            found.append("a parameter or buffer")
        return found

    def _programs_now(self, tensors: Tensors) -> list[bytes]:
        names = [name for _, name in self._parts if name is not None]
        found = [b"name:" + name.encode("utf-8", "surrogatepass") for name in names]
        for program in self._programs(tensors):
            if program.problem is not None:
                raise Unreadable(program.problem, "name program and weights yourself with persistent_module_hash")
            found.append(b"program:" + program.digest)
        return found

    def _programs(self, tensors: Tensors) -> list[Program]:
        """The programs of what the graph calls; none that the user has a name for."""
        if self._named:
            return []
        if self._closed and are_plain(tensors):
            return [of_torch()]
        return [identity.program() for identity, name in self._parts if name is None]


class _Original:
    """The original of a plan, whatever state it is given.

    Parameters
    ----------
    plan : Plan
        The plan.
    compile_original : callable or None
        Compiles it before it first runs, given its module; ``None`` runs it eagerly.
    """

    def __init__(self, plan: Plan, compile_original: Callable[[fx.GraphModule], Original] | None) -> None:
        self._module = plan.module
        self._varies = compile_original is not None and plan.rows.fixed is None
        self._compile = compile_original
        self._run: Original | None = None if compile_original is not None else plan.module.forward

    def __call__(self, data: Tensors, state: Tensors, numbers: Sequence[int]) -> Sequence[torch.Tensor]:
        if self._run is None:
            assert self._compile is not None
            # Dynamo leaves code untraced that was made while it ran.
            self._run = self._compile(fx.GraphModule(self._module, copied(self._module.graph), "Region"))
        if self._varies:
            data = [_any_number(leaf) for leaf in data]
        with torch.no_grad():
            return self._run(*data, *state, *numbers)


class GraphSubject:
    """What a region that was cut out of a graph stands for. Its arguments are data tensors, then numbers.

    Parameters
    ----------
    plan : Plan
        The region.
    original : callable
        Runs it, given data, state and numbers.
    """

    names = ()

    def __init__(self, plan: Plan, original: Original) -> None:
        regions = [region_of(part.mark, part.module) for part in plan.parts]
        self.name = " + ".join(dict.fromkeys(region.name for region in regions))
        identities: list[Any] = [region.subject.identity for region in regions]
        names = [part.options.persistent_module_hash for part in plan.parts]
        places = Places([part.module for part in plan.parts])
        self.identity: Any = GraphIdentity(list(zip(identities, names, strict=True)), plan.digest, plan.closed, places)
        self._data = len(plan.data)
        self._original = original

    @property
    def module(self) -> nn.Module | None:
        """``None``: a region writes to no module."""
        return None

    @property
    def deferred(self) -> None:
        """``None``: graphs are of what is there."""
        return None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """The original on any number of rows."""
        tensors, numbers = args[: self._data], args[self._data :]
        state = self.identity.look().tensors
        pieces = []
        for data, count in self.identity.rows.portions(tensors):
            outputs = self._original(data, state, numbers)
            pieces.append(outputs if count is None else [leaf[:count] for leaf in outputs])
        return tuple(pieces[0]) if len(pieces) == 1 else tuple(map(concatenate, zip(*pieces, strict=True)))


class GraphCall:
    """What the node of a region calls.

    Parameters
    ----------
    regions : Beside
        The regions, shared by all graphs that hold them.
    plan : Plan
        The region as one graph holds it.
    held : ModuleState
        Where the first of its state tensors are found; the others are inputs of the node, after its data.

    Attributes
    ----------
    autocast : torch.dtype or None
        What the graph was traced under; ``None`` where autocast was off.
    """

    def __init__(self, regions: Beside, plan: Plan, held: ModuleState) -> None:
        self._regions = regions
        self._plan = plan
        self._held = held
        self._device = plan.outputs[0].device.type
        self._orders = [memory_order([*map(hint, leaf.shape)], [*map(hint, leaf.stride())]) for leaf in plan.outputs]
        # Dynamo guards the ambient autocast state; compiled graphs run with autocast off.
        enabled = torch.is_autocast_enabled(self._device)
        self.autocast = torch.get_autocast_dtype(self._device) if enabled else None

    def real(self, tensors: Tensors, numbers: Sequence[int]) -> list[torch.Tensor]:
        """The region's outputs for one batch, as fresh tensors."""
        data, passed = tensors[: len(self._plan.data)], tensors[len(self._plan.data) :]
        state = [*self._held.tensors(), *passed]
        if len(state) != len(self._plan.state):
            raise RuntimeError("torchcache: a compiled graph calls a marked module that is gone: compile it again")
        region = self._regions.region(passed)
        identity: Any = region.subject.identity
        with _autocast(self._device, self.autocast), identity.reading(state, self._plan.rows):
            outputs = region((*data, *numbers), {})
        return unaliased([*map(dense, outputs, self._orders)], [*tensors, *state])

    def fake(self, tensors: Tensors, numbers: Sequence[Any]) -> list[torch.Tensor]:
        """The traced outputs without contents, or those of this batch's size."""
        plan = self._plan
        data, passed = tensors[: len(plan.data)], tensors[len(plan.data) :]
        outputs: Sequence[torch.Tensor] = plan.outputs
        if not all(map(same_shape, data, plan.data)):
            state = [*map(_stand_in, plan.state[: len(plan.state) - len(passed)]), *passed]
            with torch.no_grad():
                outputs = plan.module(*data, *state, *numbers)
        return [
            torch.empty([leaf.shape[dim] for dim in order], dtype=leaf.dtype, device=leaf.device).permute(
                inverted(order)
            )
            for leaf, order in zip(outputs, self._orders, strict=True)
        ]


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None and not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, enabled=dtype is not None, dtype=dtype):
        yield


def _stand_in(state: torch.Tensor) -> torch.Tensor:
    """A tensor like ``state``, made by whichever fake mode asks: modes do not mix."""
    shape, stride = [*map(hint, state.shape)], [*map(hint, state.stride())]
    return torch.empty_strided(shape, stride, dtype=state.dtype, device=state.device)


def _any_number(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` in a form that is compiled for any number of them: where they start in memory is guarded, too."""
    rows = rows.clone() if rows.storage_offset() else rows.detach()
    if rows.ndim and rows.shape[0] > 1:
        dynamo.vary(rows)
    return rows


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph``."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def regions_for(plan: Plan, paths: Paths, compile_original: Callable[[fx.GraphModule], Original] | None) -> Beside:
    """The regions of a plan and the state at ``paths``, for all graphs that hold it, kept with its subjects."""
    owners = [part.owner for part in plan.parts]
    key = plan.digest, paths, tuple(part.subject for part in plan.parts), plan.parts[0].options
    found: Beside | None = kept_call(owners[0], key)
    if found is None:
        found = Beside(functools.partial(_region, plan, key, _Original(plan, compile_original)))
    for owner in owners:
        add_call(owner, key, found)
    return found


def _region(plan: Plan, key: Any, original: Original, number: int) -> Region:
    """The region of one state of a plan, kept with its subjects."""
    subject, options = GraphSubject(plan, original), plan.parts[0].options
    if options.padding is not None:
        warn_once(f"padding= is for marks that are frozen as a whole: all positions of {subject.name} count")
        options = options.replace({"padding": None, "padding_value": None})
    region = Region(subject, options, region_of(plan.parts[0].mark, plan.parts[0].module))
    region.partial = True
    for part in plan.parts:
        add_region(part.owner, (key, number), region)
    return region
