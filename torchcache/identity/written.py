"""What a forward writes: attributes, buffers and containers that differ from a snapshot."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchcache.identity.objects import ignored
from torchcache.identity.outside import Outside
from torchcache.identity.watch import same

__all__ = ["Written", "written_text"]

_CONTAINERS = (list, dict, set, deque, OrderedDict)
_ENTRIES = ("_parameters", "_buffers", "_modules")
# What torch keeps on a module for itself: hooks and caches, written by calls without a meaning to forward.
_KEPT = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name and isinstance(vars(nn.Module())[name], dict)]


class Written:
    """The attributes of every module of a tree, to find later which a forward wrote.

    Parameters
    ----------
    module : nn.Module or None
        The root of the tree. A snapshot keeps what it saw alive, so it is to live for one call.
    outside : Outside or None
        What may be written elsewhere.
    contents_of : sequence of str
        Paths of tensors whose contents are restored as well.
    """

    def __init__(
        self, module: nn.Module | None, outside: Outside | None = None, contents_of: Sequence[str] = ()
    ) -> None:
        self._module = module
        self._outside = outside
        self._before = _snapshot(module)
        self._hooks = _hooks(module)
        held = [self._before[name][0] for name in contents_of if name in self._before]
        self._contents = [(leaf, leaf.detach().clone()) for leaf in held if isinstance(leaf, torch.Tensor)]

    def changes(self) -> list[str]:
        """Names of what was set, replaced, removed or mutated since, by their paths in the tree.

        Containers are compared by their items' identities, tensors by the counter that writes in place move.
        """
        after = _snapshot(self._module)
        names = dict.fromkeys([*self._before, *after])
        found = [name for name in names if not _equal(self._before.get(name), after.get(name))]
        return found if self._outside is None else [*found, *self._outside.changes()]

    def values(self, names: Sequence[str]) -> list[tuple[Any, Any]]:
        """What each of these was, and what it is; ``None`` for what is not there."""
        after, nothing = _snapshot(self._module), (None, None, 0)
        return [(self._before.get(name, nothing)[0], after.get(name, nothing)[0]) for name in names]

    def restore(self, *, everything: bool = False) -> None:
        """Put back attributes that were set, replaced or removed, containers' items, and hooks.

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
            for name in [name for name in members if name not in _KEPT and not ignored(name)]:
                if prefix + name not in self._before:
                    del members[name]
            for group in _ENTRIES if everything else ():
                for name in [name for name in members.get(group) or () if prefix + name not in self._before]:
                    del members[group][name]
            for full, (value, items, _) in self._before.items():
                name = full.removeprefix(prefix)
                if full.startswith(prefix) and "." not in name:
                    holder = next((members[group] for group in _ENTRIES if name in (members.get(group) or ())), members)
                    if holder.get(name) is not value:
                        holder[name] = value
                    if items is not None:
                        _refill(value, items)
        for hooks, before in self._hooks:
            _refill(hooks, before)
        with torch.no_grad():
            for leaf, contents in self._contents:
                if not leaf.is_inference():
                    leaf.copy_(contents)


def _refill(container: Any, items: tuple[Any, ...]) -> None:
    if len(container) == len(items) and same(
        tuple(container.items() if isinstance(container, dict) else container), items
    ):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(items)
    else:
        container.extend(items) if isinstance(container, deque) else container.update(items)


# A value, the items of a container, the version of a tensor.
_Entry = tuple[Any, tuple[Any, ...] | None, int]


def _hooks(module: nn.Module | None) -> list[tuple[dict[int, Any], tuple[Any, ...]]]:
    """The dicts of hooks of a tree, and their items: a library that has installed its own notes so in an attribute."""
    modules = module.modules() if module is not None else ()
    held = (members[name] for inner in modules for members in [vars(inner)] for name in _HOOKS if name in members)
    return [(hooks, tuple(hooks.items())) for hooks in held if isinstance(hooks, dict)]


def _snapshot(module: nn.Module | None) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for path, inner in module.named_modules() if module is not None else ():
        prefix = f"{path}." if path else ""
        members = vars(inner)
        for name, value in members.items():
            if name not in _KEPT and not ignored(name):
                found[prefix + name] = _entry(value)
        for group in _ENTRIES:
            for name, value in (members.get(group) or {}).items():
                found[prefix + name] = _entry(value)
    return found


def _entry(value: Any) -> _Entry:
    if isinstance(value, torch.Tensor):
        return value, None, _version(value)
    if type(value) in _CONTAINERS:
        items = tuple(value.items()) if isinstance(value, dict) else tuple(value)
        versions = sum(_version(item) for item in items if isinstance(item, torch.Tensor))
        return value, items, versions
    return value, None, 0


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else int(tensor._version)


def _equal(before: _Entry | None, after: _Entry | None) -> bool:
    if before is None or after is None:
        return False
    return same(before[0], after[0]) and before[2] == after[2] and same(before[1] or (), after[1] or ())


def written_text(names: Sequence[str]) -> tuple[str, str]:
    """That a forward writes to what has these names, and what to do about it."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    advice = "mark a part that keeps no state, or promise with pure=True that on hits this need not happen"
    return f"its forward writes to {shown}", advice
