"""Rows of a data set that may not be loaded, and memory that several tensors share as soon as they are."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, overload

import torch

from torchcache import dynamo
from torchcache.context import inside_region


class Kind(NamedTuple):
    """What one leaf of a sample is, without its content."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Source(Protocol):
    """Where rows come from.

    Attributes
    ----------
    digest : str
        The algorithm of the rows' digests.
    """

    digest: str

    def load(self, rows: Sequence[Row], *, foreign: bool) -> None:
        """Give all of ``rows`` their data. ``foreign`` says that code reads it that is no part of a region."""

    def learn(self, owner: Any, leaf: int, foresee: Foresee) -> None:
        """Note that a region looks rows of ``leaf`` up, and how to tell whether it will find them."""


# From rows to whether each will be found; ``None`` where that cannot be told.
Foresee = Callable[[Sequence[torch.Tensor]], "Sequence[bool] | None"]


class Row:
    """One tensor of one sample.

    Parameters
    ----------
    source : Source
        The data set that it comes from.
    index : object
        The sample's index there.
    leaf : int
        Which of the sample's large tensors it is.
    kind : Kind
        Its dtype and shape.
    digest : bytes
        16 bytes over its elements.
    data : torch.Tensor or None
        Its elements, once they are loaded. Nobody writes to them.
    """

    __slots__ = ("data", "digest", "index", "kind", "leaf", "source")

    def __init__(
        self, source: Source, index: Any, leaf: int, kind: Kind, digest: bytes, data: torch.Tensor | None = None
    ) -> None:
        self.source, self.index, self.leaf, self.kind = source, index, leaf, kind
        self.digest, self.data = digest, data


class Rows(Sequence[Row]):
    """Rows of one leaf of several samples. What stands for one of them is made when somebody asks for it.

    Parameters
    ----------
    source, leaf, kind
        As those of a row.
    indices : sequence
        Of the samples.
    digests : list of bytes
        Theirs.
    """

    __slots__ = ("_made", "digests", "indices", "kind", "leaf", "source")

    def __init__(self, source: Source, indices: Sequence[Any], leaf: int, kind: Kind, digests: list[bytes]) -> None:
        self.source, self.indices, self.leaf, self.kind, self.digests = source, indices, leaf, kind, digests
        self._made: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self.digests)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        row = self._made.get(place)
        if row is None:
            row = Row(self.source, self.indices[place], self.leaf, self.kind, self.digests[place])
            row = self._made.setdefault(place, row)  # another thread may have made it
        return row

    @property
    def untouched(self) -> bool:
        """Whether nobody has asked for any: none can have been loaded, or found to be another."""
        return not self._made


class Held:
    """Rows that lie side by side in one memory, as soon as they lie anywhere. Views share it.

    Attributes
    ----------
    data : torch.Tensor or None
        The memory. From when on there is one, anybody may have written to it.
    """

    __slots__ = ("__weakref__", "data", "device", "kind", "number", "pinned", "rows")

    def __init__(self, rows: Sequence[Row], kind: Kind, device: torch.device, pinned: bool = False) -> None:
        self.rows, self.kind, self.device, self.pinned = rows, kind, device, pinned
        self.data: torch.Tensor | None = None
        self.number = -1

    def load(self) -> torch.Tensor:
        """The memory, filled."""
        if self.data is None:
            with _lock, dynamo.no_mode(), torch.inference_mode(False), torch.no_grad():
                if self.data is None:
                    self.data = self._gather(range(len(self.rows)))
        return self.data

    def fresh(self, places: Sequence[int]) -> torch.Tensor:
        """Some of the rows as they are now, in memory that nobody else has."""
        if self.data is None:
            with _lock, dynamo.no_mode(), torch.no_grad():
                return self._gather(places)
        return self.data[[*places]]

    def _gather(self, places: Sequence[int]) -> torch.Tensor:
        rows = [self.rows[place] for place in places]
        missing: dict[int, list[Row]] = {}
        for row in rows:
            if row.data is None:
                missing.setdefault(id(row.source), []).append(row)
        for some in missing.values():
            with dynamo.outside_dispatch():
                some[0].source.load(some, foreign=not inside_region())
        data = [row.data for row in rows if row.data is not None]
        made = torch.stack(data) if data else torch.empty((0, *self.kind.shape), dtype=self.kind.dtype, device="cpu")
        made = made.to(self.device)
        return made.pin_memory() if self.pinned else made

    def handle(self) -> int:
        """A number by which a graph finds these rows, as long as somebody holds them."""
        if self.number < 0:
            self.number = next(_numbers)
            _numbered[self.number] = self
        return self.number


def held_of(number: int) -> Held | None:
    """The rows that a graph finds by this number, as long as somebody holds them."""
    return _numbered.get(number)


_lock = threading.RLock()


def _open_in_child() -> None:
    """Another thread may have been loading when this one forked."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_in_child)
_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
