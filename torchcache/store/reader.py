"""The rows of a directory that cannot be written to: a read-only one, or one on a full disk."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from torchcache.store.blob_disk import BlobDisk
from torchcache.store.connections import Connected
from torchcache.store.gate import Connection, open_database

# The second takes no locks and leaves the log out: where SQLite cannot make the log's index, nothing else opens. What
# another process changes meanwhile may look damaged to it, which checksums tell.
_WAYS = ("ro", "ro&immutable=1")


class Reader(Connected):
    """As much of a ``diskcache.Cache`` as reading takes, one connection a thread and process.

    Parameters
    ----------
    rows : Path
        The directory of the database.
    timeout : float
        Seconds to wait for a lock.

    Raises
    ------
    StoreError, OSError
        It is not the store's.
    sqlite3.Error
        It cannot be read.
    """

    def __init__(self, rows: Path, timeout: float) -> None:
        super().__init__()
        self.directory = str(rows)
        self.disk = BlobDisk(self.directory)
        self._rows = rows
        self._timeout = timeout
        self._con  # noqa: B018 - opened at once

    def volume(self) -> int:
        """Bytes of the directory, as the size limit counts them."""
        size, pages = (self.fetch(f"PRAGMA {name}")[0][0] for name in ("page_size", "page_count"))
        return int(size * pages) + self.disk.volume()

    def _connect(self) -> Connection:
        *ways, last = _WAYS
        for way in ways:
            with contextlib.suppress(sqlite3.OperationalError):
                return open_database(self._rows, way, self._timeout)
        return open_database(self._rows, last, self._timeout)
