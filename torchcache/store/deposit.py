"""Blobs from elsewhere stored: only sound ones, and never over a sound row."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torchcache.errors import StoreError
from torchcache.store.catalogue import Catalogue, Region
from torchcache.store.connect import check_version
from torchcache.store.disk import DiskTier
from torchcache.store.records import UNKNOWN, Records

PIECE_BYTES = 32 * 1024 * 1024


class Deposit(abc.ABC):
    """What takes blobs in, and counts them.

    Attributes
    ----------
    name : str
        Where it is, for people.
    stored, present, bytes, left_out : int
        Rows that are new, were there, the bytes of the new ones, and rows that did not fit in.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stored = self.present = self.bytes = self.left_out = 0

    def __enter__(self) -> Deposit:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def note(self, region: Region) -> None:
        """Put a region's record there; one that is there keeps its name and the wider span of time."""

    @abc.abstractmethod
    def add(self, tag: str, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Store those ``(key, blob)`` pairs that have no sound row here."""

    def close(self) -> None:
        """No more is added."""
        return


class DirectoryDeposit(Deposit):
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
        super().__init__(str(directory))
        check_version(directory)
        self._limit = limit
        self._tier = DiskTier(directory, evicts=False)
        if not self._tier.writable:
            raise StoreError(f"{directory} cannot be opened for writing")
        self._records = Records(directory)
        self._catalogue = Catalogue(directory)

    def close(self) -> None:
        """Close the directory."""
        self._records.__exit__()
        self._tier.close()

    def note(self, region: Region) -> None:
        """Put a region's record in the catalogue."""
        known = self._catalogue.read().get(region.tag)
        self._catalogue.write(region if known is None else known.spanning(region))

    def add(self, tag: str, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Store those pairs that have no sound row here; a damaged one gives way."""
        here = list(self._records.find([key for key, _ in entries]))
        damaged = [entry for entry in here if entry.check()[1] is not None]
        if damaged:
            self._records.remove(damaged)
        sound = {entry.key for entry in here} - {entry.key for entry in damaged}
        region = Region(tag, "", options={"max_persistent_cache_size": self._limit})
        sound |= self._tier.read([key for key, _ in entries if key not in sound], region).keys()
        wanted = [(key, blob) for key, blob in entries if key not in sound]
        errors = self._tier.errors
        stored, size = self._tier.write(wanted, region)
        if self._tier.errors > errors:
            raise StoreError(f"{self.name} cannot be written to: TORCHCACHE_LOG_LEVEL=INFO says why")
        self.present += len(sound)
        self.stored += stored
        self.bytes += size
        self.left_out += len(wanted) - stored


def merge(regions: Iterable[Region], rows: Iterable[tuple[str, bytes, bytes | None]], deposit: Deposit) -> int:
    """Copy all sound rows; the number of damaged ones, which are left out.

    Parameters
    ----------
    regions : iterable of Region
        Records of the source.
    rows : iterable of (str, bytes, bytes or None)
        Its rows: tag, key and blob, ``None`` for one that is damaged.
    deposit : Deposit
        Where they go; it counts them.
    """
    damaged = waiting = 0
    pieces: dict[str, list[tuple[bytes, bytes]]] = {}

    def store() -> None:
        nonlocal waiting
        for tag, entries in pieces.items():
            deposit.add(tag, entries)
        pieces.clear()
        waiting = 0

    for region in regions:
        deposit.note(region)
    for tag, key, blob in rows:
        if blob is None:
            damaged += 1
            continue
        pieces.setdefault(tag, []).append((key, blob))
        waiting += len(blob)
        if waiting >= PIECE_BYTES:
            store()
    store()
    return damaged


def rows_of(records: Records, progress: Callable[[int], object]) -> Iterator[tuple[str, bytes, bytes | None]]:
    """The rows of a directory, as ``merge`` takes them."""
    for entry in records.entries():
        rows: dict[bytes, bytes] = {}
        if entry.tag != UNKNOWN and entry.check()[1] is None:
            with contextlib.suppress(OSError, ValueError):
                rows = entry.rows()
        yield from ((entry.tag, key, blob) for key, blob in rows.items())
        if not rows:
            yield from [(entry.tag, entry.key, None)] * entry.count
        progress(1)
