"""How long a store that could not be used is left alone."""

from __future__ import annotations

import time

FIRST_SECONDS = 30.0
LONGEST_SECONDS = 1800.0


class Pause:
    """After a failure the store is not tried again for a while, which doubles with each failure in a row.

    What waits for a lock costs seconds: once is bearable, in every batch it is not.
    """

    def __init__(self) -> None:
        self._until = float("-inf")
        self._seconds = FIRST_SECONDS

    @property
    def over(self) -> bool:
        """Whether the store may be tried."""
        return time.monotonic() >= self._until

    def begin(self) -> None:
        """Leave the store alone from this moment on."""
        self._until = time.monotonic() + self._seconds
        self._seconds = min(2 * self._seconds, LONGEST_SECONDS)

    def end(self) -> None:
        """The store works again."""
        self._seconds = FIRST_SECONDS
