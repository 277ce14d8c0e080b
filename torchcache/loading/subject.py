"""Which data set it is: what its code reads, or the user's name for it, and whether that is still so."""

from __future__ import annotations

import time
from typing import Any

from torchcache.errors import Bypass
from torchcache.identity.program import Program
from torchcache.identity.state import State
from torchcache.quantity import names_text

# A comparison that takes more seconds than this, as one of a list of a million files does, is made within this share of
# the time. Others are made whenever somebody asks.
LONG = 0.005
MOST_TIME = 0.02
# Users write to arrays of a data set between two passes. As one begins, so many bytes are hashed again, and more within
# the same share of the time since the last one; so many take a second at most.
WHOLE = 1 << 30
PER_SECOND = 2e9


class Subject:
    """A data set by its code, attributes and tensors.

    Parameters
    ----------
    dataset : Dataset
        The user's.
    name : str or None
        The user's name for it, which stands for all that its code reads.

    Attributes
    ----------
    who : bytes
        Differs for data sets that differ; empty where there is a problem.
    problem : str
        Why it has no identity; empty where it has one.
    at_once : bool
        Whether it loads a batch at once.
    """

    def __init__(self, dataset: Any, name: str | None) -> None:
        self._dataset, self._name = dataset, name
        self.at_once = hasattr(dataset, "__getitems__")
        self._program: Program | None = None
        self._state = State()
        self._took = self._looked_at = 0.0
        self._began = time.perf_counter()
        self.who, self.problem = self._read()

    def _read(self) -> tuple[bytes, str]:
        if self._name is not None:
            return self._name.encode(), ""
        program = Program(self._dataset.__getitems__ if self.at_once else self._dataset.__getitem__, "the data set")
        self._program = program
        try:
            return (
                (b"", program.problem)
                if program.problem
                else (program.digest + self._state.update(program.tensors), "")
            )
        except Bypass as bypass:
            return b"", bypass.reason

    def changes(self, begins: bool = False) -> str:
        """What makes it another data set than before, for people; empty where it is the same.

        ``begins`` says that a pass does: then its tensors are hashed again, and not only looked at here and there.
        """
        if self._holds_whole() if begins else self.holds():
            return ""
        assert self._program is not None
        names, before = self._program.changes(), self.who
        self.who, self.problem = self._read()
        return "" if self.who == before else names_text(names) or "its tensors"

    def holds(self) -> bool:
        """Whether nothing that its code reads moved."""
        program = self._program
        try:
            return program is None or (program.unchanged() and self._state.unchanged(program.tensors))
        except Bypass:
            return False

    def _holds_whole(self) -> bool:
        since, self._began = time.perf_counter() - self._began, time.perf_counter()
        most = max(WHOLE, MOST_TIME * since * PER_SECOND)
        program = self._program
        try:
            return program is None or (program.unchanged() and self._state.unchanged_whole(program.tensors, most))
        except Bypass:
            return False

    def seems_to_hold(self) -> bool:
        """The same, at a cost that every batch can bear."""
        start = time.perf_counter()
        if self._took > LONG and self._took > MOST_TIME * (start - self._looked_at):
            return True
        holds = self.holds()
        self._looked_at = time.perf_counter()
        self._took = self._looked_at - start
        return holds
