"""What a cache directory holds: figures by region, by call and by age, read without the user's code."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

from torchcache.errors import StoreError
from torchcache.store.blob import FORMAT_VERSION
from torchcache.store.catalogue import Region
from torchcache.store.records import LENGTH, TAG, UNKNOWN, Records

__all__ = ["Group", "Holding", "Info", "Stats", "find_region", "survey", "survey_calls"]

SAMPLE = 200
HOUR, DAY = 3600, 86400
AGES = (("hour", HOUR), ("day", DAY), ("7 days", 7 * DAY), ("30 days", 30 * DAY), ("older", None))


@dataclasses.dataclass(frozen=True)
class Holding:
    """The rows of one region.

    Parameters
    ----------
    tag : str
        Its fingerprint in hexadecimal, ``"unknown"`` for rows without one.
    region : Region or None
        Its catalogue record, if there is one.
    rows, bytes : int
        Rows, and bytes of their blobs.
    ratio : float or None
        Bytes of tensors per byte of blob, from up to 200 rows.
    oldest, newest : float
        When rows were stored, in seconds since the epoch.
    """

    tag: str
    region: Region | None
    rows: int
    bytes: int
    ratio: float | None
    oldest: float
    newest: float

    @property
    def last_used(self) -> float:
        """When the region was last used, as far as is known."""
        return max(self.newest, self.region.last_used if self.region else 0.0)


@dataclasses.dataclass(frozen=True)
class Info:
    """A cache directory and its regions.

    Parameters
    ----------
    directory : str
        Where it is.
    format : int
        Version of the blob format.
    volume : int
        Bytes of database pages and files, which is what the limit counts.
    limit : int or None
        The largest ``max_persistent_cache_size`` that the catalogue knows of.
    regions : list of Holding
        Most recently used first.
    """

    directory: str
    format: int
    volume: int
    limit: int | None
    regions: list[Holding]


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of one region that one kind of call stored: same input shapes, arguments and numeric mode.

    Parameters
    ----------
    tag, call : str
        Fingerprints of the region and of the call, in hexadecimal.
    leaves : list of str
        Dtype and shape of each output tensor of a row.
    rows, in_files : int
        Rows, and how many of them are files of their own.
    bytes, smallest, largest : int
        Bytes of blobs: all, and of one row.
    """

    tag: str
    call: str
    leaves: list[str]
    rows: int
    in_files: int
    bytes: int
    smallest: int
    largest: int


@dataclasses.dataclass(frozen=True)
class Stats:
    """How a cache directory is made up.

    Parameters
    ----------
    directory : str
        Where it is.
    rows, in_files : int
        Rows, and how many of them are files of their own.
    database, free, log, files : int
        Bytes of the database, of its unused pages, of its write-ahead log, and of the rows in files.
    ages : dict of str to int
        Rows stored within the last hour, day, 7 days, 30 days, and older ones; each counted once.
    groups : list of Group
        Largest first.
    """

    directory: str
    rows: int
    in_files: int
    database: int
    free: int
    log: int
    files: int
    ages: dict[str, int]
    groups: list[Group]


def survey(records: Records) -> Info:
    """The regions of a cache directory."""
    regions = records.catalogue.read()
    found = records.sql(
        f"SELECT {TAG}, count(*), sum({LENGTH}), min(store_time), max(store_time) FROM Cache GROUP BY 1"
    )
    holdings = []
    for tag, rows, size, oldest, newest in found:
        ratio = _ratio(records, tag)
        known = regions.pop(tag, None)
        holdings.append(Holding(tag or UNKNOWN, known, rows, int(size or 0), ratio, _time(oldest), _time(newest)))
    holdings += [Holding(tag, known, 0, 0, None, 0.0, 0.0) for tag, known in regions.items()]
    holdings.sort(key=lambda held: -held.last_used)
    limits = [held.region.options.get("max_persistent_cache_size") for held in holdings if held.region]
    limit = max((size for size in limits if isinstance(size, int)), default=None)
    return Info(str(records.directory), FORMAT_VERSION, records.volume(), limit, holdings)


def survey_calls(records: Records) -> Stats:
    """How the rows of a cache directory are made up."""
    found = records.sql(
        f"SELECT {TAG}, CASE WHEN length(key) = 32 THEN hex(substr(key, 1, 16)) END, "
        f"count(*), count(filename), sum({LENGTH}), min({LENGTH}), max({LENGTH}), min(rowid) FROM Cache GROUP BY 1, 2"
    )
    groups = []
    for tag, call, rows, in_files, size, smallest, largest, first in found:
        header = next((entry.header() for entry in records.entries("rowid = ?", (first,), whole=False)), None)
        leaves = [leaf_text(dtype, shape) for dtype, shape in header.spec.leaves] if header else ["unreadable"]
        name = (call or "").lower() or UNKNOWN
        groups.append(
            Group(tag or UNKNOWN, name, leaves, rows, in_files, int(size or 0), int(smallest or 0), int(largest or 0))
        )
    groups.sort(key=lambda group: -group.bytes)
    return Stats(
        str(records.directory),
        rows=sum(group.rows for group in groups),
        in_files=sum(group.in_files for group in groups),
        database=_size(records.database),
        free=records.pragma("freelist_count") * records.pragma("page_size"),
        log=_size(records.database.with_name("cache.db-wal")),
        files=records.volume() - records.pragma("page_count") * records.pragma("page_size"),
        ages=_ages(records),
        groups=groups,
    )


def find_region(info: Info, wanted: str) -> list[Holding]:
    """The regions that ``wanted`` names: the start of a fingerprint (4 digits at least), or a module path.

    Raises
    ------
    StoreError
        Where it names none, or fingerprints of several begin so.
    """
    by_tag = [held for held in info.regions if len(wanted) >= 4 and held.tag.startswith(wanted.lower())]
    by_name = [held for held in info.regions if held.region and _named(held.region.name, wanted)]
    found = by_name or by_tag
    if not found:
        known = ", ".join(f"{held.tag[:8]} ({held.region.name if held.region else '?'})" for held in info.regions[:10])
        raise StoreError(f"{info.directory} has no region {wanted!r}; it has: {known or 'none'}")
    if not by_name and len(found) > 1:
        raise StoreError(f"{wanted!r} begins {len(found)} fingerprints: {', '.join(held.tag for held in found)}")
    return found


def leaf_text(dtype: object, shape: tuple[int, ...]) -> str:
    """A leaf for people: ``float32 (3, 4)``."""
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _named(name: str, wanted: str) -> bool:
    parts = name.split(" + ")
    return wanted == name or wanted in parts or wanted in [part.partition(" (")[0] for part in parts]


def _ratio(records: Records, tag: str | None) -> float | None:
    plain = stored = 0
    for count, entry in enumerate(records.entries(f"{TAG} IS ?", (tag,), whole=False)):
        header = entry.header()
        if header is not None:
            plain += header.spec.size
            stored += entry.length - header.payload_at - 8
        if count + 1 >= SAMPLE:
            break
    return plain / stored if stored > 0 else None


def _time(value: object) -> float:
    return value if type(value) is float else 0.0


def _ages(records: Records) -> dict[str, int]:
    now = time.time()
    ages, before = {}, 0
    for name, seconds in AGES:
        since = now - seconds if seconds is not None else float("-inf")
        found = records.sql("SELECT count(*) FROM Cache WHERE store_time >= ?", (since,))
        total = found[0][0] if found else 0
        ages[name] = total - before
        before = total
    return ages


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0
