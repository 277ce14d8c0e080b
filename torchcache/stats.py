"""What was cached so far: counters by region, and their table."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from torchcache.graph.marked import Mark
from torchcache.graph.region import lookups_of
from torchcache.lookup.cache_lookup import CacheLookup

__all__ = ["RegionStats", "Stats", "stats"]


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

    @property
    def hits(self) -> int:
        """Rows served by any tier."""
        return self.memory_hits + self.disk_hits

    @classmethod
    def of(cls, lookup: CacheLookup) -> RegionStats:
        """The counters of ``lookup`` as they are now."""
        counters, tiers = lookup.counters, lookup.tiers
        return cls(
            name=lookup.name,
            memory_hits=counters.memory_hits,
            disk_hits=counters.disk_hits,
            misses=counters.misses,
            bypasses=counters.bypasses,
            rows_stored=len(tiers.memory),
            rows_written=tiers.disk_rows,
            disk_errors=tiers.disk.errors if tiers.disk is not None else 0,
            memory_bytes=tiers.memory.used,
            disk_bytes=tiers.disk_bytes,
            hash_seconds=counters.hash_seconds,
            lookup_seconds=counters.lookup_seconds,
            compute_seconds=counters.compute_seconds,
            merge_seconds=counters.merge_seconds,
            saved_seconds=counters.saved_seconds,
        )


@dataclasses.dataclass(frozen=True)
class Stats:
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

    def __rich__(self) -> Table:
        table = Table(title="torchcache")
        table.add_column("region")
        for name in ("memory hits", "disk hits", "misses", "bypasses", "rows", "memory", "disk"):
            table.add_column(name, justify="right")
        for name in ("hash", "lookup", "compute", "merge", "saved"):
            table.add_column(f"{name} s", justify="right")
        for region in self.regions:
            counts = (region.memory_hits, region.disk_hits, region.misses, region.bypasses, region.rows_stored)
            seconds = (region.hash_seconds, region.lookup_seconds, region.compute_seconds, region.merge_seconds)
            saved = "-" if region.saved_seconds is None else f"{region.saved_seconds:.2f}"
            table.add_row(
                region.name,
                *(f"{count:,}" for count in counts),
                _size(region.memory_bytes),
                _size(region.disk_bytes),
                *(f"{value:.2f}" for value in seconds),
                saved,
            )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160).print(self.__rich__())
        return text.getvalue().rstrip()


def stats(target: Any) -> Stats:
    """The counters of every region of a model.

    Parameters
    ----------
    target : nn.Module or marked function
        What ``transform`` or ``torch.compile`` returned, a marked module, or a decorated function.

    Returns
    -------
    Stats
        With ``regions``, ``hits``, ``misses`` and ``bypasses``; prints as a table.

    Raises
    ------
    TypeError
        For anything else.
    """
    target = getattr(target, "_orig_mod", target)
    target = getattr(target, "_torchdynamo_orig_callable", target)
    found: dict[int, CacheLookup] = {}
    if isinstance(target, nn.Module):
        for module in target.modules():
            found.update((id(lookup), lookup) for lookup in lookups_of(module))
    elif isinstance(getattr(target, "torchcache_mark", None), Mark):
        found.update((id(lookup), lookup) for lookup in lookups_of(target.torchcache_mark))
    else:
        raise TypeError(f"torchcache.stats takes a model, a marked module or a decorated function, not {target!r}")
    return Stats([RegionStats.of(lookup) for lookup in found.values()])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
