"""What a forward writes outside of its module: attributes of other objects, globals, tensors that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from torchcache.identity.objects import ABSENT, ignored, members_of
from torchcache.identity.watch import same

__all__ = ["Outside", "Place"]

# An object, a class or the dict of globals, and what people call it.
Place = tuple[Any, Callable[[], str]]


class Outside:
    """What stood in places that a program reaches, under the names that its code writes.

    Parameters
    ----------
    places : iterable of (object, callable)
        The places. What is kept here lives for one call.
    names : frozenset of str
        Names that the code assigns to, of anything.
    tensors : sequence of torch.Tensor
        Tensors that it reads.
    """

    def __init__(self, places: Iterable[Place], names: frozenset[str], tensors: Sequence[torch.Tensor]) -> None:
        self._names = frozenset(name for name in names if not ignored(name))
        self._before = [(owner, path, self._held(owner)) for owner, path in places if self._names]
        self._tensors = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def changes(self) -> list[str]:
        """What was written since, by the user's names."""
        found = [_label(owner, path(), name) for owner, path, name, _ in self._differing()]
        if any(tensor._version != version for tensor, version in self._tensors):
            found.append("a tensor that it reads")
        return list(dict.fromkeys(found))

    def restore(self) -> None:
        """Put back what was assigned."""
        for owner, _, name, value in self._differing():
            if isinstance(owner, type):
                delattr(owner, name) if value is ABSENT else setattr(owner, name, value)
            elif value is ABSENT:
                _members(owner).pop(name, None)
            else:
                _members(owner)[name] = value

    def _differing(self) -> list[tuple[Any, Callable[[], str], str, Any]]:
        found = []
        for owner, path, held in self._before:
            now = self._held(owner)
            for name in now.keys() | held.keys():
                if not same(held.get(name, ABSENT), now.get(name, ABSENT)):
                    found.append((owner, path, name, held.get(name, ABSENT)))
        return found

    def _held(self, owner: Any) -> dict[str, Any]:
        members = _members(owner)
        return {name: members[name] for name in members.keys() & self._names}


def _members(owner: Any) -> Any:
    if type(owner) is dict:
        return owner
    if isinstance(owner, type):
        return vars(owner)
    members = members_of(owner)
    return {} if members is None else members


def _label(owner: Any, path: str, name: str) -> str:
    return f"the global {name}" if type(owner) is dict else f"{path}.{name}".lstrip(".")
