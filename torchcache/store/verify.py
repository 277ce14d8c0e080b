"""Every entry of a cache directory checked, and what is damaged dropped."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator

from torchcache.errors import StoreError
from torchcache.store.records import BATCH, Entry, Records

# A file is written before its entry: only one older than this has certainly lost its entry.
GRACE_SECONDS = 60.0


@dataclasses.dataclass
class Verdict:
    """What a check of a directory found.

    Parameters
    ----------
    directory : str
        Where it is.
    checked, bytes : int
        Rows, and bytes of their blobs.
    damaged : dict of str to int
        What is wrong to the number of rows it is wrong with.
    orphans : int
        Files of blobs that no entry names.
    database : list of str
        What SQLite's own check says, where it is not content.
    repaired : int
        Rows and files that were dropped.
    reindexed : bool
        Whether building its indices anew repaired the database.
    """

    directory: str
    checked: int = 0
    bytes: int = 0
    damaged: dict[str, int] = dataclasses.field(default_factory=lambda: collections.defaultdict(int))
    orphans: int = 0
    database: list[str] = dataclasses.field(default_factory=list)
    repaired: int = 0
    reindexed: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.damaged or self.orphans or self.database)


def verify(records: Records, *, repair: bool = True, progress: Callable[[int], object] = lambda done: None) -> Verdict:
    """Check each entry of a cache directory: key, file name, header, lengths, checksum, frame.

    Parameters
    ----------
    records : Records
        The directory.
    repair : bool
        Drop what is damaged and files that no entry names; their rows are computed anew when next asked for.
    progress : callable
        Called with the number of entries checked since its last call.

    Returns
    -------
    Verdict
        What was found.
    """
    verdict = Verdict(str(records.directory))
    verdict.database = _integrity(records)
    damaged: list[Entry] = []

    def drop() -> None:
        if repair and damaged:
            records.remove(damaged)
            verdict.repaired += sum(entry.count for entry in damaged)
        damaged.clear()

    for entry in records.entries():
        _, wrong = entry.check()
        verdict.checked += entry.count
        verdict.bytes += entry.length
        if wrong is not None and not _gone(records, entry):
            verdict.damaged[wrong] += entry.count
            damaged.append(entry)
        if len(damaged) >= BATCH:
            drop()
        progress(1)
    drop()
    for name in _orphans(records):
        verdict.orphans += 1
        if repair:
            records.disk.remove(name)
            verdict.repaired += 1
    if verdict.database and repair:
        verdict.reindexed = _reindex(records)
    verdict.damaged = dict(verdict.damaged)
    return verdict


def _integrity(records: Records) -> list[str]:
    found = [str(row[0]) for row in records.sql("PRAGMA integrity_check(10)", most=10)]
    return [] if found == ["ok"] else found


def _gone(records: Records, entry: Entry) -> bool:
    """Whether another process dropped or replaced the entry since it was read."""
    found = records.sql("SELECT filename, store_time FROM Cache WHERE rowid = ?", (entry.rowid,))
    return not found or (entry.problem is None and found[0] != (entry.filename, entry.stored))


def _orphans(records: Records) -> Iterator[str]:
    """Files that were there for a while and that no entry names."""
    now = time.time()
    # A temporary table, which SQLite keeps on disk where it grows.
    records.sql("CREATE TEMP TABLE IF NOT EXISTS named (filename PRIMARY KEY) WITHOUT ROWID")
    records.sql("INSERT OR IGNORE INTO named SELECT filename FROM Cache WHERE filename IS NOT NULL")
    for name in records.disk.files():
        with contextlib.suppress(OSError):
            old = now - os.lstat(records.rows / name).st_mtime > GRACE_SECONDS
            if old and not records.sql("SELECT 1 FROM named WHERE filename = ?", (name,)):
                yield name


def _reindex(records: Records) -> bool:
    """Build the indices anew, which is all of a damaged database that can be; whether that helped."""
    with contextlib.suppress(StoreError):
        records.sql("REINDEX")
        return not _integrity(records)
    return False
