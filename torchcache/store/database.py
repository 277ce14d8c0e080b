"""The database of a cache directory as training uses it: opened when it is needed, and no failure of it is raised."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import diskcache

from torchcache.errors import StoreVersionError, described
from torchcache.forks import without_forks
from torchcache.logging import Complaints
from torchcache.store.access import Access
from torchcache.store.connect import MIN_FILE_SIZE, ROWS, Rows, connect, is_locked
from torchcache.store.gate import DATABASE, is_over_budget
from torchcache.store.pause import Pause
from torchcache.store.reader import Reader
from torchcache.store.tier import Blob

KEYS_PER_QUERY = 500
LOCK_SECONDS = 10.0

# Rows as a hostile database may hold them: nothing of unknown size or type is fetched.
SELECT, SELECT_WITHOUT_VALUES = (
    f"SELECT key, mode, substr(filename, 1, 64), CASE WHEN typeof(value) = 'blob' AND length(value) <= {MIN_FILE_SIZE}"
    f" THEN {value} END FROM Cache WHERE raw = 1 AND typeof(mode) = 'integer' AND length(key) = 32"
    for value in ("value", "x''")
)
Row = tuple[bytes, int, str | None, Any]

T = TypeVar("T")


class Database(Complaints):
    """A database that is shared by threads and processes.

    A failure is counted in ``errors``, warned of once, and reads as absence.

    Parameters
    ----------
    directory : Path
        The cache directory; made when missing.
    group : bool
        Whether its group is to have it too.
    """

    def __init__(self, directory: Path, group: bool) -> None:
        super().__init__(f"the cache directory {directory}")
        self.directory = directory
        self.access = Access(directory, group)
        self._folder = directory / ROWS
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
    def writable(self) -> bool:
        """Whether rows can be stored."""
        return not isinstance(self._opened(), Reader | None)

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

    @contextlib.contextmanager
    def _transact(self) -> Iterator[Rows]:
        cache = self._cache
        assert isinstance(cache, Rows)
        try:
            with cache.transaction():
                yield cache
        except (OSError, sqlite3.OperationalError, diskcache.Timeout):
            self._writing.begin()
            raise
        self._writing.end()

    def rows(self, keys: Sequence[bytes], query: str = SELECT, arguments: Sequence[Any] = ()) -> list[Any]:
        """What ``query`` finds for entries by key, a few hundred at a time."""
        found: list[Any] = []
        for start in range(0, len(keys), KEYS_PER_QUERY):
            if not self._reading.over or (cache := self._opened()) is None:
                break
            found += self._some(cache, query, arguments, keys[start : start + KEYS_PER_QUERY])
        return found

    def each(self, query: str, arguments: Sequence[Any]) -> list[Any]:
        """The first column of what ``query`` finds, as far as it can be read."""
        found: list[Any] = []
        if self._reading.over and (cache := self._opened()) is not None:
            self._guard("read", lambda: found.extend(row[0] for row in cache.execute(query, arguments)), None)
        return found

    def _some(self, cache: Rows | Reader, query: str, arguments: Sequence[Any], keys: Sequence[bytes]) -> list[Any]:
        """As ``rows``; where a damaged page spoils the query, those that can still be read."""
        marks = ",".join("?" * len(keys))
        try:
            found = cache.fetch(f"{query} AND key IN ({marks})", (*arguments, *keys), len(keys))
        except Exception as error:  # whatever a damaged database makes of SQLite
            if not self._reading.over or self._failed:
                return []
            if len(keys) > 1 and not is_locked(error) and not is_over_budget(error):
                half = len(keys) // 2
                parts = (keys[:half], keys[half:])
                return [row for part in parts for row in self._some(cache, query, arguments, part)]
            self._blame("read", error)
            return []
        self._reading.end()
        return found

    def blobs(self, rows: Sequence[Row]) -> dict[bytes, Blob]:
        """Key to blob of rows that ``SELECT`` found."""
        found: dict[bytes, Blob] = {}
        if (cache := self._opened()) is None:
            return found
        for key, mode, filename, value in rows:
            try:
                found[key] = cache.disk.find(mode, filename, value)
            except (OSError, ValueError) as error:
                self._blame("read", error)
        return found

    def _identify(self) -> tuple[int, int] | None:
        """Which file the database is; ``None`` where there is none."""
        with contextlib.suppress(OSError):
            found = os.lstat(self._folder / DATABASE)
            return found.st_dev, found.st_ino
        return None

    def _guard(self, done: str, action: Callable[[], T], otherwise: T) -> T:
        try:
            return action()
        except Exception as error:  # whatever a damaged database makes of SQLite
            self._blame(done, error)
            return otherwise

    def _blame(self, done: str, error: BaseException, rest: str = "training goes on without it") -> None:
        reason = described(error)
        if done == "read" and is_locked(error):
            self._reading.begin()
        if is_over_budget(error):  # the next query could take as long
            self._failed, self._cache = True, None
            reason = "a query took too long for its size, or met too large a value; torchcache clear empties it"
        elif isinstance(error, PermissionError):
            reason += "; torchcache doctor tells who may"
        self.complain(f"cannot be {done} ({reason}); {rest}")
