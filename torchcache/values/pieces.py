"""Pieces of a value that was taken apart, and how they become the value again."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

Path = tuple[Any, ...]
# What was built so far of one value, by the id of its piece: a container may stand in several places.
Made = dict[int, Any]

# Containers whose names of entries are chosen by code.
_NAMED = (dict, OrderedDict, defaultdict)


class Leaf(NamedTuple):
    """Stands where a tensor was."""

    place: int

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The value, or this part of it, around these tensors."""
        return tensors[self.place]

    def paths(self) -> Iterator[tuple[int, Path]]:
        """Where each tensor stands, once."""
        yield self.place, ()

    def constants(self) -> Iterator[Any]:
        """What stands here beside tensors, names of entries that are no text included."""
        return iter(())


class Stack(NamedTuple):
    """Stands where a list or tuple of equal tensors was: one leaf is their stack."""

    place: int
    kind: type

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The value, or this part of it, around these tensors."""
        built = made[id(self)] = self.kind(tensors[self.place].unbind(0))
        return built

    def paths(self) -> Iterator[tuple[int, Path]]:
        """Where each tensor stands, once."""
        yield self.place, ()

    def constants(self) -> Iterator[Any]:
        """What stands here beside tensors, names of entries that are no text included."""
        return iter(())


class Constant(NamedTuple):
    """A value that nobody can write to."""

    value: Any

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The value, or this part of it, around these tensors."""
        return self.value

    def paths(self) -> Iterator[tuple[int, Path]]:
        """Where each tensor stands, once."""
        return iter(())

    def constants(self) -> Iterator[Any]:
        """What stands here beside tensors, names of entries that are no text included."""
        yield self.value


class Container(NamedTuple):
    """A container without its parts."""

    kind: type
    make: Callable[[list[Any]], Any]
    names: Sequence[Any]
    parts: Sequence[Any]

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The value, or this part of it, around these tensors."""
        built = made[id(self)] = self.make([part.build(tensors, made) for part in self.parts])
        return built

    def paths(self) -> Iterator[tuple[int, Path]]:
        """Where each tensor stands, once."""
        for name, part in zip(self.names, self.parts, strict=True):
            for place, path in part.paths():
                yield place, (name, *path)

    def constants(self) -> Iterator[Any]:
        """What stands here beside tensors, names of entries that are no text included."""
        for name, part in zip(self.names, self.parts, strict=True):
            if self.kind in _NAMED and type(name) is not str:
                yield name
            yield from part.constants()


class Again(NamedTuple):
    """Stands where a container was that stood in another place before."""

    piece: Any

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The value, or this part of it, around these tensors."""
        return made[id(self.piece)]

    def paths(self) -> Iterator[tuple[int, Path]]:
        """Where each tensor stands, once."""
        return iter(())

    def constants(self) -> Iterator[Any]:
        """What stands here beside tensors, names of entries that are no text included."""
        return iter(())


Piece = Leaf | Stack | Constant | Container | Again
