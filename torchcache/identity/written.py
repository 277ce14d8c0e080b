"""What a forward writes: attributes, buffers, gradients and containers that differ from a snapshot."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from torchcache.dynamo import storage_of
from torchcache.errors import Bypass
from torchcache.identity.containers import Containers, Difference, names_of, version_of
from torchcache.identity.content import content_digest
from torchcache.identity.filled import FILLED, fill, held_by, holds, is_writable, size_of
from torchcache.identity.homes import module_of
from torchcache.identity.modules import GROUPS, KEPT
from torchcache.identity.objects import ignored
from torchcache.identity.outside import READ, Outside
from torchcache.identity.watch import same
from torchcache.quantity import names_text

# Contents of tensors are compared and put back, since no version tells that BatchNorm's statistics change, or what is
# written through ``data``. Larger ones, and what is beyond so many bytes in all, are compared by their versions only.
MOST_BYTES, MOST_IN_ALL = 1 << 24, 1 << 28
# Holds no contents that a forward writes, as most of what modules hold.
_WITHOUT = frozenset({nn.Parameter, bool, int, float, str, type(None)})
_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name and isinstance(vars(nn.Module())[name], dict)]


class Written:
    """The attributes of every module of a tree, to find later which a forward wrote.

    Parameters
    ----------
    module : nn.Module or None
        The root of the tree. A snapshot keeps what it saw alive, so it is to live for one call.
    outside : Outside or None
        What may be written elsewhere.
    wrote : sequence of Difference
        What an earlier call wrote: the contents of tensors among it are restored as well.

    Attributes
    ----------
    is_set_up : bool
        Whether what was written since is known to be a setting up, that further calls find done.
    rewritten : set of int
        The ``id`` of tensors that were found to be written with what they held.
    """

    def __init__(
        self,
        module: nn.Module | None,
        outside: Outside | None = None,
        wrote: Sequence[Difference] = (),
    ) -> None:
        self._module = module
        self._outside = outside
        self.is_set_up = False
        self.rewritten: set[int] = set()
        self._dicts = [(members, tuple(members), tuple(members.values())) for members in _members(module)]
        self._before = _snapshot(module)
        self._versions = [entry for entry in self._before.values() if isinstance(entry[0], torch.Tensor)]
        # A path in the tree says what somebody wrote to; a library that has installed hooks notes so in an attribute.
        self._containers = Containers((held, functools.partial(str, name)) for name, (held, _) in self._before.items())
        self._hooks = Containers((hooks, str) for hooks in _hooks(module))
        held = {id(leaf): (one.name, leaf) for one in wrote for leaf in _tensors(one.now)}
        room = MOST_IN_ALL
        named = [(name, value) for name, (value, _) in self._before.items()]
        named += [(READ, leaf) for leaf in (outside.tensors if outside is not None else ())]
        self._memory = [_Memory(name, leaf) for name, leaf in named if type(leaf) in (torch.Tensor, nn.Parameter)]
        named += [(one.grad_name, one.grad) for one in self._memory if one.grad is not None]
        named += [(path(), value) for value, path in (outside.filled if outside is not None else ())]
        named = [(name, value) for name, value in named if type(value) not in _WITHOUT]
        for name, leaf in [(name, leaf) for name, value in named for leaf in _leaves(value)]:
            size = size_of(leaf) if isinstance(leaf, FILLED) else leaf.nbytes
            if id(leaf) not in held and size <= min(MOST_BYTES, room):
                held[id(leaf)] = (name, leaf)
                room -= size
        self._contents = [_Content(name, leaf) for name, leaf in held.values() if _is_readable(leaf)]
        self._held_by = {id(one.leaf): one for one in self._contents if isinstance(one.leaf, torch.Tensor)}

    def again(self) -> Written:
        """The same at this time."""
        return Written(self._module, self._outside and self._outside.again())

    def differences(self) -> list[Difference]:
        """What was set, replaced, removed or mutated since, by its path in the tree.

        Containers are compared by their items' identities, tensors by the counter that writes in place move, and by
        what they hold where that is known.
        """
        found = [] if self._is_as_before() else self._differing()
        found += self._containers.differences()
        found += [difference for one in self._memory for difference in one.differences()]
        told = {one.name for one in found}
        found += [
            Difference(one.name, one.leaf, one.leaf) for one in self._contents if one.name not in told and one.differs()
        ]
        found += self._outside.differences() if self._outside is not None else []
        return [one for one in found if not self._is_rewritten(one)]

    def _is_rewritten(self, one: Difference) -> bool:
        """Whether it is a tensor that was written with what it held."""
        content = self._held_by.get(id(one.now)) if one.was is one.now else None
        if content is None or content.differs():
            return False
        self.rewritten.add(id(one.now))
        return True

    def _is_as_before(self) -> bool:
        """Whether all attributes are the very same objects, and no tensor among them has another version."""
        return all(version_of(tensor) == version for tensor, version in self._versions) and all(
            tuple(members) == names and all(map(operator.is_, members.values(), values))
            for members, names, values in self._dicts
        )

    def _differing(self) -> list[Difference]:
        after, nothing = _snapshot(self._module), (None, 0)
        return [
            Difference(name, self._before.get(name, nothing)[0], after.get(name, nothing)[0])
            for name in dict.fromkeys([*self._before, *after])
            if not _equal(self._before.get(name), after.get(name))
        ]

    def changes(self) -> list[str]:
        """The names of what differs."""
        return names_of(self.differences())

    def restore(self, *, everything: bool = False) -> None:
        """Put back attributes that were set, replaced or removed, containers' items, hooks and gradients.

        Nothing where parameters or modules are among them: then another thread loads weights, and knows better. With
        ``everything`` these, too.
        """
        after = _snapshot(self._module)
        for name in () if everything else self._before.keys() | after.keys():
            entries = self._before.get(name), after.get(name)
            weights = any(entry is not None and isinstance(entry[0], (nn.Parameter, nn.Module)) for entry in entries)
            if weights and not _equal(*entries):
                return
        if self._outside is not None:
            self._outside.restore()
        modules = dict(self._module.named_modules()) if self._module is not None else {}
        for path, inner in modules.items():
            prefix = f"{path}." if path else ""
            members: dict[str, Any] = inner.__dict__
            for name in [name for name in members if name not in KEPT and not ignored(name)]:
                if prefix + name not in self._before:
                    del members[name]
            for group in GROUPS if everything else ():
                for name in [name for name in members.get(group) or () if prefix + name not in self._before]:
                    del members[group][name]
        for full, (value, _) in self._before.items():
            path, _, name = full.rpartition(".")
            if path in modules:
                members = modules[path].__dict__
                holder = next((members[group] for group in GROUPS if name in (members.get(group) or ())), members)
                if holder.get(name) is not value:
                    holder[name] = value
        self._containers.restore()
        self._hooks.restore()
        for memory in self._memory:
            memory.restore(everything=everything)
        for content in self._contents:
            content.restore()


class _Memory:
    """The memory of a tensor, its gradient and whether it needs one, which code may set without an operator."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name, self._tensor, self._data, self._trains = name, tensor, tensor.data, tensor.requires_grad
        self.grad_name, self.grad = f"{name}.grad", self._grad_now()

    def _grad_now(self) -> torch.Tensor | None:
        return self._tensor.grad if self._tensor.is_leaf else None

    def _is_elsewhere(self) -> bool:
        return self._tensor.layout is torch.strided and storage_of(self._tensor) != storage_of(self._data)

    def differences(self) -> list[Difference]:
        """What was replaced of it since."""
        found = [Difference(self._name, self._data, self._tensor.data)] if self._is_elsewhere() else []
        if (grad := self._grad_now()) is not self.grad:
            found.append(Difference(self.grad_name, self.grad, grad))
        if self._tensor.requires_grad != self._trains:
            found.append(Difference(f"{self._name}.requires_grad", self._trains, not self._trains))
        return found

    def restore(self, *, everything: bool) -> None:
        """Have it have its gradient again; and its memory, that of a parameter with ``everything`` only."""
        if self._is_elsewhere() and (everything or not isinstance(self._tensor, nn.Parameter)):
            self._tensor.data = self._data
        if self._grad_now() is not self.grad:
            self._tensor.grad = self.grad
        if self._tensor.is_leaf and self._tensor.requires_grad != self._trains:
            self._tensor.requires_grad_(self._trains)


