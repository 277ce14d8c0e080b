"""Forks wait until no other thread is at work in the store: a child would inherit locks that nobody opens."""

from __future__ import annotations

import collections
import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["Lock", "no_fork", "without_forks"]

# Longer than the store waits for any lock.
WAIT_SECONDS = 60.0

P = ParamSpec("P")
T = TypeVar("T")


class _Gate:
    """Any number of threads at once, a fork alone; a thread inside may enter again, and may fork."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: collections.Counter[int] = collections.Counter()

    def __enter__(self) -> None:
        with self._changed:  # which a fork holds
            self._inside[threading.get_ident()] += 1

    def __exit__(self, *error: object) -> None:
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                self._changed.notify_all()

    def close(self) -> None:
        """Wait until only this thread is inside, and let nobody in."""
        self._changed.acquire()
        self._changed.wait_for(lambda: not self._inside.keys() - {threading.get_ident()}, WAIT_SECONDS)

    def open(self) -> None:
        """Let the others in."""
        self._changed.release()

    def open_in_child(self) -> None:
        """Start anew where the other threads are gone."""
        me = threading.get_ident()
        self._changed = threading.Condition()
        self._inside = collections.Counter({me: self._inside[me]} if me in self._inside else {})


no_fork = _Gate()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=no_fork.close, after_in_parent=no_fork.open, after_in_child=no_fork.open_in_child)


def without_forks(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, during which no other thread forks."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        with no_fork:
            return function(*args, **kwargs)

    return guarded


class Lock:
    """A lock that no fork finds locked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        no_fork.__enter__()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        no_fork.__exit__()
