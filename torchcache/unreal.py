"""An original on tensors without data, run for the shapes of its outputs; what that leaves behind is made real."""

from __future__ import annotations

import contextlib
import functools
import gc
import types
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchcache import dynamo
from torchcache.dynamo import FakeTensor, TorchDispatchMode, storage_of
from torchcache.identity.containers import names_of
from torchcache.identity.outside import Outside
from torchcache.identity.written import Written
from torchcache.mark import Mark

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Unreal(nn.Module):
    """The original as a module, so that its state can be replaced.

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
        super().__init__()
        self.mark = mark
        self.module = module
        self.written: list[str] = []
        self._outside = outside
        self._real: dict[int, torch.Tensor] = {}

    def stands(self, state: Mapping[str, torch.Tensor]) -> None:
        """Note which tensors without data stand for which of its own, by their names."""
        own = {
            **dict(self.named_parameters(remove_duplicate=False)),
            **dict(self.named_buffers(remove_duplicate=False)),
        }
        self._real = {id(fake): own[name] for name, fake in state.items() if name in own}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns."""
        original = self.mark.original(self.module)
        given = args if self.module is None else (self.module, *args)

        def run() -> Any:
            with _Made(self._real) as made:
                outputs = original(*given, **kwargs)
            made.make_real()
            return outputs

        # From within: to replace state may write as well, as it does in recurrent modules.
        before, kept = Written(self.module, self._outside), False
        try:
            outputs = run()
            found = before.differences()
            # ``self.mean = self.mean.to(x)`` may put in the fake tensor of what is there.
            self.written = names_of(one for one in found if not dynamo.stands_for(one.now, one.was))
            kept = not found
            if self.written and not any(_may_differ(one.now) for one in found):
                after = before.again()
                outputs = run()
                kept = not after.changes()
                self.written = [] if kept else self.written
            return outputs
        finally:
            if not kept:
                before.restore(everything=True)


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
    real : mapping
        What tensors without data stand for, by their ``id``.
    """

    def __init__(self, real: Mapping[int, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._real = real
        self._made: list[weakref.ref[torch.Tensor]] = []
        self._places: dict[int, int] = {}
        self._acts: list[tuple[Any, list[Any], pytree.TreeSpec, list[int]]] = []
        # Memory that was made here, and such as holds what cannot be made again.
        self._own: set[int] = set()
        self._spoiled: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        targets = dynamo.written(func, args, kwargs)
        if not all(isinstance(leaf, FakeTensor) for leaf in targets):
            raise TypeError("a write in place to a tensor that is neither a parameter nor a buffer")
        outputs = func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        named = [self._named(leaf) for leaf in leaves]
        known = not any(one is _UNKNOWN for one in named) and torch.Tag.nondeterministic_seeded not in func.tags
        written = {*map(storage_of, targets)}
        if known and written <= self._own:  # the state is not to be written to twice
            given = {storage_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
            made = pytree.tree_leaves(outputs)
            self._own |= {storage_of(leaf) for leaf in made if isinstance(leaf, FakeTensor)} - given
            self._acts.append((func, named, spec, [*map(self._note, made)]))
        else:
            self._spoiled |= written
        return outputs

    def _named(self, leaf: Any) -> Any:
        if isinstance(leaf, _NUMBERS) or (isinstance(leaf, torch.Tensor) and storage_of(leaf) in self._spoiled):
            return _UNKNOWN
        if not isinstance(leaf, FakeTensor):
            return leaf
        number = self._number(leaf)
        return self._real.get(id(leaf), _UNKNOWN) if number is None else _Place(number)

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