class _Content:
    """What a tensor, or another object that has contents of its own, holds at one time."""

    def __init__(self, name: str, leaf: Any) -> None:
        self.name, self.leaf = name, leaf
        self._filled = isinstance(leaf, FILLED)
        self._was = held_by(leaf) if self._filled else (content_digest(leaf), leaf.detach().clone())

    def differs(self) -> bool:
        """Whether it holds something else."""
        return not holds(self.leaf, self._was) if self._filled else content_digest(self.leaf) != self._was[0]

    def restore(self) -> None:
        """Put back what it held; what other graphs keep of it is as it was, and so is its version."""
        if not self.differs():
            return
        if self._filled:
            fill(self.leaf, self._was)
            return
        with torch.no_grad(), torch.inference_mode(self.leaf.is_inference()):
            self.leaf.data.copy_(self._was[1])


def _is_readable(leaf: Any) -> bool:
    """Whether its content can be told: that of sparse tensors and of most subclasses cannot."""
    if isinstance(leaf, FILLED):
        return is_writable(leaf)
    try:
        content_digest(leaf)
    except Bypass:
        return False
    return True


# A value, the version of a tensor.
_Entry = tuple[Any, int]


def _tensors(value: Any) -> list[torch.Tensor]:
    """What of it are tensors whose contents a forward may keep."""
    leaves = value if type(value) is tuple else (value,)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter)]


