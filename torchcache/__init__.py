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
    StoreVersionError,
    TorchcacheError,
)
from torchcache.explain import explain
from torchcache.lookup.context import bypass, sample_keys
from torchcache.marks import mark, torchcache, unmark
from torchcache.options import CacheOptions
from torchcache.prefetch import prefetch
from torchcache.stats import stats
from torchcache.store.writer import flush
from torchcache.transform import graphs, transform

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CacheOptions",
    "FingerprintError",
    "MarkError",
    "OutputError",
    "RowwiseError",
    "SampleKeyError",
    "StoreVersionError",
    "TorchcacheError",
    "audit",
    "bypass",
    "explain",
    "flush",
    "graphs",
    "mark",
    "prefetch",
    "sample_keys",
    "stats",
    "torchcache",
    "torchcache_backend",
    "transform",
    "unmark",
]
