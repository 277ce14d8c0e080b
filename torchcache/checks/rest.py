"""When a region is not looked at: for a while, where its calls cannot be cached and a look costs much, or for good."""

from __future__ import annotations

from torchcache.errors import Bypass

# Calls that are computed without a look; more with every time.
SHORTEST, LONGEST = 32, 4096
# So many looks at what cannot be read come before it: a first call may set a module up.
MOST_UNREAD = 4


class Rest:
    """Raises, while it lasts, what began it."""

    def __init__(self) -> None:
        self.reason: Bypass | None = None
        self._left = 0
        self._next = SHORTEST
        self._unread = 0

    def check(self) -> None:
        """Count a call; raises the reason while it lasts."""
        if self.reason is None:
            return
        self._left -= 1
        if self._left:  # never zero where it was not positive: for good
            raise self.reason
        self.reason = None

    def begin(self, reason: Bypass) -> None:
        """Rest for a while, longer than the last time."""
        self.reason, self._left = reason, self._next
        self._next = min(2 * self._next, LONGEST)

    def begin_after_some(self, reason: Bypass) -> None:
        """Rest where this came several times."""
        self._unread += 1
        if not self._unread % MOST_UNREAD:
            self.begin(reason)

    def begin_for_good(self, reason: Bypass) -> None:
        """Rest from here on."""
        self.reason, self._left = reason, 0
