"""Every open of what lies in a cache directory, whoever put it there: files, and the database.

A file is opened where it is, regular and no link, and read up to a length. The database is opened when its names have
been looked at: SQLite follows links, waits for pipes, reads all of a log, and deletes any file that a rollback journal
names. Before any other statement its schema must be the store's, to the letter, and every query has a budget.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchcache.errors import StoreDamagedError, StoreError
from torchcache.quantity import size_text
from torchcache.store.access import OWNER, allowed

DATABASE = "cache.db"
LOG = f"{DATABASE}-wal"
SIDES = (LOG, f"{DATABASE}-shm")
# The store's database has a write-ahead log from its first moment on, so that there never is such a journal.
JOURNAL = f"{DATABASE}-journal"

# What diskcache creates, as SQLite keeps it.
SCHEMA = (
    "CREATE TABLE Settings ( key TEXT NOT NULL UNIQUE, value)",
    "CREATE TABLE Cache ( rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, store_time REAL, expire_time REAL,"
    " access_time REAL, access_count INTEGER DEFAULT 0, tag BLOB, size INTEGER DEFAULT 0, mode INTEGER DEFAULT 0,"
    " filename TEXT, value BLOB)",
    "CREATE UNIQUE INDEX Cache_key_raw ON Cache(key, raw)",
    "CREATE INDEX Cache_expire_time ON Cache (expire_time)",
    "CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache FOR EACH ROW BEGIN"
    ' UPDATE Settings SET value = value + 1 WHERE key = "count"; END',
    "CREATE TRIGGER Settings_count_delete AFTER DELETE ON Cache FOR EACH ROW BEGIN"
    ' UPDATE Settings SET value = value - 1 WHERE key = "count"; END',
    "CREATE TRIGGER Settings_size_insert AFTER INSERT ON Cache FOR EACH ROW BEGIN"
    ' UPDATE Settings SET value = value + NEW.size WHERE key = "size"; END',
    "CREATE TRIGGER Settings_size_update AFTER UPDATE ON Cache FOR EACH ROW BEGIN"
    ' UPDATE Settings SET value = value + NEW.size - OLD.size WHERE key = "size"; END',
    "CREATE TRIGGER Settings_size_delete AFTER DELETE ON Cache FOR EACH ROW BEGIN"
    ' UPDATE Settings SET value = value - OLD.size WHERE key = "size"; END',
)
_OBJECTS = {*SCHEMA, None}  # the index that makes keys of Settings unique has no text
# As with a disk tier's own settings, whatever the database says.
_PRAGMAS = (
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "mmap_size = 0",  # a mapped file that another process cuts short would kill this one
    "cache_size = 8192",
    "synchronous = NORMAL",
)

# Processor time of one query: so much, and so much more for what the database holds. Waiting for a lock or a slow disk
# costs none, pages that name each other do.
BUDGET_SECONDS = 0.5
BUDGET_BYTES_PER_SECOND = 10_000_000
_STEPS = 1000
# Of a log, beyond the bytes of its database: SQLite reads all of it while it opens the database, where no budget
# applies, and small pages of it take half a second of processor time. An honest log is put into the database from 16 MB
# on. Long reads keep it from that, so writers write no more once it has half of this (``Rows.fold``); the rest is room
# for those who have begun. Only ``VACUUM`` writes more, a copy of the database.
LONGEST_LOG = 128_000_000
# Larger values are files; no text of the store is longer than a schema's.
LONGEST_VALUE = 1024 * 1024
LONGEST_TEXT = 4096

_READ_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
    _READ_FLAGS |= getattr(os, _name, 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class ForeignDatabaseError(StoreDamagedError):
    """A database that is not the store's, or files that are none."""


class LongLogError(StoreDamagedError):
    """A log that is too long to be read on opening; somebody may be about to put it into the database."""


def open_regular(path: str | Path, *, follow: bool = False) -> int:
    """A descriptor to read a regular file; pipes and devices are not waited for, links are followed on request alone.

    Raises
    ------
    OSError
        It cannot be opened, or is of another kind.
    """
    descriptor = os.open(path, _READ_FLAGS | (0 if follow else _NO_LINK))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{Path(path).name} is no regular file")
    return descriptor


