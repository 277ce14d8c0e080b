"""A cache directory made and opened: the version it says, the database's layout and settings.

A cache directory holds ``torchcache.json`` (the format version and its checksum), ``regions/`` (the catalogue) and
``rows-<version>/``, a ``diskcache.Cache`` whose keys are 32 bytes (fingerprint and digest), whose values are blobs
and whose tag is the region's fingerprint.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import sqlite3
import time
from pathlib import Path
from typing import Any

import diskcache
import xxhash
from diskcache.core import DEFAULT_SETTINGS

from torchcache.errors import StoreVersionError
from torchcache.store.blob import FORMAT_VERSION
from torchcache.store.blob_disk import BlobDisk, open_private
from torchcache.store.connections import Connections
from torchcache.store.vet import DATABASE, vet_database, vet_files

__all__ = ["MARKER", "MIN_FILE_SIZE", "PAGE_SIZE", "ROWS", "check_version", "connect", "is_locked", "marker"]

MARKER = "torchcache.json"
ROWS = f"rows-{FORMAT_VERSION}"
# Values from this size on are files: SQLite reads smaller ones faster, and larger ones bloat its log.
MIN_FILE_SIZE = 128 * 1024
# Rows of 3 KB fill such pages to 93% (they would take one of 4 KB each); keys come in random order, for which larger
# pages are slower to write.
PAGE_SIZE = 16 * 1024

# All of them, so that none is taken from the database.
SETTINGS = {
    **DEFAULT_SETTINGS,
    "disk_min_file_size": MIN_FILE_SIZE,
    "sqlite_mmap_size": 0,  # a mapped file that another process cuts short would kill this one
    "eviction_policy": "none",
    "cull_limit": 0,
}
# Those that SQLite forgets with each connection.
_PRAGMAS = ("cache_size", "mmap_size", "synchronous")


class _Cache(diskcache.Cache):  # type: ignore[misc]
    """A ``diskcache.Cache`` that keeps our settings on every thread, and no files open when it is gone.

    Its base gives each new connection whatever settings the database says by that time.
    """

    def __init__(self, directory: str, **settings: Any) -> None:
        self._connections = Connections()
        super().__init__(directory, **settings)

    @property
    def _con(self) -> sqlite3.Connection:
        return self._connections.get(self._connect)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            os.path.join(self._directory, DATABASE), self._timeout, isolation_level=None, check_same_thread=False
        )
        for name in _PRAGMAS:
            connection.execute(f"PRAGMA {name} = {SETTINGS[f'sqlite_{name}']}")
        return connection

    def close(self) -> None:
        """Close this thread's connection."""
        self._connections.close()


def check_version(directory: Path) -> None:
    """Raise ``StoreVersionError`` for a directory that a newer torchcache wrote; leave it untouched."""
    try:
        with open(directory / MARKER, "rb") as file:
            content = json.loads(file.read(4096))
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


def connect(directory: Path, lock_seconds: float) -> Any:
    """Open the ``diskcache.Cache`` of ``directory``, both made for their owner alone where they are missing.

    Raises
    ------
    StoreVersionError
        When a newer torchcache wrote the directory.
    ForeignDatabaseError
        When diskcache did not make the database as it is.
    OSError, sqlite3.Error, diskcache.Timeout
        When it cannot be opened, or is locked for longer than ``lock_seconds``.
    """
    rows = directory / ROWS
    check_version(directory)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    _write_marker(directory)
    deadline = time.monotonic() + lock_seconds
    while True:
        try:
            vet_files(rows)
            _lay_out(rows, lock_seconds)
            vet_database(rows, lock_seconds)
            return _Cache(str(rows), timeout=lock_seconds, disk=BlobDisk, **SETTINGS)
        except (sqlite3.OperationalError, diskcache.Timeout) as error:
            # Processes that create the same database at once collide on its journal mode.
            if not is_locked(error) or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.01, 0.1))


def is_locked(error: BaseException) -> bool:
    """Whether ``error`` says that another process holds the database."""
    return isinstance(error, (sqlite3.OperationalError, diskcache.Timeout)) and "locked" in str(error)


def _check(version: int) -> str:
    return xxhash.xxh3_64_hexdigest(f"torchcache {version}".encode())


def _write_marker(directory: Path) -> None:
    path = directory / MARKER
    wanted = marker(FORMAT_VERSION)
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(4096) == wanted:
            return
    temporary = path.with_name(f"{MARKER}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb", opener=open_private) as file:
            file.write(wanted)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _lay_out(rows: Path, lock_seconds: float) -> None:
    """Create the database with our page size, which nothing can change later."""
    database = rows / DATABASE
    with contextlib.suppress(FileNotFoundError):
        if database.stat().st_size:
            return
    os.makedirs(rows, mode=0o700, exist_ok=True)
    # SQLite gives its files the mode that the first one has.
    os.close(os.open(database, os.O_CREAT | os.O_WRONLY, 0o600))
    with contextlib.closing(sqlite3.connect(database, timeout=lock_seconds)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("PRAGMA user_version = 1")  # the first write
