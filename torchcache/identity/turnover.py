"""Identities that come and go: which to forget, and when they change too often for a cache."""

from __future__ import annotations

import weakref
from typing import Any

from torchcache.errors import Restless
from torchcache.quantity import names_text
from torchcache.store.in_use import KEPT

# New identities, while no row was served: more than settings that are tried one by one before any comes again.
USELESS = 8
# As many where there is another way to look the calls up; a first call may set a module up, which is a change.
UNSTEADY = 2


class Turnover:
    """The identities of one region, in the order of their last use.

    Parameters
    ----------
    subject : Subject
        What they are the identities of. It is not kept alive: what is said in the end of a run is said of this.

    Attributes
    ----------
    changes : int
        How often another one took over.
    unsteady : bool
        Whether a few new ones came in a row at some time, and no row was served meanwhile.
    """

    def __init__(self, subject: Any) -> None:
        self.changes = 0
        self.unsteady = False
        self._subject = weakref.ref(subject)
        self._names, self._told = "", False
        self._latest = b""
        # The last ones, and whether rows of theirs were served.
        self._known: dict[bytes, bool] = {}
        self._useless = 0
        self._hits = 0

    def what(self) -> str:
        """What changes, for people: the names that are told first are kept, so that it is told once."""
        self._told = bool(self._names)
        return f"its weights or its program{self._names}"

    def _note_names(self) -> None:
        subject = self._subject()
        names = names_text(subject.identity.changed) if subject is not None else ""
        if names and not self._told:
            self._names = f" ({names})"

    def note(self, who: bytes, hits: int) -> list[bytes]:
        """Take note of the identity of a call, with the hits so far; the identities to forget. ``check`` comes next."""
        if who == self._latest:
            return []
        if self._latest:
            self.changes += 1
            self._note_names()
            if hits > self._hits:
                self._useless, self._known[self._latest] = 0, True
            elif who not in self._known:  # what is switched to and fro finds its rows when it is back
                self._useless += 1
                self.unsteady |= self._useless >= UNSTEADY
        if self._useless >= USELESS:
            gone = [known for known, served in list(self._known.items()) if not served]
        else:
            self._latest, self._hits = who, hits
            self._known[who] = self._known.pop(who, False)
            gone = list(self._known)[:-KEPT]
        for old in gone:
            self._known.pop(old, None)  # another thread may have been as fast
        return gone

    def check(self) -> None:
        """Let the call go on.

        Raises
        ------
        Restless
            When many new identities came and none was of use.
        """
        if self._useless >= USELESS:
            # The first identity after a pause gets a call; the next one decides.
            self._useless, self._latest = USELESS - 1, b""
            raise Restless(
                f"{self.what()} change between calls, and no row was served meanwhile",
                "unmark what is updated in every step, such as an average of weights, or what reads it",
                lasting=False,
            )
