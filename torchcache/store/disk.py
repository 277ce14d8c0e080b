"""The disk tier: blobs read, written and dropped, with no failure of the store raised."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import diskcache
import numpy as np
import numpy.typing as npt

from torchcache.errors import StoreVersionError, brief
from torchcache.forks import without_forks
from torchcache.logging import logger
from torchcache.store.access import Access
from torchcache.store.catalogue import Catalogue, Region
from torchcache.store.connect import MIN_FILE_SIZE, ROWS, Rows, connect, is_locked
from torchcache.store.file import BlobFile
from torchcache.store.gate import DATABASE, is_over_budget
from torchcache.store.in_use import InUse
from torchcache.store.pause import Pause
from torchcache.store.reader import Reader
from torchcache.store.room import Room, cost, portions
from torchcache.store.tier import Blob, Tier

__all__ = ["DiskTier", "Places", "disk_tier"]

KEYS_PER_QUERY = 500
LOCK_SECONDS = 10.0
# A portion is stored in so many parts, if room is made for each.
PARTS = 4

# Rows as a hostile database may hold them: nothing of unknown size or type is fetched.
SELECT, SELECT_WITHOUT_VALUES = (
    f"SELECT key, mode, substr(filename, 1, 64), CASE WHEN typeof(value) = 'blob' AND length(value) <= {MIN_FILE_SIZE}"
    f" THEN {value} END FROM Cache WHERE raw = 1 AND typeof(mode) = 'integer' AND length(key) = 32"
    for value in ("value", "x''")
)
Row = tuple[bytes, int, str | None, Any]
Places = npt.NDArray[np.int64]

T = TypeVar("T")


class DiskTier(Tier):
    """Blobs in a cache directory, shared by threads and processes.

    Nothing here raises on behalf of the store: a failure is counted in ``errors``, warned of once, and reads as
    absence.

    Parameters
    ----------
    directory : Path
        The cache directory; made when missing.
    group : bool
        Whether its group is to have it too.
    evicts : bool
        Whether rows that are not in use give way to new ones when it is full.
    """

    def __init__(self, directory: Path, group: bool = False, evicts: bool = True) -> None:
        self.directory = directory
        self.access = Access(directory, group)
        self._folder = directory / ROWS
        self.errors = 0
        self._complained = False
        self.catalogue = Catalogue(directory, self.access)
        self.in_use = InUse(self.catalogue, self.access)
        self._room = Room(self.catalogue, self.in_use, evicts)
        self._cache: Rows | Reader | None = None
        self._failed = False
        self._identity: tuple[int, int] | None = None
        self._reading = Pause()
        self._writing = Pause()
        self._lock = threading.Lock()

    def open(self) -> bool:
        """Open the directory unless that was done; ``False`` where it cannot be used."""
        return self._opened() is not None

    @property
    def full(self) -> bool:
        """Whether new rows are refused, until it is looked again what may go for them."""
        return not self._room.refused.over

    def use(self, user: object, tag: str) -> None:
        """Keep the rows of region ``tag`` as long as ``user`` lives, who is held weakly."""
        if self.open():
            self.in_use.add(user, tag)

    @property
    def writable(self) -> bool:
        """Whether rows can be stored."""
        return not isinstance(self._opened(), Reader | None)

    @without_forks
    def _opened(self) -> Rows | Reader | None:
        """What reads the directory: a ``diskcache.Cache`` or, where nothing can be written, a ``Reader``."""
        cache = self._cache
        if cache is not None or self._failed:
            return cache
        with self._lock:
            if self._cache is None and not self._failed and self._reading.over:
                try:
                    self._cache = connect(self.access, LOCK_SECONDS)
                    self._identity = self._identify()
                except StoreVersionError as error:
                    self._failed = True
                    self.complain(f"is left alone, and training goes on without it: {error}")
                except Exception as error:  # whatever lies there
                    if is_locked(error):
                        self._reading.begin()
                        self._blame("opened", error)
                    else:
                        self._open_to_read(error)
            return self._cache

    def _open_to_read(self, error: Exception) -> None:
        """Do with what can be read where ``error`` says that a database there cannot be written."""
        try:
            if not isinstance(error, (OSError, sqlite3.OperationalError)) or is_over_budget(error):
                raise error
            self._cache = Reader(self._folder, LOCK_SECONDS)
        except Exception:  # whatever lies there
            self._failed = True
            self._blame("opened", error)
        else:
            self._writing.begin()
            self._blame("written to", error, "its rows are read and no more are stored")

    @without_forks
    def read(self, keys: Sequence[bytes], region: Region | None = None, most: int = 0) -> dict[bytes, Blob]:
        """The blobs of those ``keys`` that are here, large ones still to be read from their files.

        One query serves a few hundred keys.
        """
        found: dict[bytes, Blob] = {}
        if not self._reading.over or (cache := self._opened()) is None:
            return found
        for start in range(0, len(keys), KEYS_PER_QUERY):
            part = keys[start : start + KEYS_PER_QUERY]
            found.update(self._blobs(cache, self._rows(cache, part)))
            if self._failed:
                break
        return found

    @without_forks
    def locate(self, after: bytes, last: bytes) -> Places:
        """Where the entries with keys beyond ``after`` and up to ``last`` are, in the order in which they lie."""
        query = "SELECT rowid FROM Cache WHERE key > ? AND key <= ?"  # the index answers it

        def places(cache: Rows | Reader) -> Places:
            return np.unique(np.fromiter((place for (place,) in cache.execute(query, (after, last))), np.int64))

        none: Places = np.empty(0, np.int64)
        if not self._reading.over or (cache := self._opened()) is None:
            return none
        return self._guard("read", lambda: places(cache), none)

    @without_forks
    def read_at(self, places: Places, after: bytes, last: bytes) -> dict[bytes, Blob]:
        """The blobs at ``places``, at most some hundreds, as far as they are still those of such keys.

        Two to three times as fast as by key: rows that were stored together share pages.
        """
        if not self._reading.over or (cache := self._opened()) is None:
            return {}
        query = f"{SELECT} AND rowid IN ({','.join('?' * len(places))}) AND key > ? AND key <= ?"
        arguments = (*places.tolist(), after, last)
        return self._blobs(cache, self._guard("read", lambda: cache.fetch(query, arguments, len(places)), []))

    @without_forks
    def write(self, entries: Sequence[tuple[bytes, bytes]], region: Region) -> tuple[int, int]:
        """Store ``(key, blob)`` pairs, as many as the region's limit for the directory allows.

        Entries that are there stay as they are: another process may be reading their files.

        Returns
        -------
        stored : int
            Entries stored.
        size : int
            Their bytes, blobs alone.
        """
        if not self._writing.over or self.full:
            return 0, 0
        if isinstance(self._cache, Reader):
            self._cache = None  # it may be writable by this time
        elif self._cache is not None and self._identify() != self._identity:
            self._abandon()
        cache = self._opened()
        if not isinstance(cache, Rows):
            return 0, 0
        stored = size = 0

        def store() -> None:
            nonlocal stored, size
            for rest in portions(entries):
                if not cache.fold():
                    self._writing.begin()
                    self.complain("has a long log that a long read keeps open: no more rows are stored for a while")
                    return
                for _ in range(PARTS):
                    done, taken, rest = self._store(rest, region)
                    stored, size = stored + done, size + taken
                    if not rest:
                        break
                    costs = [cost(blob) for _, blob in rest]
                    if not self._room.make(cache, self._transact, region.tag, costs, region.limit):
                        return

        self._guard("written to", store, None)
        return stored, size

    def _store(
        self, entries: Sequence[tuple[bytes, bytes]], region: Region
    ) -> tuple[int, int, Sequence[tuple[bytes, bytes]]]:
        """Store entries in one transaction: how many, their bytes, and those that did not fit in."""
        stored = size = 0
        with self._transact() as cache:
            cache.measure()
            room = cache.room(region.limit)
            present = self._present(cache, [key for key, _ in entries])
            for place, (key, blob) in enumerate(entries):
                if key in present:
                    continue
                room -= cost(blob)
                if room < 0:
                    return stored, size, entries[place:]
                cache.set(key, blob, tag=region.tag, retry=False)
                stored, size = stored + 1, size + len(blob)
        return stored, size, ()

    @without_forks
    def remove(self, region: Region, found: Mapping[bytes, Blob] | None = None) -> bool:
        """Remove damaged entries, so that they are computed anew and stored again, or all of the region.

        An entry whose file another process removed meanwhile, together with the entry, was not damaged.
        """
        if found is not None:
            return self._drop(found)
        if not (self._writing.over and self.writable):
            return False
        cache: Any = self._cache
        return self._guard("emptied", lambda: cache.evict(region.tag, retry=False) >= 0, False)

    def knows(self, region: Region) -> bool:
        """Whether any process told of the region."""
        return self.catalogue.has(region.tag)

    def note(self, region: Region) -> None:
        """Put the region in the catalogue, once a process."""
        self.catalogue.note(region)

    def _drop(self, damaged: Mapping[bytes, Blob]) -> bool:
        def delete() -> int:
            dropped = 0
            with self._transact() as cache:
                for key, blob in damaged.items():
                    if not self._is_gone(cache, key, blob):
                        cache.delete(key, retry=False)
                        cache.doubt()
                        dropped += 1
            return dropped

        count = len(damaged)
        if self._writing.over and self.writable:
            count = self._guard("repaired", delete, count)
        if count:
            self.complain("held damaged rows, which were removed and are computed again", count)
        return True

    @without_forks
    def volume(self) -> int:
        """Bytes of the directory, as diskcache counts them."""
        cache = self._opened()
        return self._guard("measured", cache.volume, 0) if cache is not None else 0

    @without_forks
    def close(self) -> None:
        """Close this thread's connection."""
        if self._cache is not None:
            self._guard("closed", self._cache.close, None)

    @contextlib.contextmanager
    def _transact(self) -> Iterator[Rows]:
        """A transaction that leaves no lock and no file behind when it fails, be it at its very end."""
        cache, files = self._cache, list[str]()
        assert isinstance(cache, Rows)
        try:
            with cache.transact(retry=False):
                cache.disk.uncommitted = files
                yield cache
        except BaseException as error:
            if "cannot rollback" in str(error) and error.__context__ is not None:
                error = error.__context__  # SQLite has undone it by itself, and diskcache tries again
            connection = cache._con
            if connection.in_transaction:  # diskcache does not undo what cannot be committed
                connection.rollback()
            for name in files:
                cache.disk.remove(name)
            if isinstance(error, (OSError, sqlite3.OperationalError, diskcache.Timeout)):
                self._writing.begin()
            raise error from None
        self._writing.end()

    def _rows(self, cache: Rows | Reader, keys: Sequence[bytes]) -> list[Row]:
        """The rows of ``keys``; where a damaged page spoils the query, those that can still be read."""
        marks = ",".join("?" * len(keys))
        try:
            rows = cache.fetch(f"{SELECT} AND key IN ({marks})", keys, len(keys))
        except Exception as error:  # whatever a damaged database makes of SQLite
            if not self._reading.over or self._failed:
                return []
            if is_locked(error):
                self._reading.begin()
            elif len(keys) > 1 and not is_over_budget(error):
                half = len(keys) // 2
                return self._rows(cache, keys[:half]) + self._rows(cache, keys[half:])
            self._blame("read", error)
            return []
        self._reading.end()
        return rows

    def _present(self, cache: Rows, keys: Sequence[bytes]) -> set[bytes]:
        """Which of ``keys`` have an entry that a reader would try."""
        present: set[bytes] = set()
        for start in range(0, len(keys), KEYS_PER_QUERY):
            part = keys[start : start + KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            rows = cache.fetch(f"{SELECT_WITHOUT_VALUES} AND key IN ({marks})", part, len(part))
            present.update(self._blobs(cache, rows))
        return present

    def _is_gone(self, cache: Rows, key: bytes, blob: Blob) -> bool:
        """Whether the entry that named the file ``blob`` is there no more."""
        if not isinstance(blob, BlobFile):
            return False
        rows = cache.fetch("SELECT substr(filename, 1, 64) FROM Cache WHERE raw = 1 AND key = ?", (key,), 1)
        return not rows or os.path.join(cache.directory, str(rows[0][0])) != blob.path

    def _blobs(self, cache: Rows | Reader, rows: Sequence[Row]) -> dict[bytes, Blob]:
        found: dict[bytes, Blob] = {}
        for key, mode, filename, value in rows:
            try:
                found[key] = cache.disk.find(mode, filename, value)
            except (OSError, ValueError) as error:
                self._blame("read", error)
        return found

    def _identify(self) -> tuple[int, int] | None:
        """Which file the database is; ``None`` where there is none."""
        try:
            found = os.lstat(self._folder / DATABASE)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _abandon(self) -> None:
        """Start anew where the directory was deleted or replaced: SQLite would go on in files without a name."""
        with self._lock:
            self._cache = None
        self.in_use.forget()
        self._room.forget()
        self.complain("was deleted or replaced while in use and is filled anew")

    def _guard(self, done: str, action: Callable[[], T], otherwise: T) -> T:
        try:
            return action()
        except Exception as error:  # whatever a damaged database makes of SQLite
            self._blame(done, error)
            return otherwise

    def _blame(self, done: str, error: BaseException, rest: str = "training goes on without it") -> None:
        reason = f"{type(error).__name__}: {brief(error)}" if str(error) else type(error).__name__
        if is_over_budget(error):  # the next query could take as long
            self._failed, self._cache = True, None
            reason = "a query took too long for its size, or met too large a value; torchcache clear empties it"
        elif isinstance(error, PermissionError):
            reason += "; torchcache doctor tells who may"
        self.complain(f"cannot be {done} ({reason}); {rest}")

    def complain(self, what: str, count: int = 1) -> None:
        """Count errors, and warn of the first one: what follows from it would repeat it in other words."""
        self.errors += count
        level = logging.INFO if self._complained else logging.WARNING
        self._complained = True
        logger.log(level, "the cache directory %s %s", self.directory, what)


# Weak: a process that makes one model after another holds the files of those that are in use.
_tiers: weakref.WeakValueDictionary[Path, DiskTier] = weakref.WeakValueDictionary()
_tiers_lock = threading.Lock()


@without_forks
def disk_tier(directory: Path, group: bool = False) -> DiskTier:
    """The disk tier of ``directory``, the same for all who use it at a time."""
    with _tiers_lock:
        tier = _tiers.setdefault(directory, DiskTier(directory))
        tier.access.group |= group
        return tier
