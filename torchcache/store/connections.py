"""SQLite connections, one a thread and process, closed as soon as nobody can use them any more."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from torchcache.forks import without_forks
from torchcache.store.gate import Connection

__all__ = ["Connections"]


class Connections:
    """The connections of one owner to its database.

    A connection is closed when its thread ends or its owner is gone, whichever comes first. Python's own connections
    would wait for the garbage collector: they are in a cycle with their cache of statements.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, connect: Callable[[], Connection]) -> Connection:
        """The connection of the calling thread; ``connect`` opens it, without ``check_same_thread``."""
        held: _Held | None = getattr(self._local, "held", None)
        if held is None or held.process != os.getpid():
            held = self._local.held = _Held(connect())
        return held.connection

    def close(self) -> None:
        """Close the connection of the calling thread."""
        self._local.held = None


class _Held:
    """A connection that is closed when this object goes, by whichever thread lets it go."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.process = os.getpid()

    @without_forks
    def __del__(self) -> None:
        self.connection.close()
