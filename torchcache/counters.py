"""What one region did so far: rows, calls and seconds."""

from __future__ import annotations

import collections
import dataclasses
import re

__all__ = ["Counters", "Reasons"]

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
