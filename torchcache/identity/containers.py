"""Lists, dicts, sets and deques, and those in them: what they hold at one time, what differs later, and back to it."""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch

from torchcache.identity.watch import same

# The methods of the first that a class extends are called: those of the class itself may do anything.
KINDS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque, tuple)
# Containers in each other, and items in all. Of a container with more the length is compared.
DEEPEST, MOST_ITEMS = 4, 1 << 17

# What may be written to, and what people call it.
Place = tuple[Any, Callable[[], str]]


class Difference(NamedTuple):
    """What was written to.

    Parameters
    ----------
    name : str
        What people call it.
    was, now : Any
        What stood there, and what does: a container's items, now without keys.
    grew : bool
        Whether it is a dict in which entries were added, and no other was touched, as in one that keeps what was
        computed for sizes.
    """

    name: str
    was: Any
    now: Any
    grew: bool = False


@dataclasses.dataclass(slots=True)
class _Held:
    container: Any
    path: Callable[[], str]
    length: int
    items: tuple[Any, ...]
    versions: int

    def differs(self) -> bool:
        if _length(self.container) != self.length:
            return True
        if not self.items:
            return False
        now = _items(self.container, len(self.items))
        alike = all(map(operator.is_, now, self.items)) or same(now, self.items)
        return not alike or _versions(now) != self.versions

    def grew(self) -> bool:
        if not self.items or not issubclass(_kind(self.container), dict):
            return False
        now, count = _items(self.container, MOST_ITEMS), _length(self.container)
        kept = (*now[: self.length], *now[count : count + self.length])
        return count > self.length and all(map(operator.is_, kept, self.items))

    def restore(self) -> None:
        kind = _kind(self.container)
        if len(self.items) != _places(kind, self.length):
            return
        kind.clear(self.container)
        if issubclass(kind, dict):
            for key, item in zip(self.items[: self.length], self.items[self.length :], strict=True):
                kind.__setitem__(self.container, key, item)
        else:
            (kind.update if kind is set else kind.extend)(self.container, self.items)


class _Kinds(dict[type, bool]):
    """Whether objects of a class are containers."""

    def __missing__(self, kind: type) -> bool:
        found = self[kind] = issubclass(kind, KINDS)
        return found


class Containers:
    """What containers hold, and those in them.

    Parameters
    ----------
    roots : iterable of (object, callable)
        Any values; what is no container is left out. What is kept here lives for one call.
    """

    def __init__(self, roots: Iterable[Place]) -> None:
        self._held: list[_Held] = []
        self._empty: list[Place] = []
        room, seen, kinds = MOST_ITEMS, set[int](), _Kinds()
        todo = [(value, path, DEEPEST) for value, path in roots if kinds[type(value)]][::-1]
        while todo:  # what is in a container goes by its name, even where it is met elsewhere, too
            value, path, depth = todo.pop()
            if id(value) in seen or not kinds[type(value)]:
                continue
            seen.add(id(value))
            if type(value) in KINDS and not value:  # a class of one's own may raise when it is asked
                self._empty += [(value, path)] if type(value) is not tuple else []
                continue
            items = _items(value, room)
            room -= len(items)
            if not issubclass(type(value), tuple):
                self._held.append(_Held(value, path, _length(value), items, _versions(items)))
            if items and depth and any(kinds[kind] for kind in set(map(type, items))):
                todo += [(item, path, depth - 1) for item in items]

    def differences(self) -> list[Difference]:
        """Those that were written to since, and those with a tensor that was."""
        differing = [held for held in self._held if held.differs()]
        found = [Difference(held.path(), held.items, _values(held.container), held.grew()) for held in differing]
        filled = [(container, path) for container, path in self._empty if container]
        return found + [Difference(path(), (), _values(one), isinstance(one, dict)) for one, path in filled]

    def restore(self) -> None:
        """Put back what they held."""
        for held in self._held:
            if held.differs():
                held.restore()
        for container, _ in self._empty:
            container.clear()


def names_of(differences: Iterable[Difference]) -> list[str]:
    """Their names, each once."""
    return list(dict.fromkeys(one.name for one in differences))


def version_of(tensor: torch.Tensor) -> int:
    """The counter that writes in place move, where a tensor has one."""
    return -1 if tensor.is_inference() else int(tensor._version)


def _kind(container: Any) -> Any:
    own = type(container)
    return own if own in KINDS else next(kind for kind in KINDS if issubclass(own, kind))


def _length(container: Any) -> int:
    return int(_kind(container).__len__(container))


def _places(kind: Any, length: int) -> int:
    return 2 * length if issubclass(kind, dict) else length


def _items(container: Any, most: int) -> tuple[Any, ...]:
    """Its items, a dict's keys and then its values; nothing where there are more than ``most``."""
    kind = _kind(container)
    if not 0 < _places(kind, kind.__len__(container)) <= most:
        return ()
    keys = tuple(kind.__iter__(container))
    return (*keys, *map(dict.__getitem__, repeat(container), keys)) if issubclass(kind, dict) else keys


def _values(container: Any) -> tuple[Any, ...]:
    """Its items, without a dict's keys."""
    return _items(container, MOST_ITEMS)[-_length(container) :]


def _versions(items: Sequence[Any]) -> int:
    return sum(version_of(item) for item in items if isinstance(item, torch.Tensor))
