"""What a cache directory holds: figures by region, by call and by age, read without the user's code."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import operator
import os
import time
from pathlib import Path

from torchcache.errors import StoreError
from torchcache.store.blob import FORMAT_VERSION, RowSpec
from torchcache.store.catalogue import Region, last_used
from torchcache.store.gate import LOG
from torchcache.store.pack import MARK, rows_in
from torchcache.store.records import LENGTH, TAG, UNKNOWN, Records

# Rows whose headers are read: of one region, and of all.
SAMPLE, MOST_SAMPLES = 200, 20_000
HOUR, DAY = 3600, 86400
# The beginning of a pack's key, with its number of rows; ``NULL`` for other entries.
_PACK = f"CASE WHEN length(key) = 32 AND substr(key, 17, 8) = x'{MARK.hex()}' THEN substr(key, 1, 27) END"
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
        return last_used(self.region, self.newest)


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
        Bytes of blobs: all, and of one row; of short rows that are packed together, their share of a pack.
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
    """How a cache directory, or what a server has, is made up.

    Parameters
    ----------
    directory : str
        Where it is.
    rows, in_files : int
        Rows, and how many of them are files of their own.
    groups : list of Group
        Largest first.
    database, free, log, files : int or None
        Bytes of the database, of its unused pages, of its write-ahead log, and of the rows in files; ``None`` for a
        server.
    ages : dict of str to int
        Rows stored within the last hour, day, 7 days, 30 days, and older ones, each counted once; empty for a server,
        which does not say.
    """

    directory: str
    rows: int
    in_files: int
    groups: list[Group]
    database: int | None = None
    free: int | None = None
    log: int | None = None
    files: int | None = None
    ages: dict[str, int] = dataclasses.field(default_factory=dict)


def survey(records: Records) -> Info:
    """The regions of a cache directory."""
    regions = records.catalogue.read()
    counts: dict[str | None, _Count] = {}
    for place, tag, pack, size, stored in records.each(
        f"SELECT rowid, {TAG}, {_PACK}, {LENGTH}, store_time FROM Cache"
    ):
        counts.setdefault(tag, _Count()).add(place, _rows(pack), size, stored)
    each = max(1, MOST_SAMPLES // max(1, len(counts)))
    ratios = _ratios(records, [place for count in counts.values() for place in count.places[:each]])
    holdings = []
    for tag, count in counts.items():
        known = regions.pop(tag, None) if tag else None
        ratio = ratios.get(tag or UNKNOWN)
        holdings.append(Holding(tag or UNKNOWN, known, count.rows, count.bytes, ratio, count.oldest, count.newest))
    holdings += [Holding(tag, known, 0, 0, None, 0.0, 0.0) for tag, known in regions.items()]
    holdings.sort(key=lambda held: -held.last_used)
    limits = [held.region.options.get("max_persistent_cache_size") for held in holdings if held.region]
    limit = max((size for size in limits if isinstance(size, int)), default=None)
    return Info(str(records.directory), FORMAT_VERSION, records.volume(), limit, holdings)


@dataclasses.dataclass
class _Count:
    """What one pass over the rows adds up for a region."""

    rows: int = 0
    bytes: int = 0
    oldest: float = math.inf
    newest: float = 0.0
    places: list[int] = dataclasses.field(default_factory=list)

    def add(self, place: int, rows: int, size: object, stored: object) -> None:
        self.rows += rows
        self.bytes += size if type(size) is int else 0
        moment = stored if type(stored) is float else 0.0
        self.oldest, self.newest = min(self.oldest, moment), max(self.newest, moment)
        if len(self.places) < SAMPLE:
            self.places.append(place)


def survey_calls(records: Records) -> Stats:
    """How the rows of a cache directory are made up."""
    found = records.each(
        f"SELECT {TAG}, CASE WHEN length(key) = 32 THEN hex(substr(key, 1, 16)) END, {_PACK}, "
        f"count(*), count(filename), sum({LENGTH}), min({LENGTH}), max({LENGTH}), min(rowid) FROM Cache "
        "GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    groups = []
    for (tag, call), parts in itertools.groupby(list(found), lambda part: part[:2]):
        packs, entries, files, sizes, least, most, places = zip(*(part[2:] for part in parts), strict=True)
        header = next((entry.header() for entry in records.at(places[:1])), None)
        leaves = leaf_texts(header.spec) if header else ["unreadable"]
        name = (call or "").lower() or UNKNOWN
        each = list(map(_rows, packs))
        rows = sum(map(operator.mul, each, entries))
        smallest = min(int(size or 0) // count for size, count in zip(least, each, strict=True))
        largest = max(int(size or 0) // count for size, count in zip(most, each, strict=True))
        size = sum(int(size or 0) for size in sizes)
        groups.append(Group(tag or UNKNOWN, name, leaves, rows, sum(files), size, smallest, largest))
    groups.sort(key=lambda group: -group.bytes)
    return Stats(
        str(records.directory),
        rows=sum(group.rows for group in groups),
        in_files=sum(group.in_files for group in groups),
        database=_size(records.database),
        free=records.pragma("freelist_count") * records.pragma("page_size"),
        log=_size(records.database.with_name(LOG)),
        files=records.disk.volume(),
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


def leaf_texts(spec: RowSpec) -> list[str]:
    """The leaves of a row for people: ``float32 (3, 4)``."""
    return [f"{str(dtype).removeprefix('torch.')} {tuple(shape)}" for dtype, shape in spec.leaves]


def _named(name: str, wanted: str) -> bool:
    parts = name.split(" + ")
    return wanted == name or wanted in parts or wanted in [part.partition(" (")[0] for part in parts]


def _ratios(records: Records, places: list[int]) -> dict[str, float]:
    """Bytes of tensors per byte of blob by region, from the rows at ``places``."""
    plain: dict[str, int] = collections.defaultdict(int)
    stored: dict[str, int] = collections.defaultdict(int)
    for entry in records.at(places):
        header = entry.header()
        if header is not None:
            plain[entry.tag] += header.spec.size * entry.count
            stored[entry.tag] += header.stored_in(entry.length)
    return {tag: size / stored[tag] for tag, size in plain.items() if stored[tag] > 0}


def _ages(records: Records) -> dict[str, int]:
    now = time.time()
    ages, before = {}, 0
    for name, seconds in AGES:
        since = now - seconds if seconds is not None else float("-inf")
        found = records.each(f"SELECT {_PACK}, count(*) FROM Cache WHERE store_time >= ? GROUP BY 1", (since,))
        total = sum(_rows(pack) * count for pack, count in found)
        ages[name] = total - before
        before = total
    return ages


def _rows(pack: bytes | None) -> int:
    return rows_in(pack) if pack is not None else 1


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0
