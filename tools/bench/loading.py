"""Epochs on image files: with PyTorch's loader, with torchcache's, and on features that were computed by hand.

    python tools/bench/loading.py [--count 2048] [--workers 0 2] [--batch 64]

Draws JPEGs of 500 x 375, decodes and resizes them with Pillow, and trains a linear head on a ViT-S. Medians of all-hit
epochs, interleaved; what is loaded or compared once is told apart.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import data
from transformers import ViTConfig, ViTModel

import torchcache

WIDTH = 384


class Images(data.Dataset):
    """JPEGs of a folder, decoded and resized, with labels."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(path) for path in sorted(folder.glob("*.jpg"))]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels = np.array(image.convert("RGB").resize((224, 224)))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255), index % 10


def draw(folder: Path, count: int) -> None:
    """``count`` pictures of coloured clouds."""
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / f"{index:06d}.jpg", quality=90
        )


class Features(nn.Module):
    """The class token of a ViT-S, ``(B, 384)``."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, intermediate_size=4 * WIDTH)
        self.backbone = ViTModel(config, add_pooling_layer=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixels).last_hidden_state[:, 0]


class Classifier(nn.Module):
    """A linear head on features that are frozen, and cached where there is a folder."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = Features().eval().requires_grad_(False)
        self.head = nn.Linear(WIDTH, 10)
        if folder is not None:
            torchcache.mark(self.features, persistent=True, persistent_cache_dir=folder)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixels))


def epoch(loader: data.DataLoader, model: nn.Module) -> float:
    """Seconds of one epoch of training."""
    optimizer = torch.optim.SGD(model.parameters() if isinstance(model, nn.Linear) else model.head.parameters(), lr=0.1)
    start = time.perf_counter()
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def second(folder: Path, cache: Path, batch: int, workers: int) -> None:
    """What a second process prints: the seconds of its first three epochs."""
    loader = torchcache.DataLoader(
        Images(folder), batch, shuffle=True, num_workers=workers, persistent=True, persistent_cache_dir=cache
    )
    model = Classifier(cache)
    print(*(f"{epoch(loader, model):.4f}" for _ in range(3)))


def main() -> None:
    """Measure, and print a table a number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2048, help="images")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of workers")
    parser.add_argument("--batch", type=int, default=64, help="images a batch")
    parser.add_argument("--epochs", type=int, default=9, help="all-hit epochs of each")
    parser.add_argument("--second", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.second:
        second(*map(Path, chosen.second), chosen.batch, chosen.workers[0])
        return
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name, "images"), Path(name, "cache")
        folder.mkdir()
        draw(folder, chosen.count)
        for workers in chosen.workers:
            compare(folder, cache / str(workers), workers, chosen)


def compare(folder: Path, cache: Path, workers: int, chosen: argparse.Namespace) -> None:
    """Measure and print one table."""
    images = Images(folder)
    options = {"batch_size": chosen.batch, "shuffle": True, "num_workers": workers}
    uncached = epoch(data.DataLoader(images, **options), Classifier(None))
    ours, theirs = Classifier(cache), Classifier(cache)
    loaders = {
        "torchcache.DataLoader": (
            torchcache.DataLoader(images, persistent=True, persistent_cache_dir=cache, **options),
            ours,
        ),
        "PyTorch's loader": (data.DataLoader(images, **options), theirs),  # its rows are there by then
    }
    firsts = {name: [epoch(*pair) for _ in range(2)] for name, pair in loaders.items()}
    torchcache.flush()
    with torch.no_grad():
        features = torch.cat([ours.features(x) for x, _ in data.DataLoader(images, chosen.batch, num_workers=workers)])
    labels = torch.tensor([index % 10 for index in range(len(images))])
    by_hand = data.DataLoader(data.TensorDataset(features, labels), chosen.batch, shuffle=True)
    runs = {**loaders, "features by hand": (by_hand, nn.Linear(WIDTH, 10))}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(chosen.epochs):
        for name in random.sample(list(runs), len(runs)):
            if name != "PyTorch's loader" or len(seconds[name]) < 3:
                seconds[name].append(epoch(*runs[name]))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table(
        "run", "first epoch", "second", "later, median", "of by hand", title=f"{len(images)} images, {workers} workers"
    )
    table.add_row("uncached", f"{uncached:.2f}", "", f"{uncached:.2f}", f"{uncached / middle['features by hand']:.0f}x")
    for name in runs:
        early = [f"{value:.2f}" for value in firsts.get(name, [])] or ["", ""]
        table.add_row(name, *early, f"{middle[name]:.4f}", f"{middle[name] / middle['features by hand']:.2f}x")
    command = [sys.executable, __file__, "--second", str(folder), str(cache), "--batch", str(chosen.batch), "--workers"]
    later = subprocess.run([*command, str(workers)], capture_output=True, text=True, check=True).stdout.split()
    table.add_row("a second process", *later, f"{float(later[2]) / middle['features by hand']:.2f}x")
    Console().print(table)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
