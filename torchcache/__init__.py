"""Caches the outputs of frozen PyTorch backbones, per sample, in memory and on disk."""

from torchcache.backend import torchcache_backend
from torchcache.context import bypass, sample_keys
from torchcache.errors import (
    ArgumentError,
    FingerprintError,
    MarkError,
    OutputError,
    RowwiseError,
    SampleKeyError,
    StoreDamagedError,
    StoreError,
    StoreVersionError,
    TorchcacheError,
)
from torchcache.loading.loader import DataLoader
from torchcache.loading.prefetch import prefetch
from torchcache.loading.warm import warm
from torchcache.marks import cached, deferred, mark, torchcache, unmark
from torchcache.namesake import warn_of_namesake
from torchcache.options import CacheOptions
from torchcache.reports.audit import audit
from torchcache.reports.explain import explain
from torchcache.reports.plot import plot
from torchcache.reports.stats import stats
from torchcache.reports.summary import summary
from torchcache.store.tier import Tier
from torchcache.store.writer import flush
from torchcache.transform import graphs, transform
from torchcache.version import __version__ as __version__

__all__ = [
    "ArgumentError",
    "CacheOptions",
    "DataLoader",
    "FingerprintError",
    "MarkError",
    "OutputError",
    "RowwiseError",
    "SampleKeyError",
    "StoreDamagedError",
    "StoreError",
    "StoreVersionError",
    "Tier",
    "TorchcacheError",
    "audit",
    "bypass",
    "cached",
    "deferred",
    "explain",
    "flush",
    "graphs",
    "mark",
    "plot",
    "prefetch",
    "sample_keys",
    "stats",
    "summary",
    "torchcache",
    "torchcache_backend",
    "transform",
    "unmark",
    "warm",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__", "__all__", "__doc__"]


warn_of_namesake()
