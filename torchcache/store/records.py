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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torchcache.errors import StoreDamagedError, StoreError, brief
from torchcache.store.blob import BlobError
from torchcache.store.blob_disk import BINARY, RAW, BlobDisk
from torchcache.store.catalogue import Catalogue, is_tag
from torchcache.store.connect import MARKER, MIN_FILE_SIZE, ROWS, check_version
from torchcache.store.database import LOCK_SECONDS
from torchcache.store.file import BlobFile, BlobFileError, check_whole
from torchcache.store.gate import DATABASE, Connection, check_names, is_over_budget, open_database
from torchcache.store.header import LARGEST_ROW, Header, check_blob, read_header
from torchcache.store.pack import Pack, header_in, is_pack, rows_in

BATCH = 500
UNKNOWN = "unknown"
START_ANEW = "torchcache clear makes it a new, empty directory"
# The tag of a row where it is one.
TAG = "CASE WHEN typeof(tag) = 'text' AND length(tag) = 32 AND tag NOT GLOB '*[^0-9a-f]*' THEN tag END"
# SQLite holds a row's blob below this size itself; a larger value is not of the store.
_LARGEST_VALUE = MIN_FILE_SIZE + 1024

# Bytes of an entry's blob: of its file as it lies there, never the size that the database claims.
LENGTH = f"CASE WHEN filename IS NULL THEN min(length(value), {_LARGEST_VALUE}) ELSE file_bytes(filename) END"


def is_cache(directory: Path) -> bool:
    """Whether ``directory`` holds what torchcache writes."""
    return any(os.path.lexists(directory / name) for name in (MARKER, ROWS))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the database, a row or a pack of some; a file's contents are still to be read.

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
        Bytes of the blob.
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

    @property
    def count(self) -> int:
        """How many rows it has."""
        return rows_in(self.key)

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, int]]:
        """The blob as an open file, and its length."""
        if self.path is None:
            yield io.BytesIO(self.value), len(self.value)
            return
        with BlobFile(self.path).open() as file:
            check_whole(file.fileno())
            yield file, os.fstat(file.fileno()).st_size

    def check(self) -> tuple[Header | None, str | None]:
        """What its rows hold, and what is wrong with the entry: ``None`` where all is well."""
        if self.problem is not None:
            return None, self.problem
        try:
            if is_pack(self.key):
                Pack(self.key, self.read())
                return header_in(self.key, self.value), None
            with self.open() as (file, length):
                return check_blob(self.key, file, length), None
        except FileNotFoundError:
            return None, "file is missing"
        except (BlobError, BlobFileError, OSError) as error:
            return None, str(error) or type(error).__name__

    def header(self) -> Header | None:
        """What its rows hold; ``None`` where that cannot be read."""
        try:
            if is_pack(self.key):
                return header_in(self.key, self.value)
            if self.problem is None:
                with self.open() as (file, _):
                    return read_header(file)
        except (BlobError, BlobFileError, OSError):
            pass
        return None

    def rows(self) -> dict[bytes, bytes]:
        """Key to blob of its rows; ``BlobError`` where it is a damaged pack."""
        blob = self.read()
        return dict(Pack(self.key, blob).rows()) if is_pack(self.key) else {self.key: blob}

    def read(self) -> bytes:
        """The blob's bytes."""
        with self.open() as (file, length):
            return file.read(min(length, LARGEST_ROW + 2**16))  # Python allocates what it is asked to read


