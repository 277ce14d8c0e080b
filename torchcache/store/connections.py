"""SQLite connections, one a thread and process, closed as soon as nobody can use them any more."""

from __future__ import annotations

import abc
import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from typing import Any

from torchcache.forks import without_forks
from torchcache.store.gate import Connection


class Connected(abc.ABC):
    """What asks a database by connections of its own.

    A connection is closed when its thread ends or its owner is gone, whichever comes first. Python's own connections
    would wait for the garbage collector: they are in a cycle with their cache of statements.
    """

    def __init__(self) -> None:
        self._connections = threading.local()

    @abc.abstractmethod
    def _connect(self) -> Connection:
        """Open a connection, without ``check_same_thread``."""

    @property
    def _con(self) -> Connection:
        """The connection of the calling thread."""
        held: _Held | None = getattr(self._connections, "held", None)
        if held is None or held.process != os.getpid():
            held = self._connections.held = _Held(self._connect())
        return held.connection

    def fetch(self, query: str, parameters: Any = (), most: int = 1000) -> list[Any]:
        """The first ``most`` rows of a query."""
        return self._con.fetch(query, parameters, most)

    def execute(self, query: str, parameters: Any = ()) -> sqlite3.Cursor:
        """Run a statement."""
        return self._con.execute(query, parameters)

    def close(self) -> None:
        """Close the connection of the calling thread."""
        self._connections.held = None


class _Held:
    """A connection that is closed when this object goes, by whichever thread lets it go."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.process = os.getpid()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():  # else the names that are used in here may be gone, and it is closed without
            self._close()

    @without_forks
    def _close(self) -> None:
        self.connection.close()
