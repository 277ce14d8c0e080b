"""What a forward writes outside of its module: other objects, globals, closures, containers, what it reads."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch

from torchcache.identity.alike import alike
from torchcache.identity.containers import Containers, Difference, Place, version_of
from torchcache.identity.objects import ABSENT, ignored, members_of, slots_of
from torchcache.identity.watch import same

# What a tensor is called that no module of the tree holds itself.
READ = "a tensor that it reads"

# What cells and functions hold beside their ``__dict__``, if they have one.
_SLOTS: dict[type, Sequence[tuple[str, Any]]] = {
    types.CellType: [("cell_contents", types.CellType.cell_contents)],
    types.FunctionType: [
        (name, vars(types.FunctionType)[name]) for name in ("__defaults__", "__kwdefaults__", "__code__")
    ],
}


class Outside:
    """What stands in places that a program reaches, under the names that its code writes, and in containers.

    Parameters
    ----------
    places : iterable of (object, callable)
        Objects, classes, functions, tensors, cells of closures and dicts of globals. What is kept here lives for one
        call.
    whole : set of int
        The ``id`` of those that code may write to under names that only it knows.
    containers : iterable of (object, callable)
        Values of which those that are containers are looked into.
    names : frozenset of str
        Names that the code assigns to, of anything.
    tensors : sequence of torch.Tensor
        Tensors that it reads.
    filled : iterable of (object, callable)
        What it reads that has contents of its own, such as arrays.
    """

    def __init__(
        self,
        places: Iterable[Place],
        whole: Set[int],
        containers: Iterable[Place],
        names: frozenset[str],
        tensors: Sequence[torch.Tensor],
        filled: Sequence[Place],
    ) -> None:
        self._given = places, whole, containers, names, tensors, filled
        self._slots_by_kind: dict[type, Sequence[tuple[str, Any]]] = {}
        self._names = frozenset(name for name in names if not ignored(name))
        self._whole = whole
        places = [place for place in places if self._names or id(place[0]) in whole]
        self._before = [(owner, path, self._held(owner)) for owner, path in places]
        held = [(value, path) for _, path, found in self._before for value in found.values()]
        self._containers = Containers([*containers, *held])
        self.tensors, self.filled = tensors, filled
        self._tensors = [(tensor, version_of(tensor)) for tensor in tensors]

    def again(self) -> Outside:
        """What stands there at this time."""
        return Outside(*self._given)

    def differences(self) -> list[Difference]:
        """What was written since, by the user's names."""
        found = [
            Difference(_label(owner, path(), name), was, now) for owner, path, name, was, now in self._differing(alike)
        ]
        found += self._containers.differences()
        written = [tensor for tensor, version in self._tensors if version_of(tensor) != version]
        return [*found, *(Difference(READ, tensor, tensor) for tensor in written)]

    def restore(self) -> None:
        """Put back what was assigned, copies that hold the same included, and what containers held."""
        for owner, _, name, was, _ in self._differing(same):
            slot = dict(self._slots(owner)).get(name)
            if isinstance(owner, type):
                delattr(owner, name) if was is ABSENT else setattr(owner, name, was)
            elif slot is not None:
                slot.__delete__(owner) if was is ABSENT else slot.__set__(owner, was)
            elif was is ABSENT:
                _members(owner).pop(name, None)
            else:
                _members(owner)[name] = was
        self._containers.restore()

    def _differing(self, equal: Callable[[Any, Any], bool]) -> list[tuple[Any, Any, str, Any, Any]]:
        found = []
        for owner, path, held in self._before:
            now = self._held(owner)
            for name in dict.fromkeys([*held, *now]):
                values = held.get(name, ABSENT), now.get(name, ABSENT)
                if not equal(*values):
                    found.append((owner, path, name, *values))
        return found

    def _held(self, owner: Any) -> dict[str, Any]:
        held, written = dict(_members(owner)), self._names
        if id(owner) in self._whole:
            written = frozenset(name for name in held if type(name) is str and not ignored(name)) | written
        held = {name: value for name, value in held.items() if name in written}
        for name, slot in self._slots(owner):
            with contextlib.suppress(AttributeError, ValueError):  # an empty one
                held[name] = slot.__get__(owner)
        return held

    def _slots(self, owner: Any) -> Sequence[tuple[str, Any]]:
        kind: Any = type(owner)
        known = self._slots_by_kind.get(kind)
        if known is None:
            known = () if isinstance(owner, type) else _SLOTS.get(kind) or slots_of(kind)
            self._slots_by_kind[kind] = known
        whole = kind is types.CellType or id(owner) in self._whole
        return known if whole or not known else [slot for slot in known if slot[0] in self._names]


def _members(owner: Any) -> Any:
    if type(owner) is dict:
        return owner
    if isinstance(owner, type):
        return vars(owner)
    if isinstance(owner, threading.local):
        return threading.local.__getattribute__(owner, "__dict__")
    members = members_of(owner)
    return {} if members is None else members


def _label(owner: Any, path: str, name: str) -> str:
    if type(owner) is types.CellType:
        return path
    return f"the global {name}" if type(owner) is dict else f"{path}.{name}".lstrip(".")
