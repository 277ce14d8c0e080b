"""A cache directory made and opened to be written to: the version it says, and the database.

A cache directory holds ``torchcache.json`` (the format version and its checksum), ``regions/`` (the catalogue) and
``rows-<version>/``, a directory of ``diskcache.Cache`` whose keys are 32 bytes (fingerprint and digest), whose values
are blobs and whose tag is the region's fingerprint.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache
import xxhash
from diskcache.core import DEFAULT_SETTINGS, METADATA

from torchcache.errors import StoreVersionError
from torchcache.logging import warn_once
from torchcache.store.access import OWNER, Access, allowed
from torchcache.store.blob import FORMAT_VERSION
from torchcache.store.blob_disk import BlobDisk
from torchcache.store.catalogue import FOLDER as REGIONS
from torchcache.store.connections import Connected
from torchcache.store.gate import (
    DATABASE,
    SCHEMA,
    SIDES,
    Connection,
    LongLogError,
    check_names,
    is_log_long,
    open_database,
    read_file,
)
from torchcache.store.in_use import FOLDER as IN_USE

MARKER = "torchcache.json"
ROWS = f"rows-{FORMAT_VERSION}"
# Values from this size on are files: SQLite reads smaller ones faster, and larger ones bloat its log.
MIN_FILE_SIZE = 128 * 1024
# Rows of 3 KB fill such pages to 93% (they would take one of 4 KB each); keys come in random order, for which larger
# pages are slower to write.
PAGE_SIZE = 16 * 1024

_LARGEST_MARKER = 4096
# How long to wait for those who read, while nobody can write.
_FOLD_SECONDS = 1
# What diskcache finds where it opens the directory by itself; here none of it is read.
SETTINGS = {
    **DEFAULT_SETTINGS,
    "disk_min_file_size": MIN_FILE_SIZE,
    "sqlite_mmap_size": 0,
    "eviction_policy": "none",
    "cull_limit": 0,
}


class Rows(Connected, diskcache.Cache):  # type: ignore[misc]
    """A ``diskcache.Cache`` with our settings and connections, one a thread and process.

    Parameters
    ----------
    rows : Path
        The directory of the database, used as it is given.
    lock_seconds : float
        How long to wait for a lock.
    access : Access
        The permissions of what is made.

    Raises
    ------
    StoreError, OSError, sqlite3.Error
        As ``open_database`` does.
    """

    def __init__(self, rows: Path, lock_seconds: float, access: Access) -> None:
        # Not its base's: that expands $NAMES in the path, and obeys whatever settings the database says.
        Connected.__init__(self)
        self._rows = rows
        self._directory, self._timeout, self._txn_id = str(rows), lock_seconds, None
        self._disk = BlobDisk(self._directory, access, min_file_size=MIN_FILE_SIZE)
        self.cull_limit = SETTINGS["cull_limit"]
        self._measured = False
        self._con  # noqa: B018

    def _connect(self) -> Connection:
        return open_database(self._rows, "rw", self._timeout)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction that leaves no lock and no file behind when it fails, be it at its very end."""
        files = list[str]()
        try:
            with self.transact(retry=False):
                self.disk.uncommitted = files  # another thread may have had the transaction before
                yield
        except BaseException as error:
            if "cannot rollback" in str(error) and error.__context__ is not None:
                error = error.__context__  # SQLite has undone it by itself, and diskcache tries again
            connection = self._con
            if connection.in_transaction:  # diskcache does not undo what cannot be committed
                connection.rollback()
            for name in files:
                self.disk.remove(name)
            raise error from None

    def volume(self) -> int:
        """Bytes of the directory: pages of the database and files of values."""
        size, pages = (self.fetch(f"PRAGMA {name}")[0][0] for name in ("page_size", "page_count"))
        return int(max(size * pages, os.lstat(self._rows / DATABASE).st_size)) + (self._file_bytes() or 0)

    def room(self, limit: int) -> int:
        """Bytes that may still be stored where the directory may hold ``limit``."""
        size, free = (self.fetch(f"PRAGMA {name}")[0][0] for name in ("page_size", "freelist_count"))
        return int(limit - self.volume() + size * free)

    def fold(self) -> bool:
        """Put a log that has grown long into the database; ``False`` where a long read is in the way.

        With a longer log, whoever opens the directory next would refuse it.
        """
        if not is_log_long(self._rows):
            return True
        self.execute(f"PRAGMA busy_timeout = {1000 * _FOLD_SECONDS}")
        try:
            return bool(self.fetch("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0)
        finally:
            self.execute(f"PRAGMA busy_timeout = {int(1000 * self._timeout)}")

    def measure(self) -> None:
        """Count the bytes of files anew where what the database says of them may be wrong; within a transaction."""
        if not self._measured or self._file_bytes() is None:
            self.execute("INSERT OR REPLACE INTO Settings VALUES ('size', ?)", (self._disk.volume(),))
            self._measured = True

    def doubt(self) -> None:
        """What the database says of the bytes of files may be wrong: rows are gone whose own claims were counted."""
        self._measured = False

    def _row_update(self, rowid: int, now: float, columns: Any) -> None:
        self.doubt()
        super()._row_update(rowid, now, columns)

    def _file_bytes(self) -> int | None:
        """Bytes of files as triggers count them; ``None`` where that is no count."""
        found = self.fetch("SELECT value FROM Settings WHERE key = 'size' AND typeof(value) = 'integer' AND value >= 0")
        return int(found[0][0]) if found else None


def check_version(directory: Path) -> None:
    """Raise ``StoreVersionError`` for a directory that a newer torchcache wrote; leave it untouched."""
    try:
        content = json.loads(read_file(directory / MARKER, _LARGEST_MARKER))
        found, check = content["format"], content["check"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(found, int) and found > FORMAT_VERSION and check == _check(found):
        raise StoreVersionError(
            f"{directory} holds format {found}, and this torchcache reads up to {FORMAT_VERSION}: "
            "upgrade torchcache, or set persistent_cache_dir to another directory"
        )


def marker(version: int) -> bytes:
    """What ``torchcache.json`` holds, in this format and in all that follow.

    The checksum tells a newer version from a flipped bit, which must not stop anything.
    """
    return json.dumps({"format": version, "check": _check(version)}).encode()


def connect(access: Access, lock_seconds: float) -> Rows:
    """Open the rows of a directory, both made where they are missing.

    Raises
    ------
    StoreVersionError
        When a newer torchcache wrote the directory.
    StoreError
        When what lies there is not the store's.
    OSError, sqlite3.Error
        When it cannot be opened, or is locked for longer than ``lock_seconds``.
    """
    directory = access.directory
    rows = directory / ROWS
    check_version(directory)
    access.make((MARKER, REGIONS, IN_USE, ROWS))
    _write_marker(access)
    check_names(rows, own=True)
    if not os.path.lexists(rows / DATABASE):
        _create(rows, access)
    elif allowed(directory) != OWNER and not os.access(rows / DATABASE, os.W_OK):
        raise PermissionError("its group may not write to cache.db")  # SQLite would open it, and fail at the first row
    deadline = time.monotonic() + lock_seconds
    while True:
        try:
            return Rows(rows, lock_seconds, access)
        except sqlite3.OperationalError as error:
            # A connection that opens or closes at the same time recovers or removes the log.
            if not is_locked(error) or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.01, 0.1))


def is_locked(error: BaseException) -> bool:
    """Whether ``error`` says that another process holds the database, or may be about to make it fit for use."""
    if isinstance(error, LongLogError):
        return True
    return isinstance(error, (sqlite3.OperationalError, diskcache.Timeout)) and "locked" in str(error)


def _check(version: int) -> str:
    return xxhash.xxh3_64_hexdigest(f"torchcache {version}".encode())


def _write_marker(access: Access) -> None:
    path = access.directory / MARKER
    wanted = marker(FORMAT_VERSION)
    with contextlib.suppress(OSError):
        if read_file(path, _LARGEST_MARKER) == wanted:
            return
    access.put(path, wanted)


def _create(rows: Path, access: Access) -> None:
    """Put a database in ``rows``, whole at once: no process finds half of one, and none has a rollback journal."""
    made = rows.with_name(f".{rows.name}.{secrets.token_hex(8)}")
    access.make_folder(made)
    try:
        # SQLite gives its files the mode that the first one has.
        os.close(access.open_new(made / DATABASE, os.O_CREAT | os.O_WRONLY))
        if allowed(access.directory) & ~os.stat(made / DATABASE).st_mode & stat.S_IWGRP:
            warn_once(
                f"the group of {access.directory} may write to it, but this process's umask keeps the group from what "
                "it makes there: set group=True, or umask 002"
            )
        with contextlib.closing(sqlite3.connect(made / DATABASE, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
            connection.execute("PRAGMA journal_mode = wal")
            connection.execute("BEGIN")
            for statement in SCHEMA:
                connection.execute(statement)
            connection.executemany("INSERT INTO Settings VALUES (?, ?)", {**SETTINGS, **METADATA}.items())
            connection.execute("COMMIT")
        try:
            os.rename(made, rows)
        except OSError:
            if not rows.is_dir():
                raise
            _put_back(made, rows)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _put_back(made: Path, rows: Path) -> None:
    """Move a new database where one was lost, or where another process has just put its own."""
    if os.path.lexists(rows / DATABASE):
        return
    for name in SIDES:  # the log of the lost one
        (rows / name).unlink(missing_ok=True)
    os.rename(made / DATABASE, rows / DATABASE)
