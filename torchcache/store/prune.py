"""Rows taken out of a cache directory: all, those of a region, or the least useful ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torchcache.store.blob import FORMAT_VERSION
from torchcache.store.disk import ROW_OVERHEAD
from torchcache.store.records import BATCH, TAG, UNKNOWN, Entry, Records
from torchcache.store.survey import Holding, survey

__all__ = ["Removal", "clear", "discard_database", "prune"]

ROUNDS = 4


@dataclasses.dataclass
class Removal:
    """What was taken out.

    Parameters
    ----------
    directory : str
        From where.
    rows, bytes : int
        Rows, and bytes of their blobs.
    regions : dict of str to int
        Rows by region.
    before, after : int
        Bytes of the directory, as the size limit counts them.
    compacted : bool
        Whether the freed pages went back to the file system; other processes at work can prevent it, and then they
        are filled first.
    """

    directory: str
    rows: int = 0
    bytes: int = 0
    regions: dict[str, int] = dataclasses.field(default_factory=dict)
    before: int = 0
    after: int = 0
    compacted: bool = True


def clear(records: Records, regions: list[Holding] | None = None) -> Removal:
    """Remove the rows of ``regions``, or all there are, with their records; no other file is touched."""
    removal = Removal(str(records.directory), before=records.volume())
    every = survey(records).regions if regions is None else regions
    for held in every:
        _take(records, _entries_of(records, held.tag), removal)
        records.catalogue.remove(held.tag)
    if regions is None:
        _take(records, records.entries(whole=False), removal)
        for name in records.files():
            records.remove_file(name)
    return _finish(records, removal)


def discard_database(directory: Path) -> None:
    """Remove a database that cannot be opened; its rows are lost, their files are orphans."""
    for name in ("cache.db-wal", "cache.db-shm", "cache.db"):
        (directory / f"rows-{FORMAT_VERSION}" / name).unlink(missing_ok=True)


def prune(
    records: Records,
    *,
    max_size: int | None = None,
    stored_before: float | None = None,
    unused_since: float | None = None,
    dry_run: bool = False,
) -> Removal:
    """Remove rows that are old or of regions that nobody used, then as many as a size asks for.

    Parameters
    ----------
    records : Records
        The directory.
    max_size : int or None
        Bytes that the directory may hold afterwards. Rows of the least recently used region go first, within a
        region those first stored.
    stored_before, unused_since : float or None
        Seconds since the epoch: rows stored before the one, all rows of regions not used since the other.
    dry_run : bool
        Remove nothing, tell what would go.

    Returns
    -------
    Removal
        What went. Of a dry run, ``after`` is an estimate.
    """
    removal = Removal(str(records.directory), before=records.volume())
    regions = sorted(survey(records).regions, key=lambda held: held.last_used)
    kept = []
    for held in regions:
        if unused_since is not None and held.last_used < unused_since:
            _take(records, _entries_of(records, held.tag), removal, dry_run=dry_run)
            if not dry_run:
                records.catalogue.remove(held.tag)
        else:
            kept.append(held)
    condition = "1"
    if stored_before is not None:
        gone = f"store_time < {float(stored_before)!r}"
        for held in kept:
            _take(records, _entries_of(records, held.tag, gone), removal, dry_run=dry_run)
        condition = f"NOT ({gone})"
    if max_size is not None:
        _shrink(records, kept, max_size, condition if dry_run else "1", removal, dry_run)
    if dry_run:
        removal.after = max(0, removal.before - removal.bytes - ROW_OVERHEAD * removal.rows)
        return removal
    return _finish(records, removal)


def _shrink(
    records: Records, kept: list[Holding], max_size: int, condition: str, removal: Removal, dry_run: bool
) -> None:
    if dry_run:
        excess = removal.before - removal.bytes - ROW_OVERHEAD * removal.rows - max_size
        _take_excess(records, kept, excess, condition, removal, dry_run)
        return
    for _ in range(ROUNDS):  # what a row takes in the database is known only once it is gone
        removal.compacted = records.compact()
        free = records.pragma("freelist_count") * records.pragma("page_size")
        excess = records.volume() - free - max_size
        if excess <= 0 or not _take_excess(records, kept, excess, condition, removal, dry_run):
            return


def _take_excess(
    records: Records, kept: list[Holding], excess: int, condition: str, removal: Removal, dry_run: bool
) -> int:
    taken = 0
    for held in kept:
        if excess <= 0:
            break
        before = removal.bytes, removal.rows
        _take(records, _entries_of(records, held.tag, condition), removal, excess, dry_run=dry_run)
        rows = removal.rows - before[1]
        excess -= removal.bytes - before[0] + ROW_OVERHEAD * rows
        taken += rows
    return taken


def _entries_of(records: Records, tag: str, condition: str = "1") -> Iterable[Entry]:
    where = f"{TAG} IS ? AND ({condition})"
    return records.entries(where, (None if tag == UNKNOWN else tag,), whole=False)


def _take(
    records: Records, entries: Iterable[Entry], removal: Removal, excess: float = float("inf"), dry_run: bool = False
) -> None:
    """Remove ``entries`` in their order until ``excess`` bytes are gone."""
    batch: list[Entry] = []

    def drop() -> None:
        if not dry_run and batch:
            records.remove(batch)
        batch.clear()

    for entry in entries:
        if excess <= 0:
            break
        batch.append(entry)
        removal.rows += 1
        removal.bytes += entry.length
        removal.regions[entry.tag] = removal.regions.get(entry.tag, 0) + 1
        excess -= entry.length + ROW_OVERHEAD
        if len(batch) >= BATCH:
            drop()
    drop()


def _finish(records: Records, removal: Removal) -> Removal:
    removal.compacted = records.compact()
    removal.after = records.volume()
    return removal
