"""Caches the outputs of frozen PyTorch backbones, per sample, in memory and on disk."""

from torchcache.audit import audit
from torchcache.backend import torchcache_backend
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
from torchcache.explain import explain
from torchcache.lookup.context import bypass, sample_keys
from torchcache.marks import mark, torchcache, unmark
from torchcache.options import CacheOptions
from torchcache.plot import plot
from torchcache.prefetch import prefetch
from torchcache.stats import stats
from torchcache.store.writer import flush
from torchcache.summary import summary
from torchcache.transform import graphs, transform
from torchcache.version import __version__ as __version__
from torchcache.warm import warm

__all__ = [
    "ArgumentError",
    "CacheOptions",
    "FingerprintError",
    "MarkError",
    "OutputError",
    "RowwiseError",
    "SampleKeyError",
    "StoreDamagedError",
    "StoreError",
    "StoreVersionError",
    "TorchcacheError",
    "audit",
    "bypass",
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
