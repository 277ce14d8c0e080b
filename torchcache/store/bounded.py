"""Connections to a server that may be slow, hung or hostile: no answer is waited for, or kept, beyond its limits."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection

# What the protocol adds to the values of an answer, and a greeting is long.
SLACK_BYTES = 64 * 1024


class Limits(threading.local):
    """What the calling thread grants a server: a time by which all is over, and bytes that it may send."""

    def __init__(self) -> None:
        self.end = math.inf
        self.left = math.inf
        self.overrun = False

    @contextlib.contextmanager
    def seconds(self, seconds: float) -> Iterator[None]:
        """So much time from this moment on, for all that is done meanwhile."""
        before = self.end
        self.end = min(before, time.monotonic() + seconds)
        try:
            yield
        finally:
            self.end = before

    @contextlib.contextmanager
    def bytes(self, count: int) -> Iterator[None]:
        """So many bytes, and some for the protocol."""
        self.left, self.overrun = count + SLACK_BYTES, False
        try:
            yield
        finally:
            self.left = math.inf

    def wait(self) -> float:
        """Seconds that are left; raises ``TimeoutError`` where none are."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("its time limit is over")
        return left

    def count(self, received: int) -> None:
        """Note bytes that came; raises ``OSError`` where they are too many."""
        self.left -= received
        if self.left < 0:
            self.overrun = True
            raise OSError("it sent more than was asked for")


class _Socket:
    """A socket within limits; all that neither sends nor receives is the socket's own."""

    def __init__(self, beneath: socket.socket, limits: Limits) -> None:
        self._beneath = beneath
        self._limits = limits
        self._timeout = beneath.gettimeout()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._beneath, name)

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds

    def recv(self, size: int) -> bytes:
        self._hurry()
        data = self._beneath.recv(size)
        self._limits.count(len(data))
        return data

    def recv_into(self, buffer: Any, *arguments: int) -> int:
        self._hurry()
        received = self._beneath.recv_into(buffer, *arguments)
        self._limits.count(received)
        return received

    def sendall(self, data: Any) -> None:
        self._hurry()
        self._beneath.sendall(data)

    def _hurry(self) -> None:
        left = self._limits.wait()
        seconds = left if self._timeout is None else min(self._timeout, left)
        self._beneath.settimeout(None if math.isinf(seconds) else seconds)


class _Bounded:
    """A connection of the client within limits, its sockets too; names are looked up within them as well."""

    def __init__(self, limits: Limits, **settings: Any) -> None:
        self._limits = limits
        super().__init__(**settings)

    def _connect(self) -> _Socket:
        left = self._limits.wait()
        return _Socket(_within(None if math.isinf(left) else left, super()._connect), self._limits)  # type: ignore[misc]


class _Plain(_Bounded, Connection):
    pass


class _Encrypted(_Bounded, SSLConnection):
    pass


class _Local(_Bounded, UnixDomainSocketConnection):
    pass


# By the scheme of a URL.
CONNECTIONS = {"redis": _Plain, "rediss": _Encrypted, "unix": _Local}


def _within(seconds: float | None, connect: Callable[[], socket.socket]) -> socket.socket:
    """What ``connect`` returns; it looks a name up, which has no time limit of its own."""
    made: list[socket.socket] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(connect())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="torchcache-connect", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not made:
        raise TimeoutError("no connection was made within its time limit")
    return made[0]
