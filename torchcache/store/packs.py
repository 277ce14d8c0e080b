"""Which rows the packs of a directory hold, and where: learnt from their first bytes, and kept in memory."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchcache.store.blob import BlobError
from torchcache.store.database import Database
from torchcache.store.pack import (
    CALL,
    DIGEST,
    LONGEST_PACK,
    MARK,
    Pack,
    digests_in,
    head_size,
    is_pack,
    packed,
)
from torchcache.store.tier import Blob

# Calls whose packs are known; who asks for one more has those of all others looked for anew.
MOST_CALLS = 256
MOST_PACKS = 1_000_000
# It is looked for packs of others as often as that takes this share of the time, or after so many seconds.
SHARE, LONGEST_WAIT = 0.01, 2.0
# Rows that are not sorted: so many at once, and all in all so many, or as many as half of the sorted ones.
MOST_AT_ONCE, MOST_FRESH = 2000, 50_000
# A pack that is shorter is put together with others of this process, once these make a long one.
SHORT = LONGEST_PACK * 7 // 8

# A pack, by its number, and a row of it.
_Place = tuple[int, int]


class _Sorted(NamedTuple):
    """Rows in the order of the first halves of their digests."""

    firsts: npt.NDArray[np.uint64]
    seconds: npt.NDArray[np.uint64]
    packs: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]


class _Call:
    """The packs of one kind of call, and where in them each of its rows is."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self.keys: list[bytes] = []
        # Packs that this process stored and that are not long, with their bytes.
        self.short: dict[bytes, int] = {}
        self.next_look = 0.0
        self._fresh: dict[bytes, _Place] = {}
        self._sorted: _Sorted | None = None

    def add(self, named: Mapping[bytes, bytes], lock: threading.Lock) -> None:
        """Take note of packs: key to the digests of their rows."""
        with lock:
            new = {key: digests for key, digests in named.items() if key not in self.numbers}
            numbers = range(len(self.keys), len(self.keys) + len(new))
            self.numbers.update(zip(new, numbers, strict=True))
            self.keys.extend(new)
            counts = [len(digests) // DIGEST for digests in new.values()]
            if sum(counts) > MOST_AT_ONCE:
                rows = np.concatenate([np.arange(count) for count in counts])
                self._sort(b"".join(new.values()), np.repeat(numbers, counts), rows)
                return
            for number, digests in zip(numbers, new.values(), strict=True):
                starts = range(0, len(digests), DIGEST)
                self._fresh.update((digests[at : at + DIGEST], (number, row)) for row, at in enumerate(starts))
            if len(self._fresh) > max(MOST_FRESH, 0 if self._sorted is None else len(self._sorted.firsts) // 2):
                places = np.array(list(self._fresh.values()), np.int32).reshape(-1, 2)
                self._sort(b"".join(self._fresh), places[:, 0], places[:, 1])
                self._fresh = {}

    def discard(self, packs: set[bytes]) -> None:
        """Forget packs that are not there any more, and look which are."""
        self.next_look = 0.0
        numbers = {self.numbers.pop(key) for key in packs & self.numbers.keys()}
        self.short = {key: size for key, size in self.short.items() if key not in packs}
        self._fresh = {digest: place for digest, place in self._fresh.items() if place[0] not in numbers}
        if self._sorted is not None:
            stay = ~np.isin(self._sorted.packs, list(numbers))
            self._sorted = _Sorted._make(column[stay] for column in self._sorted) if stay.any() else None

    def find(self, digests: Sequence[bytes]) -> list[_Place | None]:
        """Where each of the rows is."""
        places: list[_Place | None] = list(map(self._fresh.get, digests))
        known = self._sorted
        if known is None or not digests:
            return places
        halves = _halves(b"".join(digests))
        at = np.searchsorted(known.firsts, halves[:, 0])
        at[at == len(known.firsts)] = 0
        same = (known.firsts[at] == halves[:, 0]) & (known.seconds[at] == halves[:, 1])
        for place in np.flatnonzero(same).tolist():
            if places[place] is None:
                places[place] = int(known.packs[at[place]]), int(known.rows[at[place]])
        return places

    def _sort(self, digests: bytes, packs: npt.NDArray[Any], rows: npt.NDArray[Any]) -> None:
        """Put rows among the sorted ones, before those of the same digest."""
        halves = _halves(digests)
        parts: list[Sequence[npt.NDArray[Any]]] = [
            (halves[:, 0], halves[:, 1], packs.astype(np.int32), rows.astype(np.int32))
        ]
        if self._sorted is not None:
            parts.append(self._sorted)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        self._sorted = _Sorted._make(column[order] for column in columns)


def _halves(digests: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


class Packs:
    """The packs of one directory, by call. Several threads may use it at once.

    Parameters
    ----------
    database : Database
        Where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._calls: dict[bytes, _Call] = {}
        self._damaged: dict[bytes, Blob] = {}

    def forget(self) -> None:
        """Look for packs anew."""
        with self._lock:
            self._calls = {}

    def read(self, keys: Sequence[bytes], found: dict[bytes, Blob]) -> None:
        """Put the blobs of those rows that packs have into ``found``.

        Parameters
        ----------
        keys : sequence of bytes
            Of the rows.
        found : dict of bytes to blob
            By key.
        """
        for _ in range(2):  # packs that are gone were put together with others: a second look finds those
            places = self.find([key for key in keys if key not in found])
            gone, damaged = self._open(places, found)
            self._damaged.update(damaged)
            self.discard([*gone, *damaged])
            if not gone:
                break

    def damaged(self) -> dict[bytes, Blob]:
        """Packs that turned out to be damaged since this was last asked."""
        with self._lock:
            found, self._damaged = self._damaged, {}
        return found

    def find(self, keys: Iterable[bytes]) -> dict[bytes, list[tuple[bytes, int]]]:
        """The packs that have any of the rows, each with pairs of a row's key and its place."""
        found: dict[bytes, list[tuple[bytes, int]]] = {}
        for call, some in itertools.groupby(keys, lambda key: key[:CALL]):
            rows = list(some)
            digests = [key[CALL:] for key in rows]
            known, places = self._places(call, digests)
            if None in places and time.monotonic() >= known.next_look and self._database.open():
                known.next_look, start = math.inf, time.monotonic()
                try:
                    named, damaged = self._look(call, known)
                    self._damaged.update(damaged)
                    known.add(named, self._lock)
                finally:
                    now = time.monotonic()
                    known.next_look = now + min((now - start) / SHARE, LONGEST_WAIT)
                known, places = self._places(call, digests)
            for key, place in zip(rows, places, strict=True):
                if place is not None:
                    found.setdefault(known.keys[place[0]], []).append((key, place[1]))
        return found

    def lacking(self, entries: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Rows that no pack has, as entries to store: short ones in packs."""
        known = self.find([key for key, _ in entries])
        present = {key for rows in known.values() for key, _ in rows}
        return packed([entry for entry in entries if entry[0] not in present])

    def note(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Take note of entries that this process stored: those of them that are packs."""
        for key, blob in entries:
            if is_pack(key):
                known, _ = self._places(key[:CALL], [])
                known.add({key: digests_in(key, blob)}, self._lock)
                if len(blob) < SHORT:
                    known.short[key] = len(blob)

    def discard(self, packs: Collection[bytes]) -> None:
        """Packs that are there no more."""
        for call, some in itertools.groupby(sorted(packs), lambda key: key[:CALL]):
            with self._lock:
                if call in self._calls:
                    self._calls[call].discard(set(some))

    def short(self, call: bytes) -> list[bytes]:
        """Packs that this process stored and that make a long one together; none of them is named again."""
        known, _ = self._places(call, [])
        if sum(known.short.values()) < LONGEST_PACK:
            return []
        found, known.short = list(known.short), {}
        return found

    def _places(self, call: bytes, digests: Sequence[bytes]) -> tuple[_Call, list[_Place | None]]:
        with self._lock:
            known = self._calls.get(call)
            if known is None:
                if len(self._calls) >= MOST_CALLS:
                    self._calls.clear()
                known = self._calls[call] = _Call()
            return known, known.find(digests)

    def _look(self, call: bytes, known: _Call) -> tuple[dict[bytes, bytes], dict[bytes, Blob]]:
        """Packs of a call that are not known: key to the digests of their rows; and those that do not tell them."""
        query = f"SELECT key FROM Cache WHERE raw = 1 AND key > ? AND key < ? LIMIT {MOST_PACKS}"
        listed = self._database.each(query, (call + MARK, call + MARK + b"\xff" * 9))
        new = [key for key in listed if type(key) is bytes and len(key) == 32 and key not in known.numbers]
        found: dict[bytes, bytes] = {}
        damaged: dict[bytes, Blob] = {}
        longest = min(max(map(head_size, new), default=0), LONGEST_PACK)
        for key, head in self._database.rows(new, _select("substr(value, 1, ?)"), (longest,)):
            digests = digests_in(key, head) if type(head) is bytes else b""
            if digests:
                found[key] = digests
            else:
                damaged[key] = b""
        return found, damaged

    def _open(
        self, places: Mapping[bytes, Sequence[tuple[bytes, int]]], found: dict[bytes, Blob]
    ) -> tuple[set[bytes], dict[bytes, Blob]]:
        """Put the blobs of rows at ``places`` into ``found``; the packs that cannot be read, and damaged ones."""
        gone = set(places)
        damaged: dict[bytes, Blob] = {}
        for key, blob in self._database.rows(list(places), _select("value")):
            gone.discard(key)
            try:
                pack = Pack(key, blob)
                found.update((row, pack.blob(place)) for row, place in places[key] if place < len(pack))
            except BlobError:
                damaged[key] = b""
        return gone, damaged


def _select(value: str) -> str:
    """A query for entries none of which is longer than a pack."""
    short = f"typeof(value) = 'blob' AND length(value) <= {LONGEST_PACK}"
    return f"SELECT key, CASE WHEN {short} THEN {value} END FROM Cache WHERE raw = 1"
