"""Room made in a full directory: rows of identities that nothing uses give way, those used longest ago first."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from torchcache.errors import StoreDamagedError
from torchcache.logging import logger, warn_once
from torchcache.store.catalogue import Catalogue, last_used
from torchcache.store.connect import MIN_FILE_SIZE, PAGE_SIZE, Rows
from torchcache.store.in_use import InUse
from torchcache.store.pause import Pause

# What one row costs in the database beside its blob: key, columns and index entries.
ROW_OVERHEAD = 160
# Of pages that one transaction adds to the log. A row writes its own, and one of each of two indices.
PORTION_BYTES = 32_000_000
# Of the limit, at a time: finding out what is in use costs as much for one row.
PORTION = 0.02
# A directory that holds more than the limit by this share of it, and more than a few batches can have added, was filled
# by those who allow more: a run with a low limit does not empty it.
OTHERS, OTHERS_BYTES = 0.1, 64 * 1024 * 1024
ROWS_AT_ONCE = 500
# Looking through a large database takes longer: the rest of it follows at the next write.
LOOK_SECONDS = 0.5
MOST_RUNS = 200_000
# Where locks do not tell what is in use, it is what was used within this time.
RECENT_SECONDS = 3600.0

# The region of a row, of no more than a tag's length; ``NULL`` is a region like others.
_TAG = "CASE WHEN typeof(tag) = 'text' AND length(tag) <= 32 THEN tag END"
_STORED = "CASE WHEN typeof(store_time) = 'real' THEN store_time END"
_FILENAME = "CASE WHEN length(filename) <= 64 THEN filename END"
_SIZE = "CASE WHEN typeof(size) = 'integer' THEN size END"

Transact = Callable[[], AbstractContextManager[Rows]]


def cost(blob: bytes) -> int:
    """Bytes that a row takes."""
    return len(blob) + ROW_OVERHEAD


def portions(entries: Sequence[tuple[bytes, bytes]]) -> Iterator[Sequence[tuple[bytes, bytes]]]:
    """Pairs of key and blob in portions, none of which makes the log long."""
    start = written = 0
    for place, (_, blob) in enumerate(entries):
        written += 3 * PAGE_SIZE + (len(blob) if len(blob) < MIN_FILE_SIZE else 0)
        if written > PORTION_BYTES:
            yield entries[start : place + 1]
            start, written = place + 1, 0
    if start < len(entries):
        yield entries[start:]


class Room:
    """The room of one directory: what is needed least is removed for what is new.

    Where the rows of which region lie is found out once, in the order in which they were stored, and kept.

    Parameters
    ----------
    catalogue : Catalogue
        When regions were used.
    in_use : InUse
        Which ones may not go.
    evicts : bool
        Whether any may go.

    Attributes
    ----------
    refused : Pause
        Over where new rows need not be refused: after a while it is looked again what may go for them.
    """

    def __init__(self, catalogue: Catalogue, in_use: InUse, evicts: bool) -> None:
        self.refused = Pause()
        self._catalogue = catalogue
        self._in_use = in_use
        self._evicts = evicts
        self._said = False
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Look anew at what is there."""
        self._runs: dict[str | None, list[list[int]]] = {}
        self._newest: dict[str | None, float] = {}
        self._seen = -(2**63)
        self._last: str | None = None
        self._count = 0

    def make(self, cache: Rows, transact: Transact, tag: str, costs: Sequence[int], limit: int) -> bool:
        """Remove rows until new ones fit in and some more, or nothing else may go; whether that helped.

        Parameters
        ----------
        cache : Rows
            The directory.
        transact : callable
            Begins a transaction on it.
        tag : str
            The region that is to be stored, which is in use.
        costs : sequence of int
            Bytes that each of its rows takes.
        limit : int
            Bytes that the directory may hold.
        """
        directory = self._catalogue.folder.parent
        full = f"{directory} is full ({limit} bytes, max_persistent_cache_size)"
        with self._lock:
            if min(costs) > limit:
                return self._refuse(f"{full}: no more rows are stored there")
            if cache.room(limit) < -max(OTHERS * limit, OTHERS_BYTES):
                return self._refuse(
                    f"{directory} holds more than {limit} bytes (max_persistent_cache_size): no more rows are stored "
                    "there; torchcache prune makes it smaller"
                )
            if self._evicts and not self._look(cache):
                return False
            wanted = min(limit, max(sum(costs), int(limit * PORTION)))
            helped = False
            for old in self._least_used(tag) if self._evicts else ():
                removed, enough = self._evict(transact, old, wanted, limit)
                helped = helped or enough or removed > 0
                if enough:
                    break
            if not helped:
                return self._refuse(f"{full}{' of rows in use' if self._evicts else ''}: no more rows are stored there")
            if not self._said:
                logger.info("%s: rows that no process uses are removed to make room for new ones", full)
            self._said = True
            return True

    def _refuse(self, why: str) -> bool:
        self.forget()
        self.refused.begin()
        warn_once(why)
        return False

    def _evict(self, transact: Transact, tag: str | None, wanted: int, limit: int) -> tuple[int, bool]:
        """Remove rows of a region, in short transactions: how many, and whether there is room enough."""
        runs, removed = self._runs[tag], 0
        while runs:
            with transact() as cache:
                lacking = wanted - cache.room(limit)
                places, files = _remove(cache, tag, runs[0], lacking)
            for name in files:
                cache.disk.remove(name)
            removed += len(places)
            if lacking <= 0:
                return removed, True
            if places:
                runs[0][0] = places[-1] + 1
            else:
                runs.pop(0)
        del self._runs[tag]
        if tag is not None:
            self._catalogue.remove(tag)
        return removed, False

    def _look(self, cache: Rows) -> bool:
        """Find rows that were stored since the last time; whether that came to an end."""
        end = time.monotonic() + LOOK_SECONDS
        query = f"SELECT rowid, {_TAG}, {_STORED} FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT {ROWS_AT_ONCE}"
        while found := cache.fetch(query, (self._seen,), ROWS_AT_ONCE):
            for place, tag, stored in found:
                if place <= self._seen:
                    raise StoreDamagedError("pages are out of order: torchcache clear makes it a new, empty directory")
                self._note(place, tag, stored or 0.0)
            if time.monotonic() > end:
                return False
        return True

    def _note(self, place: int, tag: str | None, stored: float) -> None:
        runs = self._runs.setdefault(tag, [])
        if runs and (tag == self._last or self._count >= MOST_RUNS):
            runs[-1][1] = place
        else:
            runs.append([place, place])
            self._count += 1
        self._seen, self._last = place, tag
        self._newest[tag] = max(stored, self._newest.get(tag, -math.inf))

    def _least_used(self, tag: str) -> list[str | None]:
        """The regions whose rows may go, in their order."""
        used, exact = self._in_use.tags()
        found = {
            old: last_used(self._catalogue.get(old) if old is not None else None, self._newest[old])
            for old in self._runs
            if old != tag and old not in used
        }
        if not exact:
            since = time.time() - RECENT_SECONDS
            found = {old: moment for old, moment in found.items() if moment < since}
        return sorted(found, key=lambda old: found[old])


def _remove(cache: Rows, tag: str | None, run: list[int], lacking: int) -> tuple[list[int], list[str]]:
    """Remove the first rows of a run, some hundred at most: where they were, and the files to remove after them."""
    places, files = [], []
    query = (
        f"SELECT rowid, min(length(value), {MIN_FILE_SIZE}), {_FILENAME}, {_SIZE} FROM Cache "
        f"WHERE rowid BETWEEN ? AND ? AND {_TAG} IS ? ORDER BY rowid LIMIT {ROWS_AT_ONCE}"
    )
    for place, size, filename, claimed in cache.fetch(query, (*run, tag), ROWS_AT_ONCE) if lacking > 0 else ():
        if lacking <= 0:
            break
        places.append(place)
        lacking -= ROW_OVERHEAD
        if filename is None:
            lacking -= size or 0
            counted = 0
        else:
            files.append(filename)
            counted = cache.disk.bytes_of(filename)
            lacking -= counted
        if claimed != counted:
            cache.doubt()
    if places:
        cache.execute(f"DELETE FROM Cache WHERE rowid IN ({','.join('?' * len(places))})", places)
    return places, files
