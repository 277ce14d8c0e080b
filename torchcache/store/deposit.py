"""Blobs from elsewhere stored in a cache directory: only sound ones, and never over a sound row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from torchcache.errors import StoreError
from torchcache.store.catalogue import Catalogue, Region
from torchcache.store.connect import check_version
from torchcache.store.disk import DiskTier
from torchcache.store.records import UNKNOWN, Records

__all__ = ["Deposit", "merge"]

PIECE_BYTES = 32 * 1024 * 1024


class Deposit:
    """A directory that takes blobs in, made where there is none.

    Parameters
    ----------
    directory : Path
        The cache directory.
    limit : int
        Bytes that it may hold.

    Raises
    ------
    StoreError
        Where it cannot be opened.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        check_version(directory)
        self.directory = directory
        self.stored = self.present = self.bytes = self.left_out = 0
        self._limit = limit
        self._tier = DiskTier(directory)
        if not self._tier.writable:
            raise StoreError(f"{directory} cannot be opened for writing")
        self._records = Records(directory)
        self._catalogue = Catalogue(directory)

    def __enter__(self) -> Deposit:
        return self

    def __exit__(self, *_: object) -> None:
        self._records.__exit__()
        self._tier.close()

    def note(self, region: Region) -> None:
        """Put a region's record in the catalogue; one that is there keeps its name and the wider span of time."""
        known = self._catalogue.read().get(region.tag)
        if known is not None:
            region = dataclasses.replace(
                known,
                created=min(known.created, region.created),
                last_used=max(known.last_used, region.last_used),
            )
        self._catalogue.write(region)

    def add(self, tag: str, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Store those ``(key, blob)`` pairs that have no sound row here."""
        here = list(self._records.find([key for key, _ in entries]))
        damaged = [entry for entry in here if entry.check()[1] is not None]
        if damaged:
            self._records.remove(damaged)
        sound = {entry.key for entry in here} - {entry.key for entry in damaged}
        wanted = [(key, blob) for key, blob in entries if key not in sound]
        errors = self._tier.errors
        stored, size = self._tier.write(wanted, Region(tag, "", options={"max_persistent_cache_size": self._limit}))
        if self._tier.errors > errors:
            raise StoreError(f"{self.directory} cannot be written to: TORCHCACHE_LOG_LEVEL=INFO says why")
        self.present += len(sound)
        self.stored += stored
        self.bytes += size
        self.left_out += len(wanted) - stored


def merge(records: Records, deposit: Deposit, *, progress: Callable[[int], object] = lambda done: None) -> int:
    """Copy all sound rows of a directory; the number of damaged ones, which are left out.

    Parameters
    ----------
    records : Records
        The source, which is not changed.
    deposit : Deposit
        Where the rows go; it counts them.
    progress : callable
        Called with the number of rows done since its last call.
    """
    damaged = waiting = 0
    pieces: dict[str, list[tuple[bytes, bytes]]] = {}

    def store() -> None:
        nonlocal waiting
        for tag, entries in pieces.items():
            deposit.add(tag, entries)
        pieces.clear()
        waiting = 0

    for region in records.catalogue.read().values():
        deposit.note(region)
    for entry in records.entries():
        blob = _sound_blob(entry.check()[1], entry.read) if entry.tag != UNKNOWN else None
        if blob is None:
            damaged += 1
        else:
            pieces.setdefault(entry.tag, []).append((entry.key, blob))
            waiting += len(blob)
        if waiting >= PIECE_BYTES:
            store()
        progress(1)
    store()
    return damaged


def _sound_blob(wrong: str | None, read: Callable[[], bytes]) -> bytes | None:
    try:
        return read() if wrong is None else None
    except (OSError, ValueError):
        return None
