"""Other caches, each used as its documentation says, in a process and an environment of its own.

Run by the benchmark: ``python peers.py PEER [--quick]``. A line "WORKLOAD" on standard input runs one epoch of it and
prints seconds; before the first, the peer is filled and its features are compared with uncached ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from workloads import Model, batches, epoch, workloads

Features = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def frozen_copy(backbone: nn.Module) -> type[nn.Module]:
    """A class whose instances are the backbone, since these caches decorate classes."""
    base: Any = type(backbone)

    class Copy(base):
        def __init__(self) -> None:
            super().__init__()
            self.load_state_dict(backbone.state_dict())
            self.requires_grad_(False).eval()

    return Copy


def pypi_torchcache(backbone: nn.Module) -> Features:
    """PyPI ``torchcache`` with its defaults, and room for all rows."""
    from torchcache import torchcache

    cached = torchcache(max_memory_cache_size=int(4e9))(frozen_copy(backbone))()
    return lambda x, rows: cached(x)


def torch_module_cache(backbone: nn.Module) -> Features:
    """``torch-module-cache`` in memory, with sample ids as its keys."""
    from torch_module_cache import CacheLevel, cache_module

    cached = cache_module(cache_path=tempfile.mkdtemp(), cache_level=CacheLevel.MEMORY)(frozen_copy(backbone))()

    def features(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = cached(x, cache_key=[str(row) for row in rows.tolist()])
        return found

    return features


def joblib_memory(backbone: nn.Module) -> Features:
    """``joblib.Memory`` around the backbone for one sample, since shuffled batches never come again."""
    import joblib

    def one(sample: Any) -> Any:
        with torch.no_grad():
            return backbone(torch.from_numpy(sample)[None])[0].numpy()

    cached = joblib.Memory(tempfile.mkdtemp(), verbose=0).cache(one)
    return lambda x, rows: torch.stack([torch.from_numpy(cached(sample)) for sample in x.numpy()])


PEERS = {"torchcache 0.6.0": pypi_torchcache, "torch-module-cache 0.1.4": torch_module_cache, "joblib": joblib_memory}


def main() -> None:
    """Answer requests until standard input ends."""
    peer, quick = sys.argv[1], "--quick" in sys.argv
    ready: dict[str, tuple[Features, Model, torch.Tensor]] = {}
    given = workloads(quick)
    out = sys.stdout
    sys.stdout = sys.stderr  # peers may print
    for line in sys.stdin:
        name = line.strip()
        backbone, width, data = given[name]
        answer: dict[str, float] = {}
        if name not in ready:
            backbone.requires_grad_(False).eval()
            features = PEERS[peer](backbone)
            wrong = 0
            for _ in range(2):
                wrong = 0
                for x, rows in batches(data):
                    with torch.no_grad():
                        close = torch.isclose(features(x, rows).float(), backbone(x), rtol=1e-3, atol=1e-3)
                    wrong += int((~close.flatten(1).all(1)).sum())
            ready[name] = (features, Model(backbone, width), data)
            answer["wrong"] = wrong
        features, model, data = ready[name]

        def step(x: torch.Tensor, rows: torch.Tensor, features: Features = features, model: Model = model) -> Any:
            found = features(x, rows).float()
            return model.head(found if found.ndim == 2 else found.mean(1))

        start = time.perf_counter()
        epoch(step, model.head, batches(data))
        answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
