"""Pieces of a value that was taken apart, and how they become the value again."""

from __future__ import annotations

import abc
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Path = tuple[Any, ...]
# What was built so far of one value, by the id of its piece: a container may stand in several places.
Made = dict[int, Any]

# Containers whose names of entries are chosen by code.
_NAMED = (dict, OrderedDict, defaultdict)


class Piece(abc.ABC):
    """A part of a value that was taken apart, with all that is in it."""

    __slots__ = ()

    @abc.abstractmethod
    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The part around these tensors; what may stand in several places is noted in ``made``."""

    def paths(self) -> Iterator[tuple[int, Path]]:
        """Where each tensor stands, once."""
        return iter(())

    def constants(self) -> Iterator[Any]:
        """What stands here beside tensors, names of entries that are no text included."""
        return iter(())


@dataclasses.dataclass(slots=True)
class Leaf(Piece):
    """Stands where a tensor was."""

    place: int

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The tensor."""
        return tensors[self.place]

    def paths(self) -> Iterator[tuple[int, Path]]:
        """Its own place."""
        yield self.place, ()


@dataclasses.dataclass(slots=True)
class Stack(Leaf):
    """Stands where a list or tuple of equal tensors was: one leaf is their stack."""

    kind: type

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The list or tuple."""
        built = made[id(self)] = self.kind(tensors[self.place].unbind(0))
        return built


@dataclasses.dataclass(slots=True)
class Constant(Piece):
    """A value that nobody can write to."""

    value: Any

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The value itself."""
        return self.value

    def constants(self) -> Iterator[Any]:
        """The value."""
        yield self.value


@dataclasses.dataclass(slots=True)
class Container(Piece):
    """A container without its parts."""

    kind: type
    make: Callable[[list[Any]], Any]
    names: Sequence[Any]
    parts: Sequence[Piece]

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """A new one of its kind."""
        built = made[id(self)] = self.make([part.build(tensors, made) for part in self.parts])
        return built

    def paths(self) -> Iterator[tuple[int, Path]]:
        """The places of its parts, each behind the name of the entry."""
        for name, part in zip(self.names, self.parts, strict=True):
            for place, path in part.paths():
                yield place, (name, *path)

    def constants(self) -> Iterator[Any]:
        """Those of its parts, and its names where they are chosen by code and no text."""
        for name, part in zip(self.names, self.parts, strict=True):
            if self.kind in _NAMED and type(name) is not str:
                yield name
            yield from part.constants()


@dataclasses.dataclass(slots=True)
class Again(Piece):
    """Stands where a container was that stood in another place before."""

    piece: Piece

    def build(self, tensors: Sequence[torch.Tensor], made: Made) -> Any:
        """The container that was built there."""
        return made[id(self.piece)]
