"""An original on tensors without data, run for the shapes of its outputs; what that leaves behind is made real."""

from __future__ import annotations

import contextlib
import functools
import gc
import types
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchcache import dynamo
from torchcache.dynamo import FakeTensor, FakeTensorMode, TorchDispatchMode, storage_of
from torchcache.identity.containers import names_of
from torchcache.identity.outside import READ, Outside
from torchcache.identity.written import Written, tensor_names
from torchcache.mark import Mark

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
# Dtypes that tensors without data do not have: what is made with one of them says float.
_QUANTIZED = {
    kind for kind in vars(torch).values() if isinstance(kind, torch.dtype) and str(kind).startswith("torch.q")
}


class StateWrittenError(Exception):
    """The original would write to a tensor that has data, of this name."""


class Unreal:
    """The original, run on tensors without data.

    Its parameters and buffers stay where they are, since other threads may compute with them.

    Parameters
    ----------
    mark : Mark
        The mark.
    module : nn.Module or None
        The marked module.
    outside : Outside or None
        What may be written elsewhere, as it is.

    Attributes
    ----------
    written : list of str
        What its last call wrote to or replaced, all of which is put back. What is set up when it is first called, as a
        second call shows that writes nothing, stays and is not named.
    """

    def __init__(self, mark: Mark, module: nn.Module | None, outside: Outside | None) -> None:
        self._original = functools.partial(mark.original(module), *(() if module is None else (module,)))
        self._module, self._names = module, tensor_names(module)
        self._outside = outside
        self.written: list[str] = []

    def __call__(self, mode: FakeTensorMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the original returns, in the mode in force.

        Raises
        ------
        StateWrittenError
            Instead of the first write in place to a parameter, a buffer or another tensor that has data.
        """
        with dynamo.no_mode():
            before, kept = Written(self._module, self._outside), False
        try:
            outputs = self._run(mode, args, kwargs)
            with dynamo.no_mode():
                found = before.differences()
            # ``self.mean = self.mean.to(x)`` may put in the fake tensor of what is there.
            self.written = names_of(one for one in found if not dynamo.stands_for(one.now, one.was))
            kept = not found
            if self.written and not any(_may_differ(one.now) for one in found):
                with dynamo.no_mode():
                    after = before.again()
                outputs = self._run(mode, args, kwargs)
                with dynamo.no_mode():
                    kept = not after.changes()
                self.written = [] if kept else self.written
            return outputs
        finally:
            if not kept:
                with dynamo.no_mode():
                    before.restore(everything=True)

    def _run(self, mode: FakeTensorMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _Made(mode, self._names) as made:
            outputs = self._original(*args, **kwargs)
        made.make_real()
        return outputs


def _may_differ(value: Any) -> bool:
    """Whether what was set may be another in a call with other rows: what has no data, and numbers."""
    return any(
        isinstance(leaf, (FakeTensor, int, float, *_NUMBERS)) and not isinstance(leaf, bool)
        for leaf in pytree.tree_leaves(value)
    )


class _Place:
    """Stands for a tensor that was made, among the arguments of an operator."""

    def __init__(self, number: int) -> None:
        self.number = number


_UNKNOWN = object()


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what operators make of nothing but numbers and state, without data; it can be made with data later.

    Such are tables that are kept: in an attribute, or in a cache that nobody told us of. Whoever finds one there later
    computes with it.

    Parameters
    ----------
    mode : FakeTensorMode
        The mode in force.
    names : mapping
        What the parameters and buffers of the module are called, by ``id``.
    """

    def __init__(self, mode: FakeTensorMode, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode, self._names = mode, names
        # What was met that has data, by the ``id`` of what stands for it; and its memory, with its name.
        self._real: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._state: dict[int, str] = {}
        self._made: list[weakref.ref[torch.Tensor]] = []
        self._places: dict[int, int] = {}
        self._acts: list[tuple[Any, list[Any], pytree.TreeSpec, list[int]]] = []
        # Memory that was made here, and such as holds what cannot be made again.
        self._own: set[int] = set()
        self._spoiled: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        targets = dynamo.written(func, args, kwargs)
        for leaf in targets:
            if not isinstance(leaf, FakeTensor) or storage_of(leaf) in self._state:
                raise StateWrittenError(self._names.get(id(leaf)) or self._state.get(storage_of(leaf), READ))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, torch.dtype) and leaf in _QUANTIZED for leaf in leaves):
            raise TypeError("it makes quantized tensors")
        if not dynamo.takes_constants(func):
            self._meet(leaves)
        outputs = func(*args, **kwargs)
        named = [self._named(leaf) for leaf in leaves]
        known = not any(one is _UNKNOWN for one in named) and torch.Tag.nondeterministic_seeded not in func.tags
        written = {*map(storage_of, targets)}
        if known and written <= self._own:  # the state is not to be written to twice
            given = {storage_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}.union(self._state)
            made = pytree.tree_leaves(outputs)
            self._own |= {storage_of(leaf) for leaf in made if isinstance(leaf, FakeTensor)} - given
            self._acts.append((func, named, spec, [*map(self._note, made)]))
        else:
            self._spoiled |= written
        return outputs

    def _meet(self, leaves: Sequence[Any]) -> None:
        """Have tensors stand for those with data among the arguments of an operator, as long as this runs."""
        for leaf in leaves:
            if type(leaf) in (torch.Tensor, nn.Parameter):
                fake = self._mode.from_tensor(leaf, static_shapes=True)
                self._real[id(fake)] = leaf, fake
                if leaf.layout is torch.strided:
                    self._state.setdefault(storage_of(fake), self._names.get(id(leaf), READ))

    def _named(self, leaf: Any) -> Any:
        if isinstance(leaf, _NUMBERS) or (isinstance(leaf, torch.Tensor) and storage_of(leaf) in self._spoiled):
            return _UNKNOWN
        if not isinstance(leaf, FakeTensor):
            return leaf
        number = self._number(leaf)
        return self._real.get(id(leaf), (_UNKNOWN,))[0] if number is None else _Place(number)

    def _number(self, leaf: torch.Tensor) -> int | None:
        number = self._places.get(id(leaf))
        return number if number is not None and self._made[number]() is leaf else None

    def _note(self, leaf: Any) -> int:
        if not isinstance(leaf, FakeTensor):
            return -1
        number = self._number(leaf)
        if number is None:
            number = self._places[id(leaf)] = len(self._made)
            self._made.append(weakref.ref(leaf))
        return number

    def make_real(self) -> None:
        """Put tensors with data in the place of those that are still there."""
        found = {number: self._made[number]() for number in self._places.values()}
        left = {
            number: leaf for number, leaf in found.items() if leaf is not None and storage_of(leaf) not in self._spoiled
        }
        if not left:
            return
        values: dict[int, Any] = {}
        kinds = {leaf.device.type for leaf in left.values()}
        with contextlib.suppress(Exception), contextlib.ExitStack() as stack, dynamo.no_mode(), torch.no_grad():
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            for func, named, spec, numbers in self._acts:
                leaves = [values[leaf.number] if isinstance(leaf, _Place) else leaf for leaf in named]
                args, kwargs = pytree.tree_unflatten(leaves, spec)
                made = pytree.tree_leaves(func(*args, **kwargs))
                values.update((number, leaf) for number, leaf in zip(numbers, made, strict=True) if number >= 0)
            _replace([(leaf, values[number]) for number, leaf in left.items()])


