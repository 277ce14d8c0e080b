"""A second look at what the store gives back: hits computed again by the originals, and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

from torchcache.call import Region
from torchcache.checks.alarm import Otherwise
from torchcache.checks.chance import generators_kept
from torchcache.checks.compare import difference
from torchcache.context import watching_lookups
from torchcache.counters import Reasons
from torchcache.errors import ArgumentError
from torchcache.looked import Looked
from torchcache.regions import regions_in
from torchcache.reports.table import Table, Tabular


@dataclasses.dataclass(frozen=True)
class RegionAudit:
    """What an audit saw of one region; counts and differences are over all its calls.

    Parameters
    ----------
    name : str
        Module path and class.
    memory_rows, disk_rows : int
        Rows that each tier served.
    recomputed : int
        Rows among these that the original computed again.
    largest_absolute, largest_relative : float
        How far what was served is from what was computed: in the outputs' unit, and as a share of the row's largest
        magnitude; infinite where one is not a number and the other is.
    wrong : tuple of int
        Positions in the batch of the rows that differ by more than rounding.
    alarms : int
        How often the region itself found that rows it had served were wrong, and dropped them.
    reason : str
        Why rows were computed and not looked up; empty where none were.
    """

    name: str
    memory_rows: int = 0
    disk_rows: int = 0
    recomputed: int = 0
    largest_absolute: float = 0.0
    largest_relative: float = 0.0
    wrong: tuple[int, ...] = ()
    alarms: int = 0
    reason: str = ""

    def plus(self, other: RegionAudit) -> RegionAudit:
        """The sum of two calls of the region."""
        return RegionAudit(
            self.name,
            self.memory_rows + other.memory_rows,
            self.disk_rows + other.disk_rows,
            self.recomputed + other.recomputed,
            max(self.largest_absolute, other.largest_absolute),
            max(self.largest_relative, other.largest_relative),
            tuple(sorted({*self.wrong, *other.wrong})),
            max(self.alarms, other.alarms),
            self.reason or other.reason,
        )


@dataclasses.dataclass(frozen=True)
class Audit(Tabular):
    """What ``audit`` found.

    Parameters
    ----------
    regions : list of RegionAudit
        One a region that was called, in the order of their first calls.
    """

    regions: list[RegionAudit]

    @property
    def ok(self) -> bool:
        """Whether rows were compared, and none differed by more than rounding, here or before."""
        return not self._wrong and any(region.recomputed for region in self.regions)

    @property
    def _wrong(self) -> bool:
        return any(region.wrong or region.alarms for region in self.regions)

    def table(self) -> Table:
        """One row a region."""
        columns = ("region", "memory rows", "disk rows", "recomputed", "largest difference", "relative", "wrong rows")
        rows = [
            (
                region.name,
                f"{region.memory_rows:,}",
                f"{region.disk_rows:,}",
                f"{region.recomputed:,}",
                f"{region.largest_absolute:.2g}",
                f"{region.largest_relative:.2g}",
                _positions(region.wrong),
            )
            for region in self.regions
        ]
        found = "WRONG ROWS" if self._wrong else "ok" if self.ok else "NOTHING COMPARED"
        return Table(f"torchcache audit: {found}", columns, rows, self._notes())

    def _notes(self) -> list[str]:
        if not self.regions:
            return ["nothing was looked up: torchcache.explain(model, batch) tells why"]
        notes = [f"{region.name} was computed: {region.reason}" for region in self.regions if region.reason]
        caught = [region.name for region in self.regions if region.alarms]
        if caught:
            notes.append(f"rows of {', '.join(caught)} were found to be wrong and dropped: see torchcache.stats(model)")
        elif not (notes or any(region.recomputed for region in self.regions)):
            notes.append("no row was served by the cache: call it again with the same inputs")
        return notes


def _positions(rows: tuple[int, ...]) -> str:
    return (", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")) or "none"


def audit(model: Callable[..., Any], *inputs: Any, rows: int = 16, **kwargs: Any) -> Audit:
    """Run a model once, and compute a sample of the rows that the store served again.

    Rows that miss are computed and stored as in any call, and say nothing: audit a batch that was seen before. Where
    nothing was compared the audit is not ``ok``. What ``cache_dtype`` rounds away is in the differences that are shown,
    and makes no row wrong.

    Parameters
    ----------
    model : callable
        What ``transform`` or ``torch.compile`` returned, a marked module, or a decorated function.
    *inputs, **kwargs
        What to call it with.
    rows : int
        Rows to compute again for each call of a region, drawn at random from its hits.

    Returns
    -------
    Audit
        With ``ok`` and ``regions``; prints as a table. Nothing is raised for wrong rows.

    Raises
    ------
    ArgumentError
        ``rows`` is not a positive int.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ArgumentError(f"torchcache.audit: rows must be a positive int, not {rows!r}")
    found: dict[int, RegionAudit] = {}

    def observe(region: Region, looked: Looked) -> None:
        seen = _compare(region, looked, rows)
        known = found.get(id(region))
        found[id(region)] = seen if known is None else known.plus(seen)

    before = {id(region): region.reasons.copy() for region in _regions(model)}
    with watching_lookups(observe):
        model(*inputs, **kwargs)
    for region in _regions(model):
        known = found.get(id(region), RegionAudit(region.name))
        reason = next(iter(region.reasons - before.get(id(region), Reasons())), "")
        if region.counters.alarms or reason:
            found[id(region)] = dataclasses.replace(known, alarms=region.counters.alarms, reason=reason)
    return Audit(list(found.values()))


def _regions(model: Callable[..., Any]) -> list[Region]:
    with contextlib.suppress(TypeError):  # a function that calls marked ones has no regions of its own
        return list(regions_in(model))
    return []


def _compare(region: Region, looked: Looked, rows: int) -> RegionAudit:
    hits = [row for row, digest in enumerate(looked.digests) if digest not in looked.missing]
    disk = sum(looked.digests[row] in looked.found.from_beneath for row in hits)
    sample = sorted(random.Random().sample(hits, min(rows, len(hits))))
    seen = RegionAudit(region.name, len(hits) - disk, disk, len(sample))
    if not sample:
        return seen
    try:
        with generators_kept():
            computed = looked.compute(sample)
    except Otherwise:
        return dataclasses.replace(seen, wrong=tuple(sample))
    for index, (served, expected) in enumerate(zip(looked.outputs, computed, strict=True)):
        expected = expected.to(served.device, served.dtype)
        for place, row in enumerate(sample):
            got, wanted = served[row : row + 1], expected[place : place + 1]
            absolute, relative = (math.inf if math.isnan(gap) else gap for gap in difference(got, wanted))
            wrong = () if looked.rounding.agrees(index, got, wanted, looked.losses[index]) else (row,)
            one = RegionAudit(region.name, largest_absolute=absolute, largest_relative=relative, wrong=wrong)
            seen = seen.plus(one)
    return seen
