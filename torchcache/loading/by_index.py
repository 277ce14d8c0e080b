"""Samples by their indices, with one object for each structure."""

from __future__ import annotations

import random
from typing import Any

from torchcache.loading.samples import Sample, describe, name_of

__all__ = ["ByIndex"]

# Apart from the generators that training draws from.
_random = random.Random()


class ByIndex:
    """What is remembered of samples.

    Structures are known from samples that were loaded; one that only pages tell of cannot be used before.
    """

    def __init__(self) -> None:
        self._count = 0
        self._by_number: list[Sample | None] = []
        self._by_name: dict[Any, tuple[Any, Sample]] = {}
        # Structures, and the same by their texts, which is what pages have of them.
        self._structures: dict[Any, Any] = {}
        self._described: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def named(self) -> int:
        """How many have indices that are no small numbers."""
        return len(self._by_name)

    @property
    def structure(self) -> Any:
        """One of them; ``None`` where no sample was loaded yet."""
        return next(iter(self._structures), None)

    def get(self, index: Any) -> Sample | None:
        """What is remembered of a sample."""
        if type(index) is int and 0 <= index < len(self._by_number):
            found = self._by_number[index]
        else:
            _, found = self._by_name.get(name_of(index), (None, None))
        if found is None or isinstance(found.structure, tuple):
            return found
        known = self._described.get(found.structure)
        if known is None:
            return None
        found = found._replace(structure=known)
        self.keep(index, found)
        return found

    def keep(self, index: Any, sample: Sample) -> None:
        """Remember a sample."""
        if type(index) is not int or index < 0 or index > 2 * len(self._by_number) + 1_000_000:
            name = name_of(index)
            self._count += name not in self._by_name
            self._by_name[name] = index, sample
            return
        if index >= len(self._by_number):
            self._by_number.extend([None] * (index + 1 - len(self._by_number)))
        self._count += self._by_number[index] is None
        self._by_number[index] = sample

    def with_known_structure(self, sample: Sample) -> Sample:
        """A sample that was loaded, with the object that stands for its structure."""
        known = self._structures.get(sample.structure)
        if known is None:
            known = self._structures[sample.structure] = sample.structure
            self._described[describe(known)] = known
        return sample._replace(structure=known)

    def some(self, count: int) -> list[Any]:
        """Indices of remembered samples, by chance."""
        known = [index for index, sample in enumerate(self._by_number) if sample is not None]
        known += [index for index, _ in self._by_name.values()]
        return _random.sample(known, min(count, len(known)))

    def clear(self) -> None:
        """Forget all samples, and keep their structures."""
        self._count, self._by_number, self._by_name = 0, [], {}
