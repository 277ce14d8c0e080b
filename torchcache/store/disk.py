"""The disk tier: blobs read, written and dropped, with no failure of the store raised."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchcache.forks import without_forks
from torchcache.store.catalogue import Catalogue, Region
from torchcache.store.connect import Rows
from torchcache.store.database import KEYS_PER_QUERY, SELECT, SELECT_WITHOUT_VALUES, Database, Row
from torchcache.store.file import BlobFile
from torchcache.store.in_use import InUse
from torchcache.store.pack import CALL, join, rows_in, rows_of
from torchcache.store.packs import Packs
from torchcache.store.reader import Reader
from torchcache.store.room import Room, cost, portions
from torchcache.store.tier import Blob, Tier

# A portion is stored in so many parts, if room is made for each.
PARTS = 4

Places = npt.NDArray[np.int64]


class DiskTier(Database, Tier):
    """Blobs in a cache directory, shared by threads and processes; short ones of one call lie in packs.

    Parameters
    ----------
    directory, group
        As of ``Database``.
    evicts : bool
        Whether rows that are not in use give way to new ones when it is full.
    """

    def __init__(self, directory: Path, group: bool = False, evicts: bool = True) -> None:
        super().__init__(directory, group)
        self.catalogue = Catalogue(directory, self.access)
        self.in_use = InUse(self.catalogue, self.access)
        self._room = Room(self.catalogue, self.in_use, evicts)
        self._packs = Packs(weakref.proxy(self))  # closed as soon as nobody has it, not when garbage is collected

    @property
    def full(self) -> bool:
        """Whether new rows are refused, until it is looked again what may go for them."""
        return not self._room.refused.over

    def use(self, user: object, tag: str) -> None:
        """Keep the rows of region ``tag`` as long as ``user`` lives, who is held weakly."""
        if self.open():
            self.in_use.add(user, tag)

    @without_forks
    def read(self, keys: Sequence[bytes], region: Region | None = None, most: int = 0) -> dict[bytes, Blob]:
        """The blobs of those ``keys`` that are here, large ones still to be read from their files.

        One query serves a few hundred keys.
        """
        found: dict[bytes, Blob] = {}
        self._packs.read(keys, found)
        self._drop(self._packs.damaged())
        found.update(self.blobs(self.rows([key for key in keys if key not in found])))
        return found

    @without_forks
    def locate(self, after: bytes, last: bytes) -> Places:
        """Where the entries with keys beyond ``after`` and up to ``last`` are, in the order in which they lie."""
        places = self.each("SELECT rowid FROM Cache WHERE key > ? AND key <= ?", (after, last))  # by the index
        return np.unique(np.array(places, np.int64))

    @without_forks
    def read_at(self, places: Places, after: bytes, last: bytes) -> dict[bytes, Blob]:
        """The blobs at ``places``, at most some hundreds, as far as they are still those of such keys.

        Two to three times as fast as by key: rows that were stored together share pages.
        """
        if not self._reading.over or (cache := self._opened()) is None:
            return {}
        query = f"{SELECT} AND rowid IN ({','.join('?' * len(places))}) AND key > ? AND key <= ?"
        arguments = (*places.tolist(), after, last)
        there = self._guard("read", lambda: cache.fetch(query, arguments, len(places)), list[Row]())
        found, damaged = rows_of(self.blobs(there))
        self._drop(damaged)
        return found

    @without_forks
    def write(self, entries: Sequence[tuple[bytes, bytes]], region: Region) -> tuple[int, int]:
        """Store ``(key, blob)`` pairs, as many as the region's limit for the directory allows.

        Entries that are there stay as they are: another process may be reading their files.

        Returns
        -------
        stored : int
            Rows stored.
        size : int
            Bytes of their entries' blobs.
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
            lacking = self._packs.lacking(entries)
            self._drop(self._packs.damaged())
            for rest in portions(lacking):
                if not cache.fold():
                    self._writing.begin()
                    self.complain("has a long log that a long read keeps open: no more rows are stored for a while")
                    return
                for _ in range(PARTS):
                    done, rest = self._store(rest, region)
                    stored += sum(rows_in(key) for key, _ in done)
                    size += sum(len(blob) for _, blob in done)
                    if not rest:
                        break
                    costs = [cost(blob) for _, blob in rest]
                    if not self._room.make(cache, self._transact, region.tag, costs, region.limit):
                        return
            for call in {key[:CALL] for key, _ in entries}:
                self._join(call, region.tag)

        self._guard("written to", store, None)
        return stored, size

    def _store(
        self, entries: Sequence[tuple[bytes, bytes]], region: Region
    ) -> tuple[list[tuple[bytes, bytes]], Sequence[tuple[bytes, bytes]]]:
        """Store entries in one transaction: those that were stored, and those that did not fit in."""
        stored: list[tuple[bytes, bytes]] = []
        rest: Sequence[tuple[bytes, bytes]] = ()
        with self._transact() as cache:
            cache.measure()
            room = cache.room(region.limit)
            present = self._present(cache, [key for key, _ in entries])
            for place, (key, blob) in enumerate(entries):
                if key in present:
                    continue
                room -= cost(blob)
                if room < 0:
                    rest = entries[place:]
                    break
                cache.set(key, blob, tag=region.tag, retry=False)
                stored.append((key, blob))
        self._packs.note(stored)
        return stored, rest

    def _join(self, call: bytes, tag: str) -> None:
        """Put short packs of a call together."""
        keys = self._packs.short(call)
        if keys:
            with self._transact() as cache:
                short = self.blobs(self.rows(keys))
                joined = join(short)
                for key in short:
                    cache.delete(key, retry=False)
                for key, blob in joined:
                    cache.set(key, blob, tag=tag, retry=False)
            self._packs.discard(keys)
            self._packs.note(joined)

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
        self._packs.forget()
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
                packs = self._packs.find(damaged)
                inside = {key for rows in packs.values() for key, _ in rows}
                entries = {key: blob for key, blob in damaged.items() if key not in inside}
                for key, blob in {**entries, **dict.fromkeys(packs, b"")}.items():
                    if not self._is_gone(cache, key, blob):
                        cache.delete(key, retry=False)
                        cache.doubt()
                        dropped += 1
            self._packs.discard(packs)
            return dropped

        count = len(damaged)
        if count and self._writing.over and self.writable:
            count = self._guard("repaired", delete, count)
        if count:
            self.complain("held damaged rows, which were removed and are computed again", count)
        return True

    def _present(self, cache: Rows, keys: Sequence[bytes]) -> dict[bytes, Blob]:
        """Entries of ``keys`` that a reader would try."""
        present: dict[bytes, Blob] = {}
        for start in range(0, len(keys), KEYS_PER_QUERY):
            part = keys[start : start + KEYS_PER_QUERY]
            query = f"{SELECT_WITHOUT_VALUES} AND key IN ({','.join('?' * len(part))})"
            present.update(self.blobs(cache.fetch(query, part, len(part))))
        return present

    def _is_gone(self, cache: Rows, key: bytes, blob: Blob) -> bool:
        """Whether the entry that named the file ``blob`` is there no more."""
        if not isinstance(blob, BlobFile):
            return False
        rows = cache.fetch("SELECT substr(filename, 1, 64) FROM Cache WHERE raw = 1 AND key = ?", (key,), 1)
        return not rows or os.path.join(cache.directory, str(rows[0][0])) != blob.path

    def _abandon(self) -> None:
        """Start anew where the directory was deleted or replaced: SQLite would go on in files without a name."""
        with self._lock:
            self._cache = None
        self.in_use.forget()
        self._room.forget()
        self._packs.forget()
        self.complain("was deleted or replaced while in use and is filled anew")


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
