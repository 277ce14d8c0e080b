"""What was cached so far: counters by region, and their table."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import nn

from torchcache.graph.marked import Mark
from torchcache.graph.region import lookups_of
from torchcache.lookup.cache_lookup import CacheLookup
from torchcache.lookup.history import Point
from torchcache.table import Table, Tabular, size_text

__all__ = ["RegionStats", "Stats", "lookups_in", "stats"]


@dataclasses.dataclass(frozen=True)
class RegionStats:
    """The counters of one region.

    Parameters
    ----------
    name : str
        Module path and class.
    memory_hits, disk_hits, misses, bypasses : int
        Rows served by each tier, computed and stored, computed only.
    rows_stored : int
        Rows in memory now.
    rows_written, disk_errors : int
        Rows that this process wrote to disk, and store failures it met there.
    memory_bytes, disk_bytes : int
        Bytes of rows in memory now, and of blobs that this process wrote.
    hash_seconds, lookup_seconds, compute_seconds, merge_seconds : float
        Where the time went.
    saved_seconds : float or None
        Time the hits would have taken, less what the cache took; ``None`` while no miss told how long a row takes.
    history : tuple of Point
        The counters at up to 1,024 earlier calls, evenly spaced, and now.
    """

    name: str
    memory_hits: int
    disk_hits: int
    misses: int
    bypasses: int
    rows_stored: int
    rows_written: int
    disk_errors: int
    memory_bytes: int
    disk_bytes: int
    hash_seconds: float
    lookup_seconds: float
    compute_seconds: float
    merge_seconds: float
    saved_seconds: float | None
    history: tuple[Point, ...] = dataclasses.field(repr=False)

    @property
    def rows(self) -> int:
        """Rows looked up."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of the rows looked up that were hits; 0 without any."""
        return self.hits / self.rows if self.rows else 0.0

    @property
    def hit_rates(self) -> tuple[float, ...]:
        """The hit rate in each pass over the data, the last one as far as it got.

        A pass is as many rows as the region met different ones, which is what it has in memory: with one data set,
        an epoch. Empty where memory does not hold all of them, since then a row's return cannot be told.
        """
        different = self.misses + self.disk_hits
        if not different or self.rows_stored < different:
            return ()
        rows = [0, *(point.rows for point in self.history)]
        hits = [0, *(point.memory_hits + point.disk_hits for point in self.history)]
        ends = [*range(0, self.rows, different), self.rows]
        return tuple((np.diff(np.interp(ends, rows, hits)) / np.diff(ends)).tolist())

    @property
    def hits(self) -> int:
        """Rows served by any tier."""
        return self.memory_hits + self.disk_hits

    @classmethod
    def of(cls, lookup: CacheLookup) -> RegionStats:
        """The counters of ``lookup`` as they are now."""
        counters, tiers = lookup.counters, lookup.tiers
        now = Point.of(counters, tiers.memory.used, tiers.disk_bytes)
        return cls(
            name=lookup.name,
            memory_hits=counters.memory_hits,
            disk_hits=counters.disk_hits,
            misses=counters.misses,
            bypasses=counters.bypasses,
            rows_stored=len(tiers.memory),
            rows_written=tiers.disk_rows,
            disk_errors=tiers.disk.errors if tiers.disk is not None else 0,
            memory_bytes=now.memory_bytes,
            disk_bytes=now.disk_bytes,
            hash_seconds=counters.hash_seconds,
            lookup_seconds=counters.lookup_seconds,
            compute_seconds=counters.compute_seconds,
            merge_seconds=counters.merge_seconds,
            saved_seconds=counters.saved_seconds,
            history=(*lookup.history.points, now),
        )


@dataclasses.dataclass(frozen=True)
class Stats(Tabular):
    """The counters of a model: totals, and one record a region.

    Parameters
    ----------
    regions : list of RegionStats
        One a region, in the model's order.
    """

    regions: list[RegionStats]

    @property
    def hits(self) -> int:
        """Rows served, over all regions."""
        return sum(region.hits for region in self.regions)

    @property
    def misses(self) -> int:
        """Rows computed and stored, over all regions."""
        return sum(region.misses for region in self.regions)

    @property
    def bypasses(self) -> int:
        """Rows computed and not stored, over all regions."""
        return sum(region.bypasses for region in self.regions)

    def table(self) -> Table:
        """One row a region."""
        counts = ("memory hits", "disk hits", "misses", "bypasses", "rows")
        times = ("hash s", "lookup s", "compute s", "merge s", "saved s")
        rows = [
            (
                region.name,
                *(f"{getattr(region, name.replace(' ', '_')):,}" for name in counts[:-1]),
                f"{region.rows_stored:,}",
                size_text(region.memory_bytes),
                size_text(region.disk_bytes),
                *(f"{getattr(region, name.split()[0] + '_seconds'):.2f}" for name in times[:-1]),
                "-" if region.saved_seconds is None else f"{region.saved_seconds:.2f}",
            )
            for region in self.regions
        ]
        return Table("torchcache", ("region", *counts, "memory", "disk", *times), rows)


def stats(target: Any) -> Stats:
    """The counters of every region of a model.

    Parameters
    ----------
    target : nn.Module or marked function
        What ``transform`` or ``torch.compile`` returned, a marked module, or a decorated function.

    Returns
    -------
    Stats
        With ``regions``, ``hits``, ``misses`` and ``bypasses``; shows itself as a table.

    Raises
    ------
    TypeError
        For anything else.
    """
    return Stats([RegionStats.of(lookup) for lookup in lookups_in(target)])


def lookups_in(target: Any) -> list[CacheLookup]:
    """The lookups of a model, a marked module or a decorated function, in the model's order."""
    target = getattr(target, "_orig_mod", target)
    target = getattr(target, "_torchdynamo_orig_callable", target)
    found: dict[int, CacheLookup] = {}
    if isinstance(target, nn.Module):
        for module in target.modules():
            found.update((id(lookup), lookup) for lookup in lookups_of(module))
    elif isinstance(getattr(target, "torchcache_mark", None), Mark):
        found.update((id(lookup), lookup) for lookup in lookups_of(target.torchcache_mark))
    else:
        raise TypeError(f"torchcache takes a model, a marked module or a decorated function here, not {target!r}")
    return list(found.values())
