"""Rows taken out of a cache directory: all, those of a region, or the least useful ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torchcache.store.connect import ROWS
from torchcache.store.gate import DATABASE, JOURNAL, SIDES
from torchcache.store.records import BATCH, Entry, Records
from torchcache.store.room import ROW_OVERHEAD
from torchcache.store.survey import Holding, survey

ROUNDS = 4


@dataclasses.dataclass
class Removal:
    """What was taken out.

    Parameters
    ----------
    directory : str
        From where.
    rows, entries, bytes : int
        Rows, entries of the database that held them, and bytes of their blobs.
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
    entries: int = 0
    bytes: int = 0
    regions: dict[str, int] = dataclasses.field(default_factory=dict)
    before: int = 0
    after: int = 0
    compacted: bool = True


def clear(records: Records, regions: list[Holding] | None = None) -> Removal:
    """Remove the rows of ``regions``, or all there are, with their records; no other file is touched."""
    removal = Removal(str(records.directory), before=records.volume())
    if regions is not None:
        _take(records, records.queue(held.tag for held in regions), removal)
        gone = {held.tag for held in regions}
    else:
        _take(records, records.entries(whole=False), removal)
        for name in records.disk.files():
            records.disk.remove(name)
        gone = {*removal.regions, *records.catalogue.read()}
    for tag in gone:
        records.catalogue.remove(tag)
    return _finish(records, removal)


def discard_database(directory: Path) -> None:
    """Remove a database that cannot be opened; its rows are lost, their files are orphans."""
    for name in (JOURNAL, *SIDES, DATABASE):
        (directory / ROWS / name).unlink(missing_ok=True)


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
    kept = [held.tag for held in regions if unused_since is None or held.last_used >= unused_since]
    unused = [held.tag for held in regions[: len(regions) - len(kept)]]
    _take(records, records.queue(unused), removal, dry_run=dry_run)
    if not dry_run:
        for tag in unused:
            records.catalogue.remove(tag)
    condition = "1"
    if stored_before is not None:
        gone = f"store_time < {float(stored_before)!r}"
        _take(records, records.queue(kept, gone), removal, dry_run=dry_run)
        condition = f"NOT ({gone})"
    if max_size is not None:
        _shrink(records, kept, max_size, condition if dry_run else "1", removal, dry_run)
    if dry_run:
        removal.after = max(0, removal.before - removal.bytes - ROW_OVERHEAD * removal.entries)
        return removal
    return _finish(records, removal)


def _shrink(records: Records, kept: list[str], max_size: int, condition: str, removal: Removal, dry_run: bool) -> None:
    if dry_run:
        excess = removal.before - removal.bytes - ROW_OVERHEAD * removal.entries - max_size
        _take(records, records.queue(kept, condition), removal, excess, dry_run=True)
        return
    for _ in range(ROUNDS):  # what a row takes in the database is known only once it is gone
        free = records.pragma("freelist_count") * records.pragma("page_size")
        before = removal.rows
        _take(records, records.queue(kept, condition), removal, records.volume() - free - max_size)
        if removal.rows == before:
            return


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
        removal.rows += entry.count
        removal.entries += 1
        removal.bytes += entry.length
        removal.regions[entry.tag] = removal.regions.get(entry.tag, 0) + entry.count
        excess -= entry.length + ROW_OVERHEAD
        if len(batch) >= BATCH:
            drop()
    drop()


def _finish(records: Records, removal: Removal) -> Removal:
    removal.compacted = records.compact()
    removal.after = records.volume()
    return removal
