"""What one region did so far: rows, calls and seconds; and that over time, in bounded memory."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import NamedTuple

# Reasons that are told apart, and of those that differ in numbers alone.
MOST_REASONS, MOST_ALIKE = 64, 3
_NUMBERS = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


class Reasons(collections.Counter[str]):
    """Why rows were computed and not stored, and how many."""

    def note(self, reason: str, rows: int) -> bool:
        """Count rows; ``False`` where several reasons differ from it in numbers alone: they count as theirs."""
        told = reason in self
        if not told:
            kind = _NUMBERS.sub("0", reason)
            alike = [known for known in self if _NUMBERS.sub("0", known) == kind]
            told = len(alike) < MOST_ALIKE and len(self) < MOST_REASONS
            if not told:
                reason = alike[-1] if alike else "other reasons"
        self[reason] += rows
        return told


@dataclasses.dataclass
class Counters:
    """Totals since the region's first call.

    Parameters
    ----------
    memory_hits, disk_hits, remote_hits, misses, bypasses : int
        Rows served by memory (a repeat within a batch too), by disk, by a server or a tier of the user's own; computed
        and stored, computed only.
    unloaded : int
        Of the rows served, those whose samples no ``torchcache.DataLoader`` had loaded.
    calls : int
        Batches.
    alarms : int
        How often stored rows were found to be wrong, and dropped.
    largest_error : float or None
        The largest difference of what was served from what was computed again, as a share of the row's largest
        magnitude; ``None`` where rows are stored as they are, or none was computed again.
    hash_seconds, lookup_seconds, compute_seconds, merge_seconds, audit_seconds : float
        Where the time of those batches went.
    """

    memory_hits: int = 0
    disk_hits: int = 0
    remote_hits: int = 0
    misses: int = 0
    bypasses: int = 0
    unloaded: int = 0
    calls: int = 0
    alarms: int = 0
    largest_error: float | None = None
    hash_seconds: float = 0.0
    lookup_seconds: float = 0.0
    compute_seconds: float = 0.0
    merge_seconds: float = 0.0
    audit_seconds: float = 0.0

    def count(self, rows: int, computed: int, disk: int, others: int) -> None:
        """Count a batch that was looked up: rows computed, from disk and from others; memory had the rest."""
        self.calls += 1
        self.misses += computed
        self.disk_hits += disk
        self.remote_hits += others
        self.memory_hits += rows - computed - disk - others

    def note_error(self, share: float) -> None:
        """Take note of how far a row that was served is from what was computed again."""
        self.largest_error = max(share, self.largest_error or 0.0)

    def count_bypass(self, rows: int) -> None:
        """Count a batch that was computed and not stored."""
        self.calls += 1
        self.bypasses += rows

    @property
    def hits(self) -> int:
        """Rows served by any tier."""
        return self.memory_hits + self.disk_hits + self.remote_hits

    @property
    def saved_seconds(self) -> float | None:
        """Time that the hits would have taken in the original, less what lookups cost; ``None`` until measured."""
        if not self.misses or not self.compute_seconds:
            return None
        spent = self.hash_seconds + self.lookup_seconds + self.merge_seconds + self.audit_seconds
        return self.hits * self.compute_seconds / self.misses - spent


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
