"""The audit: rows that were served are computed again in other company, within a share of the run's time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

# The first calls of a form are looked at whatever it costs, and those with more rows: most mistakes show at once.
FIRST_CALLS = 4
MOST_FORMS = 1024
# Rows that are computed again at a time.
ROWS = 2
# Rows that are served first are all computed again, for so many batches: they come to other places than where they were
# computed, and one that depends on its place may be any. Not for more contents of shared arguments than these.
FIRST_SERVED = 2
MOST_SHARED = 16
# Rows that are looked at in one call.
MOST_ROWS = 256
# Apart from the generator that training draws from.
_random = random.Random()


class Schedule:
    """When to compute rows again: in first and larger calls of each form, and then as often as a share of time allows.

    Parameters
    ----------
    share : float
        Share of the wall time since the first call that audits may take; 0 turns them off.
    lacking : callable, optional
        Whether there is nothing yet to compute rows again with: what is served meanwhile is not looked at.
    """

    def __init__(self, share: float, lacking: Callable[[], bool] = bool) -> None:
        self._share = share
        self._lacking = lacking
        self._began = time.perf_counter()
        self._spent = 0.0
        self._cost = 0.0
        self._next = 0.0
        self._looked: dict[bytes, tuple[int, int]] = {}
        self._served: dict[bytes, dict[bytes, tuple[int, int, int]]] = {}

    def served(self, form: bytes, shared: bytes, rows: int, hits: int) -> int | None:
        """How many computed rows to look at beside all that this call of ``form`` was served, which count as looked at.

        ``None`` where enough were. Of the first calls that were served in part it is all: what they lacked was computed
        in other places, too.

        Parameters
        ----------
        form : bytes
            Who computes, and structure and constants of the arguments.
        shared : bytes
            The contents of the arguments that all rows share.
        rows, hits : int
            How many rows the call has, and how many of them were served.
        """
        if not (self._share and hits) or self._lacking():
            return None
        if form not in self._served and len(self._served) >= MOST_FORMS:
            self._served.clear()
        kinds = self._served.setdefault(form, {})
        looked = kinds.get(shared)
        if looked is None and len(kinds) >= MOST_SHARED:
            return None
        count, most, mixed = looked or (0, 0, 0)
        most = max(most, rows)
        if count >= FIRST_SERVED * most:
            return None
        kinds[shared] = count + hits, most, mixed + (hits < rows)
        return rows if mixed < FIRST_SERVED else hits

    def first(self, form: bytes, shared: bytes, rows: int) -> bool:
        """Whether all that a call of so many rows is served next will be looked at."""
        count, most, _ = self._served.get(form, {}).get(shared, (0, 0, 0))
        return bool(self._share) and count < FIRST_SERVED * max(most, rows) and not self._lacking()

    def forget(self) -> None:
        """Look at what is served anew: all rows were dropped."""
        self._served.clear()

    def due(self, form: bytes, rows: int) -> bool:
        """Whether this call of ``form`` is to be looked at."""
        if not self._share or self._lacking():
            return False
        return self.early(form, rows) or time.perf_counter() >= self._next

    def early(self, form: bytes, rows: int) -> bool:
        """Whether this is one of the first calls of ``form``, or has more rows than any that was looked at."""
        calls, most = self._looked.get(form, (0, 0))
        return calls < FIRST_CALLS or rows > most

    def note(self, form: bytes, rows: int, seconds: float) -> None:
        """Take note of what an audit took; what early ones took is not deducted."""
        self._cost = min(seconds, 2 * self._cost) if self._cost else seconds
        if self.early(form, rows):
            if len(self._looked) >= MOST_FORMS:
                self._looked.clear()
            calls, most = self._looked.get(form, (0, 0))
            self._looked[form] = calls + 1, max(most, rows)
        else:
            self._spent += seconds
        if self._share:
            self._next = self._began + (self._spent + self._cost) / self._share


def choose(hits: Sequence[int], misses: Sequence[int], *, ends: bool, beside: int | None) -> list[int]:
    """Places of rows to compute together, in their order: hits beside misses where there are both.

    Every hit and so many misses ``beside`` them, shuffled; for ``None`` two rows, the ends of the batch or any.
    """
    if beside is not None:
        return _any([*hits, *misses[:beside]], MOST_ROWS)
    pick = _ends if ends else _any
    if hits and misses:
        return [*pick(hits, 1), *pick(misses, 1)]
    return pick(hits or misses, ROWS)


def _ends(places: Sequence[int], count: int) -> list[int]:
    return [places[-1]] if count == 1 or len(places) == 1 else [places[0], places[-1]]


def _any(places: Sequence[int], count: int) -> list[int]:
    return _random.sample(places, min(count, len(places)))
