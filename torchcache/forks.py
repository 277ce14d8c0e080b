"""What a child of a fork must not inherit: locks that were taken by threads of its parent's, which nobody opens.

Forks wait until no other thread is at work in the store; what cannot be waited for is left behind by ``generation``.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

# Longer than the store waits for any lock.
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.001

P = ParamSpec("P")
T = TypeVar("T")


class _Visit:
    """One call that no fork may fall into."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class _Gate:
    """Any number of calls at once, or a fork.

    An interrupt may come between any two steps of the thread that trains, and what it leaves locked stays locked: so
    there is no lock here, only single operations on a set.
    """

    def __init__(self) -> None:
        self._inside: set[_Visit] = set()
        self._forking: set[int] = set()

    def enter(self, visit: _Visit) -> None:
        """Go in, once no other thread forks."""
        self._inside.add(visit)
        while self._forking and visit.thread not in self._forking and not self._of_this_thread() - {visit}:
            self._inside.discard(visit)
            time.sleep(POLL_SECONDS)
            self._inside.add(visit)

    def leave(self, visit: _Visit) -> None:
        """Go out, if it came that far."""
        self._inside.discard(visit)

    def close(self) -> None:
        """Let nobody in, and wait until no other thread is inside."""
        self._forking.add(threading.get_ident())
        end = time.monotonic() + WAIT_SECONDS
        while set(self._inside) - self._of_this_thread() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def open(self) -> None:
        """Let the others in."""
        self._forking.discard(threading.get_ident())

    def open_in_child(self) -> None:
        """Start anew where the other threads are gone."""
        self._inside = self._of_this_thread()
        self._forking = set()

    def _of_this_thread(self) -> set[_Visit]:
        me = threading.get_ident()
        return {visit for visit in set(self._inside) if visit.thread == me}


# How many forks lie between this process and the first of its line.
generation = 0


def _begin_generation() -> None:
    global generation
    generation += 1
    _gate.open_in_child()


_gate = _Gate()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_gate.close, after_in_parent=_gate.open, after_in_child=_begin_generation)


def without_forks(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, during which no other thread forks."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        visit = _Visit()
        try:
            _gate.enter(visit)
            return function(*args, **kwargs)
        finally:
            _gate.leave(visit)

    return guarded
