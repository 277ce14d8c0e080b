"""Samples by their indices: those of one structure side by side, others one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchcache.loading.samples import Sample, describe, name_of, small_values

# Apart from the generators that training draws from.
_random = random.Random()
_DIGEST = np.dtype("V16")


class Block(NamedTuple):
    """Samples of one structure, all of them remembered.

    Parameters
    ----------
    structure : tuple
        Theirs.
    indices : list of int
        Which samples.
    columns : list of list
        For each small value in the structure, those of the samples.
    digests : list of list of bytes
        For each large tensor, those of the samples.
    """

    structure: Any
    indices: list[int]
    columns: list[list[Any]]
    digests: list[list[bytes]]


class _Table:
    """Samples of one structure, by small numbers."""

    def __init__(self, sample: Sample) -> None:
        self.structure = sample.structure
        self._there = np.zeros(0, np.bool_)
        self._digests = np.zeros((0, len(sample.digests) // 16), _DIGEST)
        self._columns: list[list[Any]] = [[] for _ in sample.values]

    def takes(self, sample: Sample) -> bool:
        """Whether a sample is of this structure."""
        return (
            (sample.structure is self.structure or sample.structure == self.structure)
            and len(sample.values) == len(self._columns)
            and len(sample.digests) == 16 * self._digests.shape[1]
        )

    def __len__(self) -> int:
        return len(self._there)

    def known(self) -> list[int]:
        """The numbers that are there."""
        numbers: list[int] = np.flatnonzero(self._there).tolist()
        return numbers

    def put(self, index: int, sample: Sample) -> bool:
        """Keep a sample; whether it was not there before."""
        if index >= len(self._there):
            size = max(index + 1, 2 * len(self._there), 64)
            self._there = _longer(self._there, size)
            self._digests = _longer(self._digests, size)
            for column in self._columns:
                column.extend([None] * (size - len(column)))
        new = not self._there[index]
        self._there[index] = True
        self._digests[index] = np.frombuffer(sample.digests, _DIGEST)
        for column, value in zip(self._columns, sample.values, strict=True):
            column[index] = value
        return new

    def drop(self, index: int) -> bool:
        """Forget a sample; whether it was there."""
        there = index < len(self._there) and bool(self._there[index])
        if there:
            self._there[index] = False
        return there

    def get(self, index: int) -> Sample | None:
        """A sample, if it is there."""
        if index >= len(self._there) or not self._there[index]:
            return None
        values = tuple([column[index] for column in self._columns])
        return Sample(self.structure, values, self._digests[index].tobytes())

    def block(self, indices: list[int]) -> Block | None:
        """Several at once; ``None`` where one is missing."""
        numbers = np.array(indices, np.int64)
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(self._there):
            return None
        if not self._there[numbers].all():
            return None
        columns = [[column[index] for index in indices] for column in self._columns]
        digests: list[list[bytes]] = self._digests[numbers].T.tolist()
        return Block(self.structure, indices, columns, digests)

    def fits(self, structure: Any) -> bool:
        """Whether samples of ``structure`` have as many digests and values as these."""
        large, small = small_values(structure)
        return (large, small) == (self._digests.shape[1], len(self._columns))


def _longer(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    longer = np.zeros((size, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


class ByIndex:
    """What is remembered of samples.

    Structures are known from samples that were loaded; one that only pages tell of cannot be used before.
    """

    def __init__(self) -> None:
        self._count = 0
        self._table: _Table | None = None
        self._by_name: dict[Any, tuple[Any, Sample]] = {}
        # Structures, and the same by their texts, which is what pages have of them.
        self._structures: dict[Any, Any] = {}
        self._described: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def named(self) -> int:
        """How many are not among those side by side."""
        return len(self._by_name)

    @property
    def structure(self) -> Any:
        """One of them; ``None`` where no sample was loaded yet."""
        return next(iter(self._structures), None)

    def get(self, index: Any) -> Sample | None:
        """What is remembered of a sample."""
        table = self._settled()
        found = table.get(index) if table is not None and type(index) is int and index >= 0 else None
        if found is None:
            _, found = self._by_name.get(name_of(index), (None, None))
        if found is None or isinstance(found.structure, tuple):
            return found
        known = self._described.get(found.structure)
        if known is None or (len(found.digests) // 16, len(found.values)) != small_values(known):
            return None
        return found._replace(structure=known)

    def block(self, indices: Sequence[int]) -> Block | None:
        """Several samples at once, where all are remembered and side by side."""
        table = self._settled()
        if table is None or type(table.structure) is str:
            return None
        return table.block([*indices])

    def _settled(self) -> _Table | None:
        """The samples side by side, with their structure itself where a text of it was read, and it is known by now."""
        table = self._table
        if table is not None and type(table.structure) is str:
            known = self._described.get(table.structure)
            if known is not None and table.fits(known):
                table.structure = known
        return table

    def keep(self, index: Any, sample: Sample) -> None:
        """Remember a sample."""
        if self._table is None and type(index) is int:
            self._table = _Table(sample)
        table = self._settled()
        if table is not None and type(index) is int and 0 <= index <= 2 * len(table) + 1_000_000:
            if table.takes(sample):
                self._count += table.put(index, sample)
                return
            self._count -= table.drop(index)
        name = name_of(index)
        self._count += name not in self._by_name
        self._by_name[name] = index, sample

    def with_known_structure(self, sample: Sample) -> Sample:
        """A sample that was loaded, with the object that stands for its structure."""
        known = self._structures.get(sample.structure)
        if known is None:
            known = self._structures[sample.structure] = sample.structure
            self._described[describe(known)] = known
        return sample._replace(structure=known)

    def some(self, count: int) -> list[Any]:
        """Indices of remembered samples, by chance."""
        known: list[Any] = self._table.known() if self._table is not None else []
        known += [index for index, _ in self._by_name.values()]
        return _random.sample(known, min(count, len(known)))

    def clear(self) -> None:
        """Forget all samples, and keep their structures."""
        self._count, self._table, self._by_name = 0, None, {}
