"""The database of a cache directory, walked row by row for tools, beside the processes that use it.

Nothing found there is trusted: texts are no file names until checked, values are fetched only when their length is
a blob's, and no statement of the database's own making has rights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sqlite3
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torchcache.errors import StoreDamagedError, StoreError, brief
from torchcache.store.blob import FORMAT_VERSION, BlobError
from torchcache.store.blob_disk import BlobDisk
from torchcache.store.catalogue import Catalogue, is_tag
from torchcache.store.connect import MARKER, MIN_FILE_SIZE, check_version
from torchcache.store.disk import LOCK_SECONDS
from torchcache.store.file import BlobFile, BlobFileError
from torchcache.store.header import LARGEST_ROW, Header, check_blob, read_header

__all__ = ["BATCH", "LENGTH", "TAG", "UNKNOWN", "Entry", "Records", "is_cache"]

BATCH = 500
UNKNOWN = "unknown"
_RAW, _BINARY = 1, 2
# The tag of a row where it is one.
TAG = "CASE WHEN typeof(tag) = 'text' AND length(tag) = 32 AND tag NOT GLOB '*[^0-9a-f]*' THEN tag END"
# SQLite holds a row's blob below this size itself; a larger value is not of the store.
_LARGEST_VALUE = MIN_FILE_SIZE + 1024

# Bytes of an entry's blob, whatever a database claims: sums of them stay integers that SQLite can add.
LENGTH = (
    "CASE WHEN filename IS NULL THEN length(value) WHEN typeof(size) = 'integer' THEN min(max(size, 0), 1 << 40) "
    "ELSE 0 END"
)


def is_cache(directory: Path) -> bool:
    """Whether ``directory`` holds what torchcache writes."""
    return (directory / MARKER).is_file() or (directory / f"rows-{FORMAT_VERSION}").is_dir()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the database; a file's contents are still to be read.

    Parameters
    ----------
    rowid : int
        Its number in the database.
    key : bytes
        32 bytes, or whatever else was found there.
    tag : str
        Its region's fingerprint, ``"unknown"`` where there is none.
    stored : float
        Seconds since the epoch.
    filename : str or None
        Where its blob is, if in a file of its own.
    problem : str or None
        What is wrong with the row already.
    value : bytes
        The blob, or its first bytes where only those were asked for.
    path : str or None
        The checked path of its file.
    length : int
        Bytes of the blob, as the database has it.
    """

    rowid: int
    key: bytes
    tag: str
    stored: float
    filename: str | None
    problem: str | None
    value: bytes = b""
    path: str | None = None
    length: int = 0

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, int]]:
        """The blob as an open file, and its length."""
        if self.path is None:
            yield io.BytesIO(self.value), len(self.value)
            return
        with BlobFile(self.path).open() as file:
            yield file, os.fstat(file.fileno()).st_size

    def check(self) -> tuple[Header | None, str | None]:
        """What the blob holds, and what is wrong with the entry: ``None`` where all is well."""
        if self.problem is not None:
            return None, self.problem
        try:
            with self.open() as (file, length):
                return check_blob(self.key, file, length), None
        except FileNotFoundError:
            return None, "file is missing"
        except (BlobError, BlobFileError, OSError) as error:
            return None, str(error) or type(error).__name__

    def header(self) -> Header | None:
        """What the blob holds; ``None`` where that cannot be read."""
        try:
            if self.problem is None:
                with self.open() as (file, _):
                    return read_header(file)
        except (BlobError, BlobFileError, OSError):
            pass
        return None

    def read(self) -> bytes:
        """The blob's bytes."""
        return self.value if self.path is None else BlobFile(self.path).read(LARGEST_ROW + 2**16)