def _leaves(value: Any, further: int = 4) -> list[Any]:
    """What of a value has contents of its own that a forward may write: tensors that are no parameters, arrays, ..."""
    if type(value) in (dict, tuple, list):
        items = value.values() if type(value) is dict else value
        return [leaf for item in items for leaf in _leaves(item, further - 1)] if further else []
    return [value] if isinstance(value, FILLED) else _tensors(value)


def _hooks(module: nn.Module | None) -> Iterable[Any]:
    """The dicts of hooks of a tree."""
    modules = module.modules() if module is not None else ()
    return [members[name] for inner in modules for members in [vars(inner)] for name in _HOOKS if name in members]


def _members(module: nn.Module | None) -> list[dict[str, Any]]:
    """The dicts in which the modules of a tree keep what they hold."""
    found = []
    for members in map(vars, module.modules() if module is not None else ()):
        found += [members, *(members[group] for group in GROUPS if members.get(group) is not None)]
    return found


def _snapshot(module: nn.Module | None) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for path, inner in module.named_modules() if module is not None else ():
        prefix = f"{path}." if path else ""
        members = vars(inner)
        for name, value in members.items():
            if name not in KEPT and not ignored(name):
                found[prefix + name] = _entry(value)
        for group in GROUPS:
            for name, value in (members.get(group) or {}).items():
                found[prefix + name] = _entry(value)
    return found


def tensor_names(module: nn.Module | None) -> dict[int, str]:
    """What the parameters, the buffers and the other tensors that the modules of a tree hold are called, by ``id``."""
    if module is None:
        return {}
    held = {id(value): path for path, (value, _) in _snapshot(module).items() if _tensors(value)}
    return held | {id(tensor): path for path, tensor in nn.Module.named_parameters(module)}


def _entry(value: Any) -> _Entry:
    return value, version_of(value) if isinstance(value, torch.Tensor) else 0


def _equal(before: _Entry | None, after: _Entry | None) -> bool:
    return before is not None and after is not None and same(before[0], after[0]) and before[1] == after[1]


def _learns(part: nn.Module | None) -> bool:
    """Whether a part takes statistics of its batches, as BatchNorm in train mode does."""
    return part is not None and part.training and "running_mean" in part._buffers


def written_text(names: Sequence[str], module: nn.Module | None) -> tuple[str, str]:
    """That a forward writes to what has these names, and what to do about it."""
    advice = "mark a part that keeps no state, or promise with pure=True that on hits this need not happen"
    parts = dict(module.named_modules()) if module is not None else {}
    learning = [path for path in dict.fromkeys(name.rpartition(".")[0] for name in names) if _learns(parts.get(path))]
    if learning:
        where = names_text(learning) or type(module).__name__
        advice = f"call .eval() on {where}, which takes statistics of its batches in train mode"
    hooks = [hook for part in parts.values() for hook in part._forward_pre_hooks.values()]
    if any(module_of(type(hook)).startswith("torch.nn.utils.") for hook in hooks):
        advice = (
            "a hook of torch.nn.utils sets that in each call: take it off (prune.remove, remove_weight_norm), or use "
            "torch.nn.utils.parametrizations"
        )
    return f"its forward writes to {names_text(names)}", advice
