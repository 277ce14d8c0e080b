"""Who computes what may not be there yet: the user's name for it, as long as it is what was built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchcache.digest.cpu import digest_bytes
from torchcache.errors import Unreadable
from torchcache.identity.identity import Identity, Seen
from torchcache.identity.outside import Outside
from torchcache.identity.steady import Steady

__all__ = ["LaterIdentity"]


class LaterIdentity(Identity):
    """The identity of a marked call of what is built when it is needed first.

    It is the user's name for it, and what is made of its output. Once it is built and what it is then changes, that
    counts, too: the name says nothing of it.

    Parameters
    ----------
    subject : callable
        As for ``Identity``; asked once it is built.
    where : str
        Its path, for messages.
    name : callable
        The user's name for it, and for what was done to it.
    pure : bool
        As for ``Identity``.
    output : callable or None
        What is made of its output.
    built : callable
        Whether it is there.
    """

    def __init__(
        self,
        subject: Callable[[], Any],
        where: str,
        name: Callable[[], str],
        pure: bool,
        output: Callable[..., Any] | None,
        built: Callable[[], bool],
    ) -> None:
        super().__init__(subject, where, None, pure)
        self._called, self._built = name, built
        self._output = Identity(lambda: output, where, None, pure) if output is not None else None
        self._as_built: bytes | None = None

    def look(self) -> Seen:
        """As it is now; nothing before it is built."""
        return super().look() if self._built() else Seen([])

    def trains(self) -> bool:
        """Whether it reads anything that is trainable; what is built is frozen."""
        return self._built() and super().trains()

    def current(self, seen: Seen | None = None) -> bytes:
        """16 bytes that name what computes. Raises where what is made of its output has no identity."""
        output = self._output.current() if self._output is not None else b""
        named = digest_bytes(b"later" + output + self._called().encode("utf-8", "surrogatepass"))
        if not self._built():
            return named
        try:
            now = super().current(seen if seen is not None and seen.program is not None else None)
        except Unreadable:  # as where the user names what else is read
            return named
        if self._as_built is None:
            self._as_built = now
        return named if now == self._as_built else digest_bytes(named + now)

    def settle(self) -> None:
        """Take what it is from now on for what was built: its first call may have set it up."""
        self._as_built = None

    def steady(self) -> Steady:
        """What computes as it is now."""
        return super().steady() if self._built() else Steady([], True, None)

    def outside(self) -> Outside | None:
        """What it may write outside of itself."""
        return super().outside() if self._built() else None

    def reads(self, objects: set[int], names: set[str]) -> bool:
        """As for ``Identity``; nothing before it is built."""
        return self._built() and super().reads(objects, names)