class Records:
    """The entries of a cache directory.

    Parameters
    ----------
    directory : Path
        The cache directory.

    Raises
    ------
    StoreError
        Where there is no cache, or its database cannot be opened.
    StoreVersionError
        Where a newer torchcache wrote it.
    """

    def __init__(self, directory: Path) -> None:
        if not is_cache(directory):
            raise StoreError(f"{directory} holds no cache: give the directory, or set TORCHCACHE_DIR")
        check_version(directory)
        self.directory = directory
        self.rows = directory / f"rows-{FORMAT_VERSION}"
        self.catalogue = Catalogue(directory)
        self.database = self.rows / "cache.db"
        self._connection = self._connect() if self.database.exists() else None
        # Its name checks and its removal of files; no database is opened by it.
        self._disk = BlobDisk(str(self.rows))

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()

    def sql(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query; none where nothing was ever stored."""
        if self._connection is None:
            return []
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise _failure(f"the database {self.database} cannot be used", error) from None

    def entries(self, where: str = "1", parameters: Sequence[Any] = (), whole: bool = True) -> Iterator[Entry]:
        """The entries in the order they were stored, a few hundred a query, so that writers get in between.

        Parameters
        ----------
        where, parameters
            An SQL condition on the columns and its parameters.
        whole : bool
            Fetch the blobs that are in the database, not their first bytes alone.
        """
        query = f"SELECT {_columns(whole)} FROM Cache WHERE rowid > ? AND ({where}) ORDER BY rowid LIMIT {BATCH}"
        last = -(2**63)
        while found := self.sql(query, (last, *parameters)):
            for row in found:
                last = row[0]
                yield self._entry(*row)

    def find(self, keys: Sequence[bytes]) -> Iterator[Entry]:
        """The entries of those ``keys`` that are here, by the index."""
        for start in range(0, len(keys), BATCH):
            part = keys[start : start + BATCH]
            marks = ",".join("?" * len(part))
            for row in self.sql(f"SELECT {_columns(True)} FROM Cache WHERE raw = 1 AND key IN ({marks})", part):
                yield self._entry(*row)

    def remove(self, entries: Sequence[Entry]) -> None:
        """Delete ``entries``, unless they were stored anew meanwhile, then their files."""
        assert self._connection is not None
        self.sql("BEGIN IMMEDIATE")
        gone = []
        try:
            for entry in entries:
                deleted = self._connection.execute(
                    "DELETE FROM Cache WHERE rowid = ? AND (? OR (filename IS ? AND store_time IS ?))",
                    (entry.rowid, entry.problem is not None, entry.filename, entry.stored),
                )
                gone += [entry] if deleted.rowcount else []
        finally:
            self.sql("COMMIT")
        for entry in gone:
            if entry.path is not None and entry.filename is not None:
                self._disk.remove(entry.filename)

    def remove_file(self, name: str) -> None:
        """Delete a file of blobs that no entry names; a name that is not the store's is left alone."""
        self._disk.remove(name)

    def files(self) -> Iterator[str]:
        """Names of all files that could be blobs, relative to the rows, folder by folder."""
        for outer in _folders(self.rows):
            for inner in _folders(self.rows / outer):
                for name in _names(self.rows / outer / inner, lambda file: file.is_file(follow_symlinks=False)):
                    name = os.path.join(outer, inner, name)
                    if self.path_of(name) is not None:
                        yield name

    def path_of(self, filename: object) -> str | None:
        """The path of a blob's file; ``None`` for a name that is not the store's, or that leads elsewhere."""
        try:
            return self._disk._check(filename)
        except ValueError:
            return None

    def pragma(self, name: str) -> int:
        """An integer pragma of the database."""
        found = self.sql(f"PRAGMA {name}")
        return int(found[0][0]) if found else 0

    def volume(self) -> int:
        """Bytes of the directory as the size limit counts them: database pages and files."""
        files = self.sql(f"SELECT sum({LENGTH}) FROM Cache WHERE filename IS NOT NULL")
        return self.pragma("page_count") * self.pragma("page_size") + (_number(files[0][0]) if files else 0)

    def compact(self) -> bool:
        """Give free pages back to the file system; ``False`` where other processes are in the way."""
        if self._connection is None:
            return True
        try:
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError:
            return False
        return True

    def _connect(self) -> sqlite3.Connection:
        for path in (self.rows, self.database):
            if path.is_symlink():
                raise StoreError(f"{path} is a link, which is not followed")
        if not self.database.is_file():
            raise StoreError(f"{self.database} is no file")
        writable = os.access(self.database, os.W_OK) and os.access(self.rows, os.W_OK)
        errors: list[sqlite3.Error] = []
        # A database in a directory that may not be written to has no place for its shared memory.
        for mode in ("mode=rw",) if writable else ("mode=ro", "mode=ro&immutable=1"):
            uri = f"file:{urllib.parse.quote(str(self.database))}?{mode}"
            try:
                connection = sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS, isolation_level=None)
                connection.text_factory = lambda text: text.decode("utf-8", "replace")
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("PRAGMA mmap_size = 0")
                connection.execute("SELECT 1 FROM Cache LIMIT 1").fetchall()
                return connection
            except sqlite3.Error as error:
                errors.append(error)
        raise _failure(f"the database {self.database} cannot be opened", errors[-1])

    def _entry(
        self,
        rowid: int,
        key: Any,
        tag: Any,
        raw: Any,
        stored: Any,
        mode: Any,
        kind: str,
        filename: Any,
        value: Any,
        length: Any,
    ) -> Entry:
        problem = path = None
        if type(stored) is not float:
            problem = "store time is no number"
        elif type(key) is not bytes or len(key) != 32 or raw != 1:
            problem = "key is not 32 plain bytes"
        elif mode == _BINARY:
            path = self.path_of(filename)
            problem = None if path is not None else "file name is not the store's"
        elif mode != _RAW or kind != "blob":
            problem = "value is not plain bytes"
        elif type(value) is not bytes:
            problem = "value is longer than any that is not in a file"
        return Entry(
            rowid,
            key if type(key) is bytes else b"",
            tag if is_tag(tag) else UNKNOWN,
            stored if type(stored) is float else 0.0,
            filename if isinstance(filename, str) else None,
            problem,
            value if problem is None and mode == _RAW else b"",
            path,
            max(0, _number(length)),
        )


def _failure(what: str, error: sqlite3.Error) -> StoreError:
    # SQLite tells damage apart from a lock, a full disk and a missing table by the class alone.
    if type(error) is sqlite3.DatabaseError:
        return StoreDamagedError(f"{what}: {brief(error)}; torchcache clear starts the directory anew")
    return StoreError(f"{what}: {brief(error)}")


def _columns(whole: bool) -> str:
    value = "value" if whole else "substr(value, 1, 4096)"
    return (
        "rowid, CASE WHEN length(key) <= 64 THEN key END, tag, raw, store_time, mode, typeof(value), "
        "CASE WHEN length(filename) > 64 THEN '?' ELSE filename END, "
        f"CASE WHEN length(value) <= {_LARGEST_VALUE} THEN {value} END, {LENGTH}"
    )


def _number(value: object) -> int:
    return value if type(value) is int else 0


def _folders(folder: Path) -> list[str]:
    return [name for name in _names(folder, lambda file: file.is_dir(follow_symlinks=False)) if len(name) == 2]


def _names(folder: Path, chosen: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        return sorted(file.name for file in files if chosen(file))
    return []
