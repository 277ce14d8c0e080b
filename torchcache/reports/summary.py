"""What the cache saved so far, and what it costs: one line a region."""

from __future__ import annotations

import dataclasses
from typing import Any

from torchcache.quantity import seconds_text, share_text, size_text
from torchcache.reports.stats import RegionStats, stats
from torchcache.reports.table import Table, Tabular

__all__ = ["Summary", "summary"]


@dataclasses.dataclass(frozen=True)
class Summary(Tabular):
    """The account of a model: what it saved and what it cost.

    Parameters
    ----------
    regions : list of RegionStats
        The counters of each region, in the model's order.
    """

    regions: list[RegionStats]

    @property
    def saved_seconds(self) -> float | None:
        """Time saved over all regions; ``None`` while no miss told how long a row takes."""
        known = [region.saved_seconds for region in self.regions if region.saved_seconds is not None]
        return sum(known) if known else None

    @property
    def cost_seconds(self) -> float:
        """Time spent on hashing, looking up, merging and auditing, over all regions."""
        return sum(region.cost_seconds for region in self.regions)

    def table(self) -> Table:
        """One row a region."""
        error = ("largest error",) if any(region.largest_error is not None for region in self.regions) else ()
        columns = ("region", "rows", "hit rate", "by pass", "compute a row", "cache a row", "saved", "memory", "disk")
        rows = [
            (
                region.name,
                f"{region.rows:,}",
                f"{region.hit_rate:.0%}",
                _passes_text(region.hit_rates),
                seconds_text(region.compute_seconds / region.misses if region.misses else None),
                seconds_text(region.cost_seconds / region.rows if region.rows else None),
                seconds_text(region.saved_seconds),
                size_text(region.memory_bytes),
                size_text(region.disk_bytes),
                *(share_text(region.largest_error) for _ in error),
            )
            for region in self.regions
        ]
        return Table("torchcache", (*columns, *error), rows, self._notes())

    def _notes(self) -> list[str]:
        return [self._account(), *self._unloaded(), *(note for region in self.regions for note in region.notes())]

    def _unloaded(self) -> list[str]:
        return [
            f"{region.name}: {region.unloaded:,} of {region.hits:,} hits were of samples that were not loaded"
            for region in self.regions
            if region.unloaded
        ]

    def _account(self) -> str:
        if not any(region.rows for region in self.regions):
            return "nothing was looked up so far"
        saved, cost = self.saved_seconds, seconds_text(self.cost_seconds)
        if saved is None:
            return f"{cost} spent on the cache; what it saves is known once a row was computed in this process"
        if saved < 0:
            return f"{cost} spent on the cache, {seconds_text(-saved)} more than its hits saved so far"
        return f"{seconds_text(saved)} saved so far; the {cost} spent on the cache are deducted"


def summary(target: Any) -> Summary:
    """What the cache of a model saved so far, and what it costs.

    Parameters
    ----------
    target : nn.Module or marked function
        What ``transform`` or ``torch.compile`` returned, a marked module, or a decorated function.

    Returns
    -------
    Summary
        With ``regions``, ``saved_seconds`` and ``cost_seconds``; shows itself as a table.

    Raises
    ------
    TypeError
        For anything else.
    """
    return Summary(stats(target).regions)


def _passes_text(rates: tuple[float, ...]) -> str:
    """The first passes and the last one."""
    shown = [f"{rate:.0%}" for rate in (rates if len(rates) <= 4 else rates[:3])]
    return " ".join([*shown, *([f"... {rates[-1]:.0%}"] if len(rates) > 4 else [])]) or "-"
