"""The rows of a directory that cannot be written to: a read-only one, or one on a full disk."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from torchcache.store.blob_disk import BlobDisk
from torchcache.store.connections import Connections
from torchcache.store.vet import DATABASE, vet_schema

__all__ = ["Reader"]

# The second takes no locks and leaves the log out: where SQLite cannot make the log's index, nothing else opens. What
# another process changes meanwhile may look damaged to it, which checksums tell.
_WAYS = ("mode=ro", "mode=ro&immutable=1")


class Reader:
    """As much of a ``diskcache.Cache`` as reading takes, one connection a thread and process.

    Parameters
    ----------
    rows : Path
        The directory of the database.
    timeout : float
        Seconds to wait for a lock.

    Raises
    ------
    ForeignDatabaseError
        It is not the store's.
    sqlite3.Error
        It cannot be read.
    """

    def __init__(self, rows: Path, timeout: float) -> None:
        self.disk = BlobDisk(str(rows))
        self._path = (rows / DATABASE).absolute()
        self._timeout = timeout
        self._connections = Connections()
        vet_schema(self._connection)

    def _sql(self, query: str, parameters: Any = ()) -> sqlite3.Cursor:
        return self._connection.execute(query, parameters)

    def volume(self) -> int:
        """Bytes of the directory, as diskcache counts them."""
        ((pages,),), ((size,),) = self._sql("PRAGMA page_count"), self._sql("PRAGMA page_size")
        ((files,),) = self._sql("SELECT value FROM Settings WHERE key = 'size'")
        return int(pages) * int(size) + int(files)

    def close(self) -> None:
        """Close this thread's connection."""
        self._connections.close()

    @property
    def _connection(self) -> sqlite3.Connection:
        return self._connections.get(self._connect)

    def _connect(self) -> sqlite3.Connection:
        *ways, last = _WAYS
        for way in ways:
            with contextlib.suppress(sqlite3.OperationalError):
                return self._open(way)
        return self._open(last)

    def _open(self, way: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?{way}", self._timeout, isolation_level=None, check_same_thread=False, uri=True
        )
        try:
            connection.execute("SELECT 1 FROM Cache LIMIT 1")
        except BaseException:
            connection.close()
            raise
        return connection
