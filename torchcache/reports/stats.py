"""What was cached so far: counters by region, and their table."""

from __future__ import annotations

import dataclasses
from typing import Any, overload

import numpy as np
from torch.utils.data import DataLoader

from torchcache.batch import lacks
from torchcache.call import Region
from torchcache.counters import Point
from torchcache.quantity import share_text, size_text
from torchcache.regions import regions_in
from torchcache.reports.table import Table, Tabular

__all__ = ["LoaderStats", "RegionStats", "Stats", "stats"]

# Reasons of one region that a table shows.
MOST_REASONS = 3


@dataclasses.dataclass(frozen=True)
class RegionStats:
    """The counters of one region.

    Parameters
    ----------
    name : str
        Module path and class.
    memory_hits, disk_hits, remote_hits, misses, bypasses : int
        Rows served by memory, by disk, by a server or a tier of your own; computed and stored, computed only.
    unloaded : int
        Of the rows served, those whose samples a ``torchcache.DataLoader`` had not loaded.
    rows_stored : int
        Rows in memory now.
    rows_written, disk_errors, remote_errors : int
        Rows that this process wrote to disk, store failures it met there, and with a server or tiers of your own.
    memory_bytes, disk_bytes : int
        Bytes of rows in memory now, and of blobs that this process wrote.
    hash_seconds, lookup_seconds, compute_seconds, merge_seconds, audit_seconds : float
        Where the time went; the last is for computing rows again.
    saved_seconds : float or None
        Time the hits would have taken, less what the cache took; ``None`` while no miss told how long a row takes.
    history : tuple of Point
        The counters at up to 1,024 earlier calls, evenly spaced, and now.
    alarms : int
        How often rows were found to be wrong when they were computed again, and all were dropped.
    largest_error : float or None
        Where ``cache_dtype`` rounds, the largest difference of a row that was served from what was computed again, as
        a share of its largest magnitude; ``None`` before any was.
    reasons : dict of str to int
        Why rows were computed and not stored, and how many.
    built : bool
        ``False`` where it is deferred, and not there since nothing needs it.
    """

    name: str
    memory_hits: int
    disk_hits: int
    remote_hits: int
    misses: int
    bypasses: int
    unloaded: int
    rows_stored: int
    rows_written: int
    disk_errors: int
    remote_errors: int
    memory_bytes: int
    disk_bytes: int
    hash_seconds: float
    lookup_seconds: float
    compute_seconds: float
    merge_seconds: float
    audit_seconds: float
    saved_seconds: float | None
    history: tuple[Point, ...] = dataclasses.field(repr=False)
    alarms: int
    largest_error: float | None
    reasons: dict[str, int]
    built: bool = True

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
        different = self.misses + self.disk_hits + self.remote_hits
        if not different or self.rows_stored < different:
            return ()
        rows = [0, *(point.rows for point in self.history)]
        hits = [0, *(point.hits for point in self.history)]
        ends = [*range(0, self.rows, different), self.rows]
        return tuple((np.diff(np.interp(ends, rows, hits)) / np.diff(ends)).tolist())

    @property
    def hits(self) -> int:
        """Rows served by any tier."""
        return self.memory_hits + self.disk_hits + self.remote_hits

    @property
    def cost_seconds(self) -> float:
        """Time spent on hashing, looking up, merging and auditing."""
        return self.hash_seconds + self.lookup_seconds + self.merge_seconds + self.audit_seconds

    def notes(self) -> list[str]:
        """What needs an explanation, for people: alarms, and the most frequent reasons of bypasses."""
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1])
        notes = [
            # Rows that compiled code computes are not counted.
            f"{self.name}: {f'{rows:,} rows' if rows else 'rows'} not cached: {reason}"
            for reason, rows in ordered[:MOST_REASONS]
        ]
        if len(ordered) > MOST_REASONS:
            notes.append(f"{self.name}: {len(ordered) - MOST_REASONS} more reasons, in regions[...].reasons")
        if self.alarms:
            notes.append(f"{self.name}: stored rows were found to be wrong {self.alarms} times, and dropped")
        if not self.built:
            notes.append(
                f"{self.name}: it is not there, since all rows were found, and nothing is computed again meanwhile"
            )
        return notes

    @classmethod
    def of(cls, region: Region) -> RegionStats:
        """The counters of ``region`` as they are now."""
        counters, tiers = region.counters, region.tiers
        now = Point.of(counters, tiers.used, tiers.beneath.disk_bytes)
        return cls(
            name=region.name,
            memory_hits=counters.memory_hits,
            disk_hits=counters.disk_hits,
            remote_hits=counters.remote_hits,
            misses=counters.misses,
            bypasses=counters.bypasses,
            unloaded=counters.unloaded,
            rows_stored=len(tiers.memory),
            rows_written=tiers.beneath.disk_rows,
            disk_errors=tiers.beneath.disk.errors if tiers.beneath.disk is not None else 0,
            remote_errors=tiers.beneath.other_errors,
            memory_bytes=now.memory_bytes,
            disk_bytes=now.disk_bytes,
            hash_seconds=counters.hash_seconds,
            lookup_seconds=counters.lookup_seconds,
            compute_seconds=counters.compute_seconds,
            merge_seconds=counters.merge_seconds,
            audit_seconds=counters.audit_seconds,
            saved_seconds=counters.saved_seconds,
            history=(*region.history.points, now),
            alarms=counters.alarms,
            largest_error=counters.largest_error,
            reasons=dict(region.reasons),
            built=not lacks(region.subject),
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
        remote = ("remote hits",) if any(region.remote_hits for region in self.regions) else ()
        unloaded = ("unloaded",) if any(region.unloaded for region in self.regions) else ()
        counts = ("memory hits", "disk hits", *remote, *unloaded, "misses", "bypasses", "rows")
        error = ("largest error",) if any(region.largest_error is not None for region in self.regions) else ()
        times = ("compute s", "cache s", "audit s", "saved s")
        rows = [
            (
                region.name,
                *(f"{getattr(region, name.replace(' ', '_')):,}" for name in counts[:-1]),
                f"{region.rows_stored:,}",
                size_text(region.memory_bytes),
                size_text(region.disk_bytes),
                *(share_text(region.largest_error) for _ in error),
                f"{region.compute_seconds:.2f}",
                f"{region.cost_seconds - region.audit_seconds:.2f}",
                f"{region.audit_seconds:.2f}",
                "-" if region.saved_seconds is None else f"{region.saved_seconds:.2f}",
            )
            for region in self.regions
        ]
        columns = ("region", *counts, "memory", "disk", *error, *times)
        return Table("torchcache", columns, rows, [note for region in self.regions for note in region.notes()])


@dataclasses.dataclass(frozen=True)
class LoaderStats(Tabular):
    """What a ``torchcache.DataLoader`` did so far.

    Parameters
    ----------
    name : str
        The data set's class.
    samples : int
        How many are remembered.
    loaded, skipped : int
        How many were loaded, and how many were given out without that.
    reason : str
        Why all are loaded in every epoch; empty where they are not.
    """

    name: str
    samples: int
    loaded: int
    skipped: int
    reason: str

    def table(self) -> Table:
        """One row."""
        row = (self.name, *(f"{count:,}" for count in (self.samples, self.loaded, self.skipped)))
        notes = [f"all samples are loaded in every epoch: {self.reason}"] if self.reason else []
        return Table("torchcache", ("data set", "remembered", "loaded", "skipped"), [row], notes)


@overload
def stats(target: DataLoader[Any]) -> LoaderStats: ...
@overload
def stats(target: Any) -> Stats: ...
def stats(target: Any) -> Stats | LoaderStats:
    """The counters of every region of a model that rows went to: a mark that trains shows as its frozen part.

    Parameters
    ----------
    target : nn.Module, marked function or DataLoader
        What ``transform`` or ``torch.compile`` returned, a marked module, a decorated function, or a loader of ours.

    Returns
    -------
    Stats or LoaderStats
        With ``regions``, ``hits``, ``misses`` and ``bypasses``; of a loader with ``loaded``, ``skipped`` and
        ``reason``. It shows itself as a table.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(target, DataLoader) and hasattr(target, "counted"):
        counted: LoaderStats = target.counted()
        return counted
    return Stats([RegionStats.of(region) for region in regions_in(target) if region.counters.calls or region.reasons])
