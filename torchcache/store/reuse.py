"""How long rows take to be asked for again, and so which rows of a full memory tier are of no more use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Entries of the table of rows that there was no room for: one per so many bytes of the budget, within bounds.
BYTES_PER_ENTRY = 512
FEWEST, MOST = 1 << 14, 1 << 20
# Rows idle for so many times the longest usual interval are of no more use.
PATIENCE = 1.5
# What the longest interval counts for after each shorter one.
FORGETTING = 0.99


class Reuse:
    """A clock that counts lookups, and the interval within which rows usually return.

    Whatever it says decides which rows are kept, never what a row holds, so threads use it without a lock.

    Parameters
    ----------
    budget : int
        Bytes of the memory tier.

    Attributes
    ----------
    clock : int
        Lookups so far.
    full : bool
        Whether there was no room for a row yet; nothing is noted before.
    """

    def __init__(self, budget: int) -> None:
        self.clock = 0
        self.full = False
        self._interval: float | None = None
        self._entries = 1 << (min(max(budget // BYTES_PER_ENTRY, FEWEST), MOST).bit_length() - 1)
        # For each place the latest row that hashes to it and was refused, and when that was.
        self._rows = self._times = np.empty(0, np.int64)

    def note(self, last: int) -> None:
        """A row was asked for that was last seen at ``last``."""
        interval = self.clock - last
        if interval <= 0:
            return
        known = self._interval
        self._interval = float(interval) if known is None else max(interval, FORGETTING * known)

    def returning(self, fingerprint: bytes, digests: Sequence[bytes]) -> list[int]:
        """Places of those rows that were refused before; all of them are remembered."""
        if not len(self._rows):
            self._times = np.zeros(self._entries, np.int64)
            self._rows = np.zeros(self._entries, np.int64)
        hashes = np.fromiter(map(hash, digests), np.int64, len(digests)) ^ hash(fingerprint)
        places = hashes & (self._entries - 1)
        known = np.flatnonzero((self._rows[places] == hashes) & (self._times[places] > 0))
        if len(known):
            self.note(int(self._times[places[known[0]]]))
        self._rows[places] = hashes
        self._times[places] = self.clock
        return [int(place) for place in known]

    def deadline(self) -> float | None:
        """Rows last served before that are of no more use; ``None`` while no row returned yet."""
        return None if self._interval is None else self.clock - PATIENCE * self._interval
