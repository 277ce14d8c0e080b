"""A region's counters over time, in bounded memory and at a cost that no step notices."""

from __future__ import annotations

from typing import NamedTuple

from torchcache.counters import Counters

__all__ = ["History", "Point"]


class Point(NamedTuple):
    """The counters of a region after some call, all of them totals since the first.

    Parameters
    ----------
    calls : int
        Batches.
    memory_hits, disk_hits, remote_hits, misses, bypasses, unloaded : int
        Rows.
    hash_seconds, lookup_seconds, compute_seconds, merge_seconds, audit_seconds : float
        Where the time went.
    memory_bytes, disk_bytes : int
        Bytes in memory, and written to disk by this process.
    """

    calls: int
    memory_hits: int
    disk_hits: int
    remote_hits: int
    misses: int
    bypasses: int
    unloaded: int
    hash_seconds: float
    lookup_seconds: float
    compute_seconds: float
    merge_seconds: float
    audit_seconds: float
    memory_bytes: int
    disk_bytes: int

    @property
    def hits(self) -> int:
        """Rows served by any tier."""
        return self.memory_hits + self.disk_hits + self.remote_hits

    @property
    def rows(self) -> int:
        """Rows looked up."""
        return self.hits + self.misses

    @classmethod
    def of(cls, counters: Counters, memory_bytes: int, disk_bytes: int) -> Point:
        """The counters as they are now."""
        totals = vars(counters)
        return cls._make([*(totals[name] for name in cls._fields[:-2]), memory_bytes, disk_bytes])


class History:
    """Points at evenly spaced calls: every call at first, then every second, every fourth and so on.

    Points are totals, so leaving some out loses detail in time and nothing else.
    """

    LIMIT = 1024

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._every = 1
        self._until = 1

    def note(self, counters: Counters, memory_bytes: int, disk_bytes: int) -> None:
        """Take note of a call, if it is one of those that are kept."""
        self._until -= 1
        if self._until:
            return
        self._until = self._every
        self.points.append(Point.of(counters, memory_bytes, disk_bytes))
        if len(self.points) >= self.LIMIT:
            self.points = self.points[1::2]
            self._every *= 2
            self._until = self._every
