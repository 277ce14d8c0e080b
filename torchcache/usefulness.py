"""Whether what is stored is of use: said while a region runs without a hit, and once when the process ends."""

from __future__ import annotations

import atexit
import collections
import os
import weakref
from typing import Any

from torch import nn

from torchcache.checks.novelty import Novelty
from torchcache.context import ASKED
from torchcache.counters import Counters
from torchcache.identity.turnover import Turnover
from torchcache.logging import logger

# Calls after which a region without a hit is told of; then four times as many, and so on.
FIRST_LOOK = 8
# A region that was called less often is not judged.
FEWEST_CALLS = 4
# Identities in one run that make changing weights the likely reason.
MANY_CHANGES = 3
# Regions and marks that the last warning names.
MOST_NAMED = 8


class Usefulness:
    """Whether the rows of one region are asked for again.

    Parameters
    ----------
    region : Region
        The region, which is judged when it is gone, or at the end of the process.
    turnover : Turnover
        Its identities.
    novelty : Novelty
        Which of its arguments are new in every call.

    Attributes
    ----------
    next_look : int
        The number of calls from which on ``look`` is to be called again.
    rows : int
        Rows of the last batch.
    """

    def __init__(self, region: Any, turnover: Turnover, novelty: Novelty) -> None:
        self.next_look = 0
        self.rows = 0
        self._sizes: collections.Counter[int] = collections.Counter()
        self._name: str = region.name
        self._counters: Counters = region.counters
        # Of all regions of one mark: where one serves, no other is of no use.
        self._family: list[Counters] = region.family
        self._reasons: collections.Counter[str] = region.reasons
        self._persistent = bool(region.tiers.beneath)
        self._turnover = turnover
        self._novelty = novelty
        _running.add(self)
        weakref.finalize(region, _conclude, self).atexit = False

    def note_rows(self, rows: int) -> None:
        """Take note of a batch with another number of rows than the one before."""
        self.rows = rows
        if rows in self._sizes or len(self._sizes) <= 2:
            self._sizes[rows] += 1

    def look(self, name: str) -> None:
        """Say at INFO that nothing was served so far, if so; ``name`` is the region's by now."""
        self._name = name
        self.next_look = max(FIRST_LOOK, 4 * self.next_look)
        if self._counters.calls and not self._counters.hits and self._rows():
            logger.info("%s so far. %s", self._account(), self._likely(running=True))

    def verdict(self) -> str | None:
        """What to say at the end of the run of a region that served nothing; ``None`` where there is nothing to say."""
        counters = self._counters
        if counters.calls < FEWEST_CALLS or not self._rows() or any(other.hits for other in self._family):
            return None
        if self._persistent and not self._bypassed() and not self._changes() and not self._returned():
            return None  # a first pass over the data fills the directory
        return f"{self._account()}. {self._likely(running=False)}"

    def _rows(self) -> int:
        """Rows that were to be cached."""
        return self._counters.misses + self._bypassed()

    def _bypassed(self) -> int:
        return sum(rows for reason, rows in self._reasons.items() if reason != ASKED)

    def _changes(self) -> bool:
        return self._turnover.changes >= MANY_CHANGES

    def _returned(self) -> bool:
        """Whether batches came in two sizes by turns, such as those of an epoch and the rest at its end."""
        return len(self._sizes) == 2 and min(self._sizes.values()) > 1

    def _account(self) -> str:
        counters, bypassed = self._counters, self._bypassed()
        computed = f", {bypassed:,} computed without being stored" if bypassed else ""
        return f"{self._name}: {counters.misses:,} rows stored in {counters.calls:,} calls{computed}, none served"

    def _likely(self, *, running: bool) -> str:
        bypassed = self._bypassed()
        if bypassed > self._counters.misses:
            reason = next(reason for reason, _ in self._reasons.most_common() if reason != ASKED)
            return f"Most of its rows are not cached, because {reason}"
        if self._changes():
            return (
                f"No row outlives a change, and {self._turnover.what()} changed {self._turnover.changes} times: "
                "unmark what is updated while it is used, or what reads it"
            )
        if self._novelty.calls >= FIRST_LOOK:
            return (
                f"Its argument {self._novelty.varying} is new in every call and part of every key: leave it out of the "
                "call, or pass it as a tensor with a row for each sample"
            )
        differ = (
            "its inputs differ in every epoch, for instance by random augmentation: augment what comes after it, or "
            "draw from a few fixed variants of each sample"
        )
        if running:
            return f"That is normal in the first pass over the data; if this is a later one, {differ}"
        if self._persistent:
            return f"Likely {differ}"
        return f"Likely {differ}. If the run saw each sample once only, persistent=True keeps the rows for the next run"


_running: set[Usefulness] = set()
_verdicts: list[str] = []
_marks: dict[tuple[str, str], str] = {}
_process = os.getpid()
_called = False


def note_mark(module: nn.Module, method: str, path: str = "") -> None:
    """Take note of a mark that waits to be called; ``path`` is the module's in the user's model."""
    kind = type(module).__name__
    if len(_marks) < MOST_NAMED:
        _marks[kind, method] = f"{path or kind}.{method}"


def forget_mark(module: nn.Module, method: str) -> None:
    """Take note that a mark was taken off."""
    _marks.pop((type(module).__name__, method), None)


def note_call() -> None:
    """Take note that a marked call was made, or that a marked module went elsewhere to be called."""
    global _called
    _called = True


def _conclude(usefulness: Usefulness) -> None:
    _running.discard(usefulness)
    verdict = usefulness.verdict()
    if verdict is not None and len(_verdicts) < MOST_NAMED:
        _verdicts.append(verdict)


def tell() -> None:
    """Say in one warning what was of no use in this process, and why that is likely."""
    if os.getpid() != _process:  # a fork has its parent's counters
        return
    for usefulness in list(_running):
        _conclude(usefulness)
    told = list(dict.fromkeys(_verdicts))
    _verdicts.clear()
    if _marks and not _called:
        names = ", ".join(_marks.values())
        told.append(
            f"{names}: marked, but never called in this process. If another method is called instead of it, mark that "
            "one: torchcache.mark(module, method='encode_image'). torchcache.explain(model, batch) shows what is called"
        )
    if told and not any(getattr(getattr(handler, "stream", None), "closed", False) for handler in logger.handlers):
        logger.warning("no row was served in this run: %s", "; ".join(told))


atexit.register(tell)
