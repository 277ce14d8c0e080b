"""``torch.ops.torchcache.lookup``: the one node that stands for a marked call in a graph, and its fake kernel.

``lookup(Tensor[] tensors, SymInt[] numbers, str call) -> Tensor[]`` makes the call of that name with these tensors and
numbers among its arguments. Its outputs never alias its inputs. No tracer looks into it, and CUDA graphs are split
around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchcache import dynamo
from torchcache.call import Region
from torchcache.context import computing
from torchcache.digest.cpu import digest_bytes
from torchcache.errors import Bypass, MarkError
from torchcache.identity.numeric import autocasts
from torchcache.identity.written import written_text
from torchcache.lazy.tensor import take_whole
from torchcache.lazy.use import stand_in
from torchcache.mark import Mark
from torchcache.regions import add_call, region_of
from torchcache.returned import Link, check_passed, linked, links_of, looks_so, unaliased
from torchcache.unreal import StateWrittenError, Unreal
from torchcache.values.layout import dense, inverted, memory_order

Leaves = Sequence[Any]


class Call(Protocol):
    """What a node of a graph calls."""

    def real(self, tensors: Leaves, numbers: Leaves) -> list[torch.Tensor]:
        """The call itself; its outputs alias neither ``tensors`` nor each other."""

    def fake(self, tensors: Leaves, numbers: Leaves) -> list[torch.Tensor]:
        """What it returns for fake tensors: without contents, but in the shapes and memory orders of ``real``."""


class _TracedAnewError(Exception):
    """The frame will be traced anew."""


class _Tensor:
    """Stands where a tensor was among the leaves of a structure."""


@dataclasses.dataclass
class _Constant:
    """A constant of an output as part of its structure, since a graph returns tensors; rebuilt as ``value``."""

    value: Any


pytree.register_pytree_node(
    _Constant, lambda constant: ([], constant.value), lambda _, value: value, serialized_type_name="torchcache.constant"
)


@dataclasses.dataclass
class _Traced:
    """One call of a marked module as it was traced: its arguments without tensors, and what it returns.

    Parameters
    ----------
    mark : Mark
        The mark.
    module : weakref to nn.Module, or None
        The marked module.
    spec : TreeSpec
        Structure of arguments and keyword arguments.
    leaves : list
        Their leaves: constants, ``_Tensor`` for a tensor, ``torch.SymInt`` for a number that varies.
    gradients : bool
        Whether the original is to run as where gradients are recorded: compiled code runs otherwise.
    served : bool
        Whether the call has returned what it returned where it was traced.
    """

    mark: Mark
    module: weakref.ReferenceType[nn.Module] | None
    spec: pytree.TreeSpec
    leaves: list[Any]
    gradients: bool
    served: bool = False
    output_spec: pytree.TreeSpec | None = None
    output_leaves: list[Any] = dataclasses.field(default_factory=list)
    orders: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    looks: list[tuple[torch.dtype, list[int | None]]] = dataclasses.field(default_factory=list)
    links: list[Link | None] = dataclasses.field(default_factory=list)
    latest: tuple[Any, list[tuple[Any, ...]]] = (None, [])

    def arguments(self, tensors: Leaves, numbers: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with these tensors and numbers."""
        next_tensor, next_number = iter(tensors), iter(numbers)
        leaves = [
            next(next_tensor) if leaf is _Tensor else next(next_number) if isinstance(leaf, torch.SymInt) else leaf
            for leaf in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def outputs(self, tensors: Leaves) -> Any:
        """What the call returns, with these tensors."""
        assert self.output_spec is not None
        given = iter(linked(tensors, self.links))
        leaves = [next(given) if leaf is _Tensor else _Constant(leaf) for leaf in self.output_leaves]
        return pytree.tree_unflatten(leaves, self.output_spec)

    def fake(self, tensors: Leaves, numbers: Leaves) -> list[torch.Tensor]:
        """Outputs without contents, in shape, dtype, device and memory order those of the original on fake tensors."""
        seen = dynamo.traced_shapes(tensors, numbers)
        if seen != self.latest[0]:
            self.latest = (seen, self._look(tensors, numbers))
        return [
            torch.empty([shape[dim] for dim in order], dtype=dtype, device=device).permute(inverted(order))
            for (shape, dtype, device), order, link in zip(self.latest[1], self.orders, self.links, strict=True)
            if link is None
        ]

    def _look(self, tensors: Leaves, numbers: Leaves) -> list[tuple[Any, ...]]:
        """Shape, dtype and device of each output, for inputs like these."""
        module = self.module() if self.module is not None else None
        identity = region_of(self.mark, module).subject.identity
        names: list[str] = []
        for _ in range(2):  # a module may set itself up when it is called first
            with dynamo.no_mode(), contextlib.suppress(Bypass):  # what has no identity is computed at every call
                identity.current()
            args, kwargs = self.arguments(tensors, numbers)
            with dynamo.no_mode():
                run = Unreal(self.mark, module, identity.outside())
            with dynamo.faking(tensors) as mode, torch.set_grad_enabled(self.gradients), computing():
                try:
                    outputs = run(mode, args, kwargs)
                except StateWrittenError as error:
                    names = [str(error)]
                    break
                except Exception as error:
                    raise self._apart(module, Bypass(f"{error!r} on tensors without data")) from error
            with dynamo.no_mode():
                names = run.written or identity.changes()
            if not names:
                break
        after, spec = pytree.tree_flatten((args, kwargs))
        left = [leaf for leaf in after if isinstance(leaf, torch.Tensor)]
        if names or spec != self.spec or not all(map(operator.is_, left, tensors)):
            reason, advice = written_text(names or ["its arguments"], module)
            raise self._apart(module, Bypass(f"{reason} where it is traced", advice))
        leaves, self.output_spec = pytree.tree_flatten(outputs)
        sized = any(isinstance(size, torch.SymInt) for tensor in tensors for size in tensor.shape) or bool(numbers)
        try:
            check_passed(outputs, self.leaves if sized else None)
        except Bypass as why:
            raise self._apart(module, why) from None
        made = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.output_leaves = [_Tensor if isinstance(leaf, torch.Tensor) else _plain(leaf) for leaf in leaves]
        lie = [([*map(dynamo.hint, leaf.shape)], [*map(dynamo.hint, leaf.stride())]) for leaf in made]
        self.orders = [memory_order(shape, stride) for shape, stride in lie]
        self.looks = [(leaf.dtype, [size if type(size) is int else None for size in leaf.shape]) for leaf in made]
        if not self.links:  # the graph is made by what is known here, for all sizes
            region = region_of(self.mark, module)
            views = region.subject.deferred is None and region.options.stored_alike  # else there are none on hits
            self.links = links_of(made) if views else [None] * len(made)
        return [(tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in made]

    def _apart(self, module: nn.Module | None, why: Bypass) -> Exception:
        """What to raise so that the call is made between two graphs from now on, or is a part of the only one."""
        region = region_of(self.mark, module)
        region.apart = why.reason
        dynamo.retrace_later()
        if dynamo.is_whole():
            region.note(why)
            return _TracedAnewError()
        return dynamo.leave_graph(why.reason)

    def real(self, tensors: Leaves, numbers: Leaves) -> list[torch.Tensor]:
        """The call itself."""
        args, kwargs = self.arguments(tensors, numbers)
        module = self.module() if self.module is not None else None
        if self.module is not None and module is None:
            raise RuntimeError("torchcache: a compiled graph calls a marked module that is gone: compile it again")
        region = region_of(self.mark, module)
        with torch.set_grad_enabled(self.gradients):
            outputs = _called(region, *self.mark.without_defaults(module, args, kwargs))
        leaves, spec = pytree.tree_flatten(outputs)
        made = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        constants = [_Tensor if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        if not (
            spec == self.output_spec
            and constants == self.output_leaves
            and all(map(looks_so, made, self.looks))
            and all(link is None or link.holds(made[link.base], made[place]) for place, link in enumerate(self.links))
        ):
            region.traces += 1
            if not self.served:  # tensors without data mislead
                region.apart = "it returns something else than where it is traced"
            raise MarkError(
                f"{region.name} returns another structure, shape, dtype or number than when it was compiled: "
                "repeat this call, which compiles it again"
            )
        self.served = True
        own = [leaf for leaf, link in zip(map(dense, made, self.orders), self.links, strict=True) if link is None]
        return unaliased(own, tensors)


_library = torch.library.Library("torchcache", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "lookup(Tensor[] tensors, SymInt[] numbers, str call) -> Tensor[]", tags=dynamo.OPAQUE_TAGS
)


@torch.library.impl(_library, "lookup", "CompositeExplicitAutograd")
def _lookup(tensors: list[torch.Tensor], numbers: list[int], call: str) -> list[torch.Tensor]:
    name, _, autocast = call.partition("@")
    with dynamo.at_the_top(), _autocast(autocast):
        return _find(name).real(tensors, numbers)


@torch.library.register_fake("torchcache::lookup", lib=_library)  # type: ignore[untyped-decorator]
def _fake_lookup(tensors: list[torch.Tensor], numbers: list[Any], call: str) -> list[torch.Tensor]:
    name, _, autocast = call.partition("@")
    with _autocast(autocast):
        return _find(name).fake(tensors, numbers)


def _autocast_lookup(kind: str) -> Callable[..., list[torch.Tensor]]:
    """The kernel under autocast on one kind of device.

    Compiled code runs without autocast, since what it does to operators is part of the code. A node that is opaque
    brings it along in its call's name: ``name@cpu:bfloat16``.
    """

    def lookup(tensors: list[torch.Tensor], numbers: list[Any], call: str) -> list[torch.Tensor]:
        dtype = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        with torch.autocast(kind, enabled=False):
            made: list[torch.Tensor] = LOOKUP(tensors, numbers, call if "@" in call else f"{call}@{kind}:{dtype}")
            return made

    return lookup


for _kind, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("lookup", _autocast_lookup(_kind), _key)  # type: ignore[no-untyped-call]


def _autocast(said: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast as the name of a call says it; as it is, where the name says nothing."""
    if not said:
        return contextlib.nullcontext()
    kind, _, dtype = said.partition(":")
    return torch.autocast(kind, dtype=getattr(torch, dtype))


LOOKUP = torch.ops.torchcache.lookup.default
take_whole(LOOKUP, _lookup)
# Stands for ``None`` among the arguments of ``opaque``, and at the end of a subject for gradients that are recorded.
NOTHING = "torchcache: None"
RECORDING = "+"

# Calls by name, kept by their owners: a graph refers to them by name only.
_calls: weakref.WeakValueDictionary[str, Call] = weakref.WeakValueDictionary()
_traces: weakref.WeakValueDictionary[str, _Traced] = weakref.WeakValueDictionary()
_subjects: dict[str, tuple[weakref.ReferenceType[Mark], weakref.ReferenceType[nn.Module] | None]] = {}
# What the latest calls that were traced are named, by what they are given: the newest last.
_latest: dict[str, str] = {}
MOST_TRACES = 4096
_numbers = itertools.count()


def subject_name(mark: Mark, module: nn.Module | None) -> str:
    """The name of a marked function, or of a marked method of ``module``, in graphs."""
    owner = mark if module is None else module
    names = _names.setdefault(owner, weakref.WeakKeyDictionary())
    name = names.get(mark)
    if name is None:
        name = names[mark] = f"{type(module).__name__ if module is not None else mark.name}#{next(_numbers)}"
        _subjects[name] = (weakref.ref(mark), weakref.ref(module) if module is not None else None)
        weakref.finalize(owner, _subjects.pop, name, None).atexit = False
    return name


_names: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Mark, str]] = weakref.WeakKeyDictionary()


def subject_of(name: str) -> tuple[Mark, nn.Module | None] | None:
    """The mark and the module of a ``subject_name``, as long as both live."""
    reference, owner = _subjects.get(name, (None, None))
    mark, module = reference() if reference is not None else None, owner() if owner is not None else None
    return None if mark is None or (owner is not None and module is None) else (mark, module)


@dynamo.untraced
def opaque(subject: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of ``subject`` that no tracer looks into; runs where a graph is traced, and where it runs eagerly.

    ``NOTHING`` among the arguments is ``None``. What it returns is to be flattened and rebuilt: constants in it are
    part of the structure. ``RECORDING`` at the end of ``subject`` says that gradients are recorded.
    """
    called = subject
    subject = called.removesuffix(RECORDING)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    # The operator takes whole numbers that vary; others are constants of the trace.
    leaves = [None if type(leaf) is str and leaf == NOTHING else _fixed(leaf) for leaf in leaves]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    numbers = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
    reference, owner = _subjects[subject]
    mark, module = reference(), owner() if owner is not None else None
    assert mark is not None
    kept = [_Tensor if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    shown = [torch.SymInt if isinstance(leaf, torch.SymInt) else leaf for leaf in kept]
    form = f"{called} {spec} {shown!r} {autocasts()}"
    if not dynamo.is_traced([*map(stand_in, tensors)]):
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        outputs = _called(region_of(mark, module), *mark.without_defaults(module, args, kwargs))
        return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, torch.Tensor) else _Constant(leaf), outputs)
    # One graph may make such calls with tensors of several shapes. A compiler traces each once more.
    shaped = f"{form} {dynamo.hints(tensors)}"
    if dynamo.is_fake([*map(stand_in, tensors)]):
        traced = _Traced(mark, owner, spec, kept, called != subject)
        try:
            outputs = traced.fake(tensors, numbers)
        except _TracedAnewError:
            return torch.empty(0)
        call = _name(subject, traced, outputs)
        for key in (form, shaped):
            _latest.pop(key, None)
            _latest[key] = call
        while len(_latest) > MOST_TRACES:
            del _latest[next(iter(_latest))]
        register(mark if module is None else module, call, traced)
        _traces[call] = traced
    call = _latest.get(shaped) or _latest[form]
    return _traces[call].outputs(LOOKUP(tensors, numbers, call))


def _called(region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call that a graph makes."""
    served = region.counters.hits
    outputs = region(args, kwargs)
    if region.writes and not served:  # the rest of the graph was compiled as if it wrote nothing, and may read that
        raise MarkError(
            f"{region.name} wrote nothing beside its output when it was compiled, and it does now (was a hook added?): "
            "repeat this call, which compiles it again"
        )
    return outputs


def _name(subject: str, traced: _Traced, outputs: Sequence[torch.Tensor]) -> str:
    """A name for a traced call; compilers that find code by the text of a graph must see what the call returns."""
    seen = [(str(leaf.dtype), str(leaf.device), str(leaf.shape), str(leaf.stride())) for leaf in outputs]
    constants = [leaf for leaf in traced.output_leaves if leaf is not _Tensor]
    text = repr(
        (
            seen,
            constants,
            str(traced.spec),
            str(traced.output_spec),
            [leaf for leaf in traced.leaves if leaf is not _Tensor],
            traced.links,
            traced.gradients,
        )
    )
    return f"{subject}/{digest_bytes(text.encode('utf-8', 'surrogatepass')).hex()[:16]}"


def register(owner: Any, name: str, call: Call) -> None:
    """Have nodes call ``call`` by this name, as long as ``owner`` lives."""
    add_call(owner, name, call)
    _calls[name] = call


def _find(call: str) -> Call:
    traced = _calls.get(call)
    if traced is None:
        raise RuntimeError(f"torchcache: a graph makes the call {call!r}, which is gone: compile the model again")
    return traced


def _plain(leaf: Any) -> Any:
    """A number of an output: what depends on sizes is fixed for the trace."""
    return int(leaf) if isinstance(leaf, torch.SymInt) else _fixed(leaf)


def _fixed(leaf: Any) -> Any:
    """A number that is traced as one that varies, as it is in this trace, which is guarded then; not a whole one."""
    if isinstance(leaf, torch.SymBool):
        return bool(leaf)
    return float(leaf) if isinstance(leaf, torch.SymFloat) else leaf
