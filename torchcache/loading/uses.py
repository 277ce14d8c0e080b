"""What uses the leaves of samples: regions that look rows up, and code that reads the data."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

from torchcache.lazy.rows import Foresee

# So many batches in a row of which something other than a region read a tensor: it is loaded from then on.
READ_OFTEN = 3
# So many batches in a row that were read when it was too late to load them ahead: the rest of the pass is.
READ_LATE = 8
# A region that looked nothing up for so many batches is not asked any more.
LATE = 16


class Uses:
    """Counts batch by batch.

    Attributes
    ----------
    batches : int
        How many were taken.
    ahead : bool
        Whether batches are loaded ahead for the rest of the pass, since most of each is read.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.ahead = False
        self._routes: weakref.WeakKeyDictionary[Any, dict[int, tuple[Foresee, int]]] = weakref.WeakKeyDictionary()
        self._foreign: set[int] = set()
        self._streak: collections.Counter[int] = collections.Counter()
        self._read: collections.Counter[int] = collections.Counter()
        self._late: set[Hashable] = set()
        self._late_streak = 0

    def looked_up(self, owner: Any, leaf: int, foresee: Foresee) -> None:
        """Note that a region looks rows of ``leaf`` up, and how to tell whether it will find them."""
        self._routes.setdefault(owner, {})[leaf] = foresee, self.batches

    def foreseen(self) -> list[tuple[int, Foresee]]:
        """How to foresee what regions find that were called of late."""
        return [
            (leaf, foresee)
            for routes in list(self._routes.values())
            for leaf, (foresee, batches) in routes.items()
            if self.batches - batches < LATE
        ]

    def read(self, leaves: Iterable[int]) -> None:
        """Note that code which is no part of a region read data that had been left out."""
        self._foreign.update(leaves)

    def late(self, samples: Iterable[Hashable]) -> None:
        """Note that samples were loaded which had been left out."""
        self._late.update(samples)

    def taken(self, size: int) -> bool:
        """Note that a batch of ``size`` samples was used up; whether other code than regions reads every batch."""
        self.batches += 1
        self._read.update(self._foreign)
        self._streak = collections.Counter({leaf: self._streak[leaf] + 1 for leaf in self._foreign})
        # A model that is not cached any more reads every batch too; it may be cached again in the next pass.
        self._late_streak = self._late_streak + 1 if 2 * len(self._late) > size else 0
        self.ahead = self.ahead or self._late_streak >= READ_LATE
        self._foreign.clear()
        self._late.clear()
        return max(self._streak.values(), default=0) >= READ_OFTEN

    def describe(self, leaf: int) -> str:
        """Whether a leaf is loaded in later epochs, for people."""
        names = [getattr(owner, "name", "") for owner, routes in self._routes.items() if leaf in routes]
        how = f"not loaded where {', '.join(names)} finds its rows" if names else "loaded where something uses it"
        read = f"; other code read it in {self._read[leaf]:,} of {self.batches:,} batches" if self._read[leaf] else ""
        return how + read
