"""What a trainer logs of the cache: what happened since it last asked."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from torchcache.reports.stats import stats
from torchcache.reports.summary import summary
from torchcache.store.writer import flush

# Characters of a line where standard error is a file.
LOG_WIDTH = 140


class Epochs:
    """The counters of ``model``, epoch by epoch.

    Parameters
    ----------
    model : nn.Module
        What is trained.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._rows, self._hits = self._counts()

    def finish(self) -> dict[str, float]:
        """Have everything on disk, and what there is to log of the epoch that ends here; nothing without rows."""
        flush()
        (rows, hits), before = self._counts(), (self._rows, self._hits)
        self._rows, self._hits = rows, hits
        if rows == before[0]:
            return {}
        account = summary(self._model)
        found = {
            "torchcache/rows": float(rows - before[0]),
            "torchcache/hit_rate": (hits - before[1]) / (rows - before[0]),
            "torchcache/memory_bytes": float(sum(region.memory_bytes for region in account.regions)),
            "torchcache/disk_bytes": float(sum(region.disk_bytes for region in account.regions)),
        }
        if account.saved_seconds is not None:
            found["torchcache/saved_seconds"] = account.saved_seconds
        return found

    def _counts(self) -> tuple[int, int]:
        now = stats(self._model)
        return now.hits + now.misses, now.hits


def show_summary(model: Any) -> None:
    """Print what the cache saved, on standard error, where progress bars are."""
    Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH).print(summary(model))