class Records:
    """The entries of a cache directory.

    Parameters
    ----------
    directory : Path
        The cache directory.
    any_log : bool
        Take a log of any length.

    Raises
    ------
    StoreError
        Where there is no cache, or its database cannot be opened.
    StoreVersionError
        Where a newer torchcache wrote it.

    Attributes
    ----------
    disk : BlobDisk
        The files of blobs.
    """

    def __init__(self, directory: Path, *, any_log: bool = False) -> None:
        if not is_cache(directory):
            raise StoreError(f"{directory} holds no cache: give the directory, or set TORCHCACHE_DIR")
        check_version(directory)
        self.directory = directory
        self.rows = directory / ROWS
        self.catalogue = Catalogue(directory)
        self.database = self.rows / DATABASE
        self._any_log = any_log
        check_names(self.rows, any_log=any_log)
        self.disk = BlobDisk(str(self.rows))
        self._connection = self._connect() if os.path.lexists(self.database) else None

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()

    def sql(self, statement: str, parameters: Sequence[Any] = (), most: int = 1000) -> list[tuple[Any, ...]]:
        """The first ``most`` rows of a query; none where nothing was ever stored."""
        if self._connection is None:
            return []
        with self._told():
            return self._connection.fetch(statement, parameters, most)

    def each(self, query: str, parameters: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """All rows of a query, one by one."""
        if self._connection is not None:
            with self._told():
                yield from self._connection.execute(query, parameters)

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
                if row[0] <= last:
                    raise StoreDamagedError(f"the pages of {self.database} are out of order: {START_ANEW}")
                last = row[0]
                yield self._entry(*row)

    def at(self, places: Sequence[int]) -> Iterator[Entry]:
        """The entries with these rowids, as far as they are there, without all of their blobs."""
        for start in range(0, len(places), BATCH):
            part = places[start : start + BATCH]
            marks = ",".join("?" * len(part))
            query = f"SELECT {_columns(False)} FROM Cache WHERE rowid IN ({marks})"
            for row in self.sql(query, part, len(part)):
                yield self._entry(*row)

    def queue(self, tags: Iterable[str], condition: str = "1") -> Iterator[Entry]:
        """The entries of the regions ``tags``, one region after the other, each in the order they were stored.

        Parameters
        ----------
        tags : iterable of str
            Fingerprints, ``"unknown"`` for entries without one.
        condition : str
            An SQL condition on the columns.
        """
        # Temporary tables, which SQLite keeps on disk where they grow.
        self.sql("CREATE TEMP TABLE IF NOT EXISTS turns (region PRIMARY KEY, turn) WITHOUT ROWID")
        self.sql("DROP TABLE IF EXISTS temp.queue")
        self.sql("DELETE FROM turns")
        for turn, tag in enumerate(tags):
            self.sql("INSERT OR IGNORE INTO turns VALUES (?, ?)", (tag, turn))
        self.sql(
            "CREATE TEMP TABLE queue AS SELECT Cache.rowid AS place FROM Cache CROSS JOIN turns "
            f"ON region = ifnull({TAG}, '{UNKNOWN}') WHERE {condition} ORDER BY turn, Cache.rowid"
        )
        last = 0
        while part := self.sql(
            f"SELECT rowid, place FROM temp.queue WHERE rowid > ? ORDER BY rowid LIMIT {BATCH}", (last,)
        ):
            last = part[-1][0]
            found = {entry.rowid: entry for entry in self.at([place for _, place in part])}
            yield from (found[place] for _, place in part if place in found)

    def find(self, keys: Sequence[bytes]) -> Iterator[Entry]:
        """The entries of those ``keys`` that are here, by the index."""
        for start in range(0, len(keys), BATCH):
            part = keys[start : start + BATCH]
            marks = ",".join("?" * len(part))
            query = f"SELECT {_columns(True)} FROM Cache WHERE raw = 1 AND key IN ({marks})"
            for row in self.sql(query, part, len(part)):
                yield self._entry(*row)

    def remove(self, entries: Sequence[Entry]) -> None:
        """Delete ``entries``, unless they were stored anew meanwhile, then their files."""
        assert self._connection is not None
        query = "DELETE FROM Cache WHERE rowid = ? AND (? OR (filename IS ? AND store_time IS ?))"
        gone = []
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for entry in entries:
                    which = (entry.rowid, entry.problem is not None, entry.filename, entry.stored)
                    gone += [entry] if self._connection.execute(query, which).rowcount else []
            finally:
                self._connection.execute("COMMIT")
        for entry in gone:
            if entry.path is not None and entry.filename is not None:
                self.disk.remove(entry.filename)

    def pragma(self, name: str) -> int:
        """An integer pragma of the database."""
        found = self.sql(f"PRAGMA {name}")
        return int(found[0][0]) if found else 0

    def volume(self) -> int:
        """Bytes of the directory as the size limit counts them: database pages and files."""
        return self.pragma("page_count") * self.pragma("page_size") + self.disk.volume()

    def compact(self) -> bool:
        """Give free pages back to the file system; ``False`` where other processes are in the way.

        Raises
        ------
        StoreDamagedError
            Where the database's pages are not in order: copying forged ones has no budget.
        """
        if self._connection is None:
            return True
        if self.sql("PRAGMA quick_check(1)") != [("ok",)]:
            raise StoreDamagedError(f"the pages of {self.database} are out of order: {START_ANEW}")
        try:
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (sqlite3.OperationalError, sqlite3.DataError):
            return False
        return True

    def _connect(self) -> Connection:
        writable = os.access(self.database, os.W_OK) and os.access(self.rows, os.W_OK)
        errors: list[Exception] = []
        # A database in a directory that may not be written to has no place for its shared memory.
        for mode in ("rw", "ro") if writable else ("ro", "ro&immutable=1"):
            try:
                connection = open_database(self.rows, mode, LOCK_SECONDS, any_log=self._any_log)
                connection.create_function("file_bytes", 1, self.disk.bytes_of)
                return connection
            except (sqlite3.Error, OSError) as error:
                errors.append(error)
        raise self._failure(errors[0])

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> StoreError:
        # SQLite tells damage apart from a lock, a full disk and a missing table by the class alone.
        if type(error) is sqlite3.DatabaseError or is_over_budget(error):
            return StoreDamagedError(f"the database {self.database} cannot be read ({brief(error)}): {START_ANEW}")
        return StoreError(f"the database {self.database} cannot be used: {brief(error)}")

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
        elif mode == BINARY:
            try:
                path = self.disk.path_of(filename)
            except ValueError:
                problem = "file name is not the store's"
        elif mode != RAW or kind != "blob":
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
            value if problem is None and mode == RAW else b"",
            path,
            max(0, _number(length)),
        )


def _columns(whole: bool) -> str:
    """What ``_entry`` takes, nothing of it of another size than the store's."""
    value = "value" if whole else "substr(value, 1, 4096)"
    return (
        f"rowid, CASE WHEN length(key) <= 64 THEN key END, {TAG}, CASE WHEN typeof(raw) = 'integer' THEN raw END, "
        "CASE WHEN typeof(store_time) = 'real' THEN store_time END, "
        "CASE WHEN typeof(mode) = 'integer' THEN mode END, typeof(value), "
        "CASE WHEN length(filename) > 64 THEN '?' ELSE filename END, "
        f"CASE WHEN length(value) <= {_LARGEST_VALUE} THEN {value} END, {LENGTH}"
    )


def _number(value: object) -> int:
    return value if type(value) is int else 0
