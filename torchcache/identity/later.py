"""Who computes what may not be there: the user's name for it, as long as it is what was built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torchcache.digest.cpu import digest_bytes
from torchcache.errors import Unreadable
from torchcache.identity.identity import Identity, Seen
from torchcache.identity.outside import Outside
from torchcache.identity.state import State
from torchcache.identity.steady import Steady


class There(Protocol):
    """What was built."""

    def now(self) -> bytes:
        """What it is now."""

    def is_as_built(self) -> bool:
        """Whether it is what was built."""


class LaterIdentity(Identity):
    """The identity of a marked call of what is built when it is needed.

    It is the user's name for it, and what is made of its output. Where what was built is no more what it was, that
    counts, too: the name says nothing of it.

    Parameters
    ----------
    subject : callable
        As for ``Identity``; asked while it is there.
    where : str
        Its path, for messages.
    name : callable
        The user's name for it, and for what was done to it.
    pure : bool
        As for ``Identity``.
    output : callable or None
        What is made of its output.
    there : callable
        What was built; ``None`` while it is not there.
    """

    def __init__(
        self,
        subject: Callable[[], Any],
        where: str,
        name: Callable[[], str],
        pure: bool,
        output: Callable[..., Any] | None,
        there: Callable[[], There | None],
    ) -> None:
        super().__init__(subject, where, None, pure)
        self._called, self._there = name, there
        self._output = Identity(lambda: output, where, None, pure) if output is not None else None
        self._last: There | None = None

    def there(self) -> There | None:
        """What was built; of one that was let go nothing is kept."""
        there = self._there()
        if there is not self._last:
            self._last, self._program, self._other, self._state = there, None, None, State()
        return there

    def look(self) -> Seen:
        """As it is now; what is made of its output alone while it is not there."""
        if self.there() is not None:
            return super().look()
        return Seen(self._output.look().tensors if self._output is not None else [])

    def of_classes(self, given: tuple[type, ...]) -> bytes:
        """Empty: the name says nothing of them, and what would take anything from them may not be there."""
        return b""

    def exchanges(self) -> Unreadable | None:
        """As for ``Identity``; ``None`` while it is not there."""
        return super().exchanges() if self.there() is not None else None

    def trains(self) -> bool:
        """Whether it reads anything that is trainable."""
        if self.there() is not None:
            return super().trains()
        return self._output is not None and self._output.trains()

    def named(self) -> bytes:
        """16 bytes for the user's name. Raises where what is made of its output has no identity."""
        output = self._output.current() if self._output is not None else b""
        return digest_bytes(b"later" + output + self._called().encode("utf-8", "surrogatepass"))

    def current(self, seen: Seen | None = None) -> bytes:
        """16 bytes that name what computes; raises as ``named``."""
        named, there = self.named(), self.there()
        return named if there is None or there.is_as_built() else digest_bytes(named + there.now())

    def steady(self) -> Steady:
        """What computes as it is now."""
        return super().steady() if self.there() is not None else Steady(self.look().tensors, True, None)

    def outside(self) -> Outside | None:
        """What it may write outside of itself."""
        return super().outside() if self.there() is not None else None

    def reads(self, objects: set[int], names: set[str]) -> bool:
        """As for ``Identity``; nothing while it is not there."""
        return self.there() is not None and super().reads(objects, names)
