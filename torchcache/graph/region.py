"""A region at run time: from the op's inputs to a call of its lookup."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from torchcache.graph.marked import MarkedCall
from torchcache.graph.sizes import BatchSymbol, evaluate, hint, same_shape
from torchcache.logging import logger
from torchcache.lookup.cache_lookup import CacheLookup, Call
from torchcache.lookup.context import bypassed
from torchcache.lookup.digest import digest_bytes
from torchcache.lookup.fingerprint import Program, State, program_of
from torchcache.lookup.key import NumericMode
from torchcache.lookup.rows import Layout, dense, inverted, memory_order
from torchcache.store.select import concatenate, select_rows

__all__ = [
    "GraphRegion",
    "RegionPlan",
    "add_lookup",
    "lookup_for",
    "lookups_of",
    "program_now",
]

Original = Callable[..., Sequence[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class RegionPlan:
    """What the pass found out about a region; never changes.

    Parameters
    ----------
    module : fx.GraphModule
        The original subgraph: placeholders for tensors, then for sizes.
    roles : tuple of str
        Role of each tensor input: "row", "shared", "state" or "scalar".
    sizes : tuple of (int or SymInt)
        The traced value of each size input.
    inputs, outputs : tuple of torch.Tensor
        Fake tensors, as traced.
    calls : tuple of MarkedCall
        The marked calls it covers, in order.
    identity : bytes
        Digest of which part of those calls it is: operators, wiring, outputs.
    """

    module: fx.GraphModule
    roles: tuple[str, ...]
    sizes: tuple[Any, ...]
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    calls: tuple[MarkedCall, ...]
    identity: bytes

    def positions(self, role: str) -> list[int]:
        """Indices of the tensor inputs with this role."""
        return [index for index, found in enumerate(self.roles) if found == role]


class GraphRegion:
    """What ``torch.ops.torchcache.lookup`` calls for one region of one graph.

    Parameters
    ----------
    plan : RegionPlan
        The region.
    lookup : CacheLookup
        Its cache, shared by all graphs that hold the same region.
    compile_original : callable or None
        Compiles the original before its first run, given its module; ``None`` runs it eagerly.
    """

    def __init__(
        self,
        plan: RegionPlan,
        lookup: CacheLookup,
        compile_original: Callable[[fx.GraphModule], Original] | None = None,
    ) -> None:
        self.plan = plan
        self.lookup = lookup
        self.name = ""
        self._pick: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None
        self._arrange: Callable[[Sequence[Any]], tuple[Any, ...]] = tuple
        self._fed = threading.local()
        self._latest: Callable[[], Sequence[Any]] = tuple
        self._missing: list[torch.Tensor] = []
        self.given = list(range(len(plan.inputs)))
        self._rows = plan.positions("row")
        self._held = plan.positions("state")
        self._find_given()
        self._state = State(guarded=True)
        self._numbers: list[float] = []
        self._programs: dict[int, bytes] = {}
        self._fingerprint = b""
        self._compile = compile_original
        self._original: Original | None = None if compile_original is not None else plan.module.forward
        self._device = plan.outputs[0].device.type
        # Dynamo guards the ambient autocast state, so what it is at the time of tracing holds for every call.
        self._autocast = NumericMode.current(self._device).autocast
        self._named = all(call.options.persistent_module_hash is not None for call in plan.calls)
        self._size = BatchSymbol(plan.inputs, plan.sizes, self._rows[0])
        self._orders = [memory_order([*map(hint, leaf.shape)], [*map(hint, leaf.stride())]) for leaf in plan.outputs]

    def take_state(self, node: Any, taken: Sequence[int], sources: Sequence[int] = ()) -> None:
        """Expect the inputs at ``taken`` past the op, and leave them out of the lookup ``node`` of the graph.

        They come from ``feed``, which finds them at ``sources`` of the graph's inputs, or from ``hold``.
        """
        apart = set(taken)
        self.given = [index for index in range(len(self.plan.roles)) if index not in apart]
        places = {index: place for place, index in enumerate([*self.given, *taken])}
        self._pick = operator.itemgetter(*sources, sources[0]) if sources else None
        self._arrange = operator.itemgetter(*(places[index] for index in range(len(places))), 0)
        self._missing = [self.plan.inputs[index] for index in taken]
        self._find_given()
        tensors, *rest = node.args
        node.args = ([tensors[index] for index in self.given], *rest)

    def _find_given(self) -> None:
        """Note where the inputs of each role are among those that the op is given."""
        roles = [self.plan.roles[index] for index in self.given]
        self._places = {
            role: [place for place, found in enumerate(roles) if found == role] for role in ("row", "shared", "scalar")
        }

    def feed(self, arguments: Sequence[Any]) -> None:
        """Take the state for this thread's next call from the inputs of the graph."""
        if self._pick is not None:
            # Compiled code outlives the model whose tensors these are.
            references = [*map(weakref.ref, self._pick(arguments)[:-1])]
            self._latest = self._fed.state = lambda: [reference() for reference in references]

    def hold(self, state: Sequence[torch.Tensor]) -> None:
        """Use ``state`` for the calls that come."""
        kept = tuple(state)
        self._latest = lambda: kept

    def _whole(self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All inputs of the region, in its order."""
        return list(self._arrange((*inputs, *state))[:-1]) if self._missing else list(inputs)

    def __call__(self, inputs: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        """The region's outputs for one batch, as fresh tensors."""
        # Backward passes that compute a region again may do so on threads of their own.
        state = getattr(self._fed, "state", self._latest)()
        rows, shared, numbers = ([inputs[place] for place in places] for places in self._places.values())
        call = Call(
            b"",
            NumericMode.current(self._device, self._autocast),
            rows,
            shared,
            lambda some: self._compute(self._whole(inputs, state), sizes, some),
            lambda: self._layouts(self._whole(inputs, state), sizes),
            # A graph of one row cannot show whether rows mix.
            probeable=rows[0].shape[0] > 1,
        )
        if bypassed() or not all(marked.options.enabled for marked in self.plan.calls):
            outputs = self.lookup.bypass(call)
        else:
            call.region = self._region(self._state_of(inputs, state), [number.item() for number in numbers])
            call.state = self._state.digest
            outputs = self.lookup(call)
        return list(map(dense, outputs, self._orders))

    def _state_of(self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The tensors that the fingerprint is of."""
        if self._named:
            return ()
        if len(state) == len(self._held):
            return state
        whole = self._whole(inputs, state)
        return [whole[position] for position in self._held]

    def fake(self, inputs: list[torch.Tensor], sizes: Sequence[int | torch.SymInt]) -> list[torch.Tensor]:
        """Outputs without their contents: the traced ones, with this batch's size."""
        expected = [self.plan.inputs[index] for index in self.given]
        if all(same_shape(given, traced) for given, traced in zip(inputs, expected, strict=True)):
            outputs = list(self.plan.outputs)
        else:
            with torch.no_grad():
                outputs = self.plan.module(*self._whole(inputs, [*map(_stand_in, self._missing)]), *sizes)
        return [
            torch.empty([leaf.shape[dim] for dim in order], dtype=leaf.dtype, device=leaf.device).permute(
                inverted(order)
            )
            for leaf, order in zip(outputs, self._orders, strict=True)
        ]

    def _region(self, held: Sequence[torch.Tensor], numbers: list[float]) -> bytes:
        """The region's fingerprint, recomputed when weights or module numbers changed."""
        if self._fingerprint and numbers == self._numbers and self._state.unchanged(held):
            return self._fingerprint
        started = time.perf_counter()
        if not self._programs or numbers != self._numbers:
            self._programs = {}
            for index, call in enumerate(self.plan.calls):
                if call.options.persistent_module_hash is None:
                    self._programs[index] = program_now(call).digest
        parts = [self.plan.identity]
        for index, call in enumerate(self.plan.calls):
            name = call.options.persistent_module_hash
            parts.append(self._programs[index] if name is None else b"name:" + name.encode())
            parts.append(call.constants)
        parts.append(self._state.update(held))
        self._numbers = numbers
        self._fingerprint = digest_bytes(b"".join(digest_bytes(part) for part in parts))
        self.lookup.tag = self._fingerprint.hex()
        logger.debug("fingerprint of %s in %.1f ms", self.lookup.name, 1e3 * (time.perf_counter() - started))
        return self._fingerprint

    def _compute(self, inputs: list[torch.Tensor], sizes: list[int], rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the original on ``rows``, padded where the graph does not take as few."""
        count = rows[0].shape[0]
        full = inputs[self._rows[0]].shape[0]
        run, sizes = self._size.fit(count, full, sizes)
        if run < count:
            parts = [
                self._compute(inputs, sizes, [leaf[at : at + run] for leaf in rows]) for at in range(0, count, run)
            ]
            return [concatenate(pieces) for pieces in zip(*parts, strict=True)]
        if run > count:
            padding = [*range(count), *([count - 1] * (run - count))]
            rows = [select_rows(leaf, padding) for leaf in rows]
        if self._compile is not None and self._size.known:
            rows = [_any_number(leaf) for leaf in rows]
        given = list(inputs)
        for position, leaf in zip(self._rows, rows, strict=True):
            given[position] = leaf
        if self._original is None:
            assert self._compile is not None
            self._original = self._compile(self._size.follow(self.plan.module))
        with _autocast(self._device, self._autocast):
            outputs = _unaliased(self._original(*given, *sizes), given)
        return [leaf[:count] for leaf in outputs] if run > count else list(outputs)

    def _layouts(self, inputs: list[torch.Tensor], sizes: list[int]) -> tuple[Layout, ...]:
        """What the outputs look like at this batch's sizes, from the traced shapes, without running anything."""
        known = self._size.bind(inputs, self.plan.inputs)
        layouts = []
        for leaf in self.plan.outputs:
            shape = [evaluate(size, known) for size in leaf.shape]
            stride = [evaluate(step, known) for step in leaf.stride()]
            shape[0] = max(shape[0], 2)
            layouts.append(
                Layout(leaf.dtype, tuple(shape[1:]), memory_order(shape, stride), _indexed(leaf.device, inputs))
            )
        return tuple(layouts)


def program_now(call: MarkedCall) -> Program:
    """The program of a marked call as it is now."""
    return program_of(call.subject_module, call.mark.function, call.path)


def _indexed(device: torch.device, inputs: Sequence[torch.Tensor]) -> torch.device:
    """``device`` with the index that the inputs have, since graphs are shared between devices of a kind."""
    return next((leaf.device for leaf in inputs if leaf.device.type == device.type), device)


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
    rows = rows.clone() if rows.storage_offset() else rows
    if rows.shape[0] > 1:
        torch._dynamo.maybe_mark_dynamic(rows, 0)
    return rows


def _unaliased(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs that share memory neither with an input nor with each other, as the op promises."""
    taken = {leaf.untyped_storage().data_ptr() for leaf in inputs}
    fresh = []
    for leaf in outputs:
        pointer = leaf.untyped_storage().data_ptr()
        fresh.append(leaf.clone() if pointer in taken and leaf.numel() else leaf)
        taken.add(pointer)
    return fresh


_lookups: weakref.WeakKeyDictionary[Any, dict[bytes, CacheLookup]] = weakref.WeakKeyDictionary()


def lookup_for(calls: Sequence[MarkedCall], identity: bytes) -> CacheLookup:
    """The lookup of a region, the same one for every graph that holds the region, kept with its marked subjects."""
    owners: list[nn.Module | Any] = []
    for call in calls:
        module = call.subject_module
        owners.append(call.mark if module is None else module)
    options = repr(calls[0].options).encode()
    key = digest_bytes(identity + options + b"".join(digest_bytes(call.constants) for call in calls))
    lookup = _lookups.setdefault(owners[0], {}).get(key)
    if lookup is None:
        names = list(dict.fromkeys(call.describe() for call in calls))
        lookup = CacheLookup(" + ".join(names), calls[0].options)
    for owner in owners:
        _lookups.setdefault(owner, {})[key] = lookup
    return lookup


def lookups_of(owner: Any) -> list[CacheLookup]:
    """Every lookup of a marked module or of a function's mark."""
    return list(_lookups.get(owner, {}).values())


def add_lookup(owner: Any, key: bytes, lookup: CacheLookup) -> None:
    """Keep ``lookup`` with its owner."""
    _lookups.setdefault(owner, {})[key] = lookup
