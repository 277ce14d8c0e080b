"""All-hit epochs beside precomputed features, and where one all-hit call spends its time."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from rich.console import Console
from rich.table import Table
from torch import nn

import torchcache
from torchcache import stats


class Pooled(nn.Module):
    """Stands for an image backbone: reads every pixel, gives 768 features."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 768, 32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.patch(x).mean((2, 3))


class Sentence(nn.Module):
    """Stands for a sentence encoder: token ids to 384 features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 384)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids).mean(1)


class Tokens(nn.Module):
    """Stands for a vision transformer whose token features are kept: 197 of 768 a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 768)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids)


class Model(nn.Module):
    """A head on a backbone."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.backbone(x)
        return self.head(features if features.ndim == 2 else features.mean(1))


def workloads(quick: bool) -> dict[str, tuple[nn.Module, int, torch.Tensor]]:
    """Backbone, features and data of each workload."""
    images = 256 if quick else 512
    rows = 1024 if quick else 4096
    return {
        "images 3x224x224 to 768": (Pooled(), 768, torch.randn(images, 3, 224, 224)),
        "64 token ids to 384": (Sentence(), 384, torch.randint(1000, (rows, 64))),
        "197 token ids to 197x768": (Tokens(), 768, torch.randint(1000, (images, 197))),
    }


def epoch(step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], head: nn.Module, data: torch.Tensor) -> None:
    """One shuffled epoch of training the head."""
    labels = torch.zeros(len(data), dtype=torch.int64)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    for rows in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).split(64):
        loss = nn.functional.cross_entropy(step(data[rows], rows), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, interleaved in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def epochs(name: str, backbone: nn.Module, features: int, data: torch.Tensor, repeats: int) -> dict[str, float]:
    """Seconds of an epoch, by contender."""
    plain = Model(backbone.requires_grad_(False).eval(), features)
    with torch.no_grad():
        precomputed = torch.cat([backbone(part) for part in data.split(64)])
    marked = type(backbone)()
    marked.load_state_dict(backbone.state_dict())
    torchcache.mark(marked, freeze=True, max_memory_cache_size=4e9)
    cached = torchcache.transform(Model(marked, features))
    cached.head.load_state_dict(plain.head.state_dict())
    torch.testing.assert_close(cached(data[:64]), plain(data[:64]), rtol=1e-3, atol=1e-3)

    def from_features(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found = precomputed[rows]
        return plain.head(found if found.ndim == 2 else found.mean(1))

    def by_id(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with torchcache.sample_keys(rows):
            return cached(x)

    def eagerly(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found = marked(x)
        return cached.head(found if found.ndim == 2 else found.mean(1))

    runs = {
        "precomputed": lambda: epoch(from_features, plain.head, data),
        "no cache": lambda: epoch(lambda x, rows: plain(x), plain.head, data),
        "transform": lambda: epoch(lambda x, rows: cached(x), cached.head, data),
        "sample_keys": lambda: epoch(by_id, cached.head, data),
        "eager": lambda: epoch(eagerly, cached.head, data),
    }
    for run in runs.values():  # fills the caches
        run()
    before = stats(cached).misses
    found = measure(runs, repeats)
    assert stats(cached).misses == before, "an epoch that should have been all hits computed rows"
    return found


def call(backbone: nn.Module, data: torch.Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of one all-hit call of 256 rows, its parts, and the bare operations beside it."""
    marked = torchcache.mark(type(backbone)(), freeze=True, max_memory_cache_size=4e9)
    x = data[:256].contiguous()
    outputs = marked(x)
    slab, index = outputs.clone(), torch.arange(len(x))
    width = x[0].numel() * x.itemsize
    flat = memoryview(x.reshape(-1).view(torch.uint8).numpy())
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    bounds = [len(x) * part // threads for part in range(threads + 1)]

    def hash_range(part: int) -> None:
        for row in range(bounds[part], bounds[part + 1]):
            xxhash.xxh3_128_digest(flat[row * width : (row + 1) * width])

    start = stats(marked).regions[0]
    calls = 0

    def lookup() -> None:
        nonlocal calls
        calls += 1
        marked(x)

    runs = {
        "all-hit call": lookup,
        "bare hash": lambda: list(pool.map(hash_range, range(threads))) and None,
        "bare index_select": lambda: slab.index_select(0, index) is None,
    }
    found = {name: 1e3 * value for name, value in measure(runs, 5 * repeats).items()}
    end = stats(marked).regions[0]
    for part in ("hash", "lookup", "merge"):
        spent = getattr(end, f"{part}_seconds") - getattr(start, f"{part}_seconds")
        found[part] = 1e3 * spent / calls
    return found


def tables(report: dict[str, dict[str, dict[str, float]]]) -> list[Table]:
    """The report, for a terminal."""
    first = Table(title="one epoch (ms, ratio to precomputed)")
    second = Table(title="one all-hit call of 256 rows (ms; parts are means)")
    for table, key in ((first, "epochs"), (second, "calls")):
        table.add_column("workload")
        for name in next(iter(report[key].values())):
            table.add_column(name, justify="right")
    for name, found in report["epochs"].items():
        base = found["precomputed"]
        first.add_row(name, *(f"{1e3 * value:.1f} ({value / base:.2f}x)" for value in found.values()))
    for name, found in report["calls"].items():
        second.add_row(name, *(f"{value:.2f}" for value in found.values()))
    return [first, second]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller data, fewer repeats: under 3 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    repeats = 5 if arguments.quick else 15
    report: dict[str, dict[str, dict[str, float]]] = {"epochs": {}, "calls": {}}
    for name, (backbone, features, data) in workloads(arguments.quick).items():
        report["epochs"][name] = epochs(name, backbone, features, data, repeats)
        report["calls"][name] = call(backbone, data, repeats)
    console = Console(width=150)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for table in tables(report):
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