def _replace(pairs: list[tuple[Any, Any]]) -> None:
    """Put the second of each pair wherever anything holds the first."""
    instead = {id(old): new for old, new in pairs}
    olds = tuple(old for old, _ in pairs)  # as it is what is called with, which some releases of Python show
    ours = [pairs, olds, instead, *pairs]
    held: list[tuple[Any, Any]] = []
    for holder in gc.get_referrers(*olds):
        if any(holder is one for one in ours):
            continue
        if isinstance(holder, functools._lru_cache_wrapper):
            holder.cache_clear()
        elif type(holder) is tuple:
            held.append((holder, tuple(instead.get(id(item), item) for item in holder)))
        elif isinstance(holder, dict):
            for key in [key for key, value in holder.items() if id(value) in instead]:
                holder[key] = instead[id(holder[key])]
        elif isinstance(holder, (list, deque)):
            for index, item in enumerate(holder):
                if id(item) in instead:
                    holder[index] = instead[id(item)]
        elif isinstance(holder, types.CellType):
            holder.cell_contents = instead[id(holder.cell_contents)]
        elif not isinstance(holder, (types.FrameType, torch.Tensor)):
            for name in _names(holder):
                value = getattr(holder, name, None)
                if id(value) in instead:
                    object.__setattr__(holder, name, instead[id(value)])
    if held:
        _replace(held)


def _names(holder: Any) -> list[str]:
    """The attributes that an object may hold something in."""
    slots = [slot for kind in type(holder).__mro__ for slot in vars(kind).get("__slots__", ())]
    return [*getattr(holder, "__dict__", ()), *slots]