def read_file(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file; raises ``OSError`` for more than ``most``, a link, or another kind of file."""
    with open(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"{Path(path).name} is longer than {most} bytes")
    return data


def is_log_long(rows: Path) -> bool:
    """Whether the log of a database should be put into it before anything is written."""
    return _log_bytes(rows) > LONGEST_LOG // 2


def check_names(rows: Path, *, own: bool = False, any_log: bool = False) -> None:
    """Look at the names that SQLite opens, before it does.

    Parameters
    ----------
    rows : Path
        The directory of the database, which may be missing.
    own : bool
        Take the permissions of those away whom the cache directory is not for: what SQLite makes beside a database has
        the mode of the database.
    any_log : bool
        Take a log of any length.

    Raises
    ------
    StoreError
        ``rows`` is a link, or no directory.
    ForeignDatabaseError
        A name in it is a link, hard or not, of another kind, or not the store's.
    LongLogError
        The log is longer than the store leaves it.
    OSError
        Permissions cannot be set.
    """
    found = _look(rows)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(f"{rows} is a link or no directory, and not followed: remove it, or choose another directory")
    if own:
        _close_to_others(rows, found.st_mode, rows.parent)
    for name in (DATABASE, *SIDES, JOURNAL):
        path = rows / name
        found = _look(path)
        if found is None:
            continue
        # What has another name as well, elsewhere, would be written there.
        if name == JOURNAL or not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise ForeignDatabaseError(f"{path} is not the store's: torchcache clear makes it a new, empty directory")
        if own:
            _close_to_others(path, found.st_mode, rows.parent)
    length, longest = _log_bytes(rows), LONGEST_LOG + _bytes_on_disk(rows / DATABASE)
    if not any_log and length > longest:
        raise LongLogError(
            f"{rows / LOG} has {size_text(length)}, more than {size_text(longest)}: "
            "torchcache verify --long-log reads it if you trust it; torchcache clear makes the directory empty"
        )


def open_database(rows: Path, mode: str, timeout: float, *, any_log: bool = False) -> Connection:
    """Open the database in ``rows``; nothing in it is used before all of its schema is known to be the store's.

    Parameters
    ----------
    rows : Path
        Its directory.
    mode : {"rw", "ro", "ro&immutable=1"}
        Of SQLite. The last takes no locks and leaves the log out.
    timeout : float
        Seconds to wait for a lock.
    any_log : bool
        Take a log of any length.

    Raises
    ------
    StoreError, OSError
        As ``check_names`` does.
    ForeignDatabaseError
        It holds anything but what diskcache puts there.
    sqlite3.Error
        It cannot be read, or stays locked.
    """
    check_names(rows, own=mode == "rw", any_log=any_log)
    path = (rows / DATABASE).absolute()
    uri = path.as_uri()
    connection: Connection = sqlite3.connect(
        f"{uri}?mode={mode}", timeout, isolation_level=None, check_same_thread=False, uri=True, factory=Connection
    )
    try:
        connection.restrict(path)
        logged = connection.fetch("PRAGMA journal_mode") == [("wal",)]
        if schema_of(connection) != _OBJECTS or not (logged or "immutable" in mode):
            raise ForeignDatabaseError(f"{path} has another schema: torchcache clear makes it a new, empty directory")
    except BaseException:
        _refuse(connection, f"{uri}?mode=ro")
        raise
    return connection


def _refuse(connection: sqlite3.Connection, uri: str) -> None:
    """Close a connection, and leave the log as it is: who closes last, and may write, puts it into the database."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(uri, 0.0, uri=True)) as last:
        with contextlib.suppress(sqlite3.Error):
            last.execute("PRAGMA schema_version")  # from now on it has the log open
        connection.close()
    connection.close()


def schema_of(connection: Connection) -> set[str | None]:
    """The texts of a schema; of more than the store's, or longer ones, a part that differs."""
    most = len(_OBJECTS)
    found = connection.fetch(
        f"SELECT substr(sql, 1, {LONGEST_TEXT}) FROM sqlite_master LIMIT {most + 1}", most=most + 1
    )
    return {text for (text,) in found} if len(found) <= most else set()


def is_over_budget(error: BaseException) -> bool:
    """Whether ``error`` ends a query that took too long, or met what is too large for the store."""
    too_long = isinstance(error, sqlite3.OperationalError) and str(error) == "interrupted"
    return too_long or isinstance(error, sqlite3.DataError)


class Connection(sqlite3.Connection):
    """A connection to a database that is not trusted."""

    def restrict(self, path: Path) -> None:
        """Set limits and pragmas, before anything of the database at ``path`` is read."""
        self._budget = _Budget(path)
        self.set_progress_handler(self._budget.is_spent, _STEPS)
        self.text_factory = _text
        if hasattr(self, "setlimit"):  # Python 3.11
            self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
        for pragma in _PRAGMAS:
            self.execute(f"PRAGMA {pragma}")

    def execute(self, query: str, parameters: Any = ()) -> sqlite3.Cursor:
        """As its base does, with a budget of its own."""
        self._budget.begin()
        return super().execute(query, parameters)

    def fetch(self, query: str, parameters: Sequence[Any] = (), most: int = 1000) -> list[Any]:
        """The first rows of a query, ``most`` of them; what a damaged index repeats without end is left."""
        cursor = self.execute(query, parameters)
        try:
            return cursor.fetchmany(most)
        finally:
            cursor.close()


class _Budget:
    """The processor time that a query on the database at ``path`` may take on its thread."""

    def __init__(self, path: Path) -> None:
        self._files = (path, path.with_name(LOG))
        self._began = 0.0
        self._size = -1

    def begin(self) -> None:
        self._began = time.thread_time()
        self._size = -1

    def is_spent(self) -> bool:
        if self._size < 0:  # at once: what the query itself writes earns it nothing
            self._size = sum(map(_bytes_on_disk, self._files))
        more = time.thread_time() - self._began - BUDGET_SECONDS
        return more > 0 and more * BUDGET_BYTES_PER_SECOND > self._size


def _look(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _log_bytes(rows: Path) -> int:
    """What the log claims, of which SQLite would read all."""
    found = _look(rows / LOG)
    return 0 if found is None else found.st_size


def _close_to_others(path: Path, mode: int, directory: Path) -> None:
    # By name: SQLite's locks on a file end when this process closes any descriptor of it.
    mask = allowed(directory)
    if os.name == "posix" and mode & 0o777 & ~mask:
        try:
            os.chmod(path, stat.S_IMODE(mode) & (mask | mode & stat.S_ISGID))
        except PermissionError:  # another member's, who alone may change that
            if mask == OWNER or os.stat(directory).st_mode & stat.S_IXOTH:
                raise


def _bytes_on_disk(path: Path) -> int:
    """What a file takes, not what it claims: most of a sparse one is not there."""
    try:
        found = os.lstat(path)
    except OSError:
        return 0
    return min(found.st_size, 512 * found.st_blocks) if hasattr(found, "st_blocks") else found.st_size


def _text(data: bytes) -> str:
    return data[:LONGEST_TEXT].decode("utf-8", "replace")
