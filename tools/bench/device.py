"""On a device: digests beside a copy, all-hit steps beside features on the device, and the first epoch beside none.

    python tools/bench/device.py --device cuda [--batch 256] [--layers 4]

Medians of repeats in turn, each waited for. With ``--device cpu`` it shows only that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import torchcache
from torchcache.digest.device import OnTheWay

WIDTH = 768
# The first epoch, beside one without cache.
EPOCHS, STEPS = 4, 6


class Backbone(nn.Module):
    """Patches, transformer layers, and their mean."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 16, 16)
        layer = nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Shape ``(B, WIDTH)``."""
        return self.layers(self.patches(images).flatten(2).transpose(1, 2)).mean(1)


def medians(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each run, in turn with the others."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if device.type != "cpu":
                torch.accelerator.synchronize()
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[repeats // 4 :]) for name, found in seconds.items()}


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=20)
    chosen = parser.parse_args()
    device, console = torch.device(chosen.device), Console(width=110)

    table = Table("rows", "GB/s", "of a copy", "ms", title=f"digests on {device}")
    batches = {
        "images, float32": torch.randn(chosen.batch, 3, 224, 224),
        "images, bfloat16": torch.randn(chosen.batch, 3, 224, 224).bfloat16(),
        "64 token ids": torch.randint(0, 30_000, (chosen.batch, 64)),
    }
    for name, rows in batches.items():
        batch = rows.to(device)
        found = medians({"digest": lambda b=batch: OnTheWay(b).digests(), "copy": batch.clone}, device, chosen.repeats)
        rate = batch.nbytes / found["digest"] / 1e9
        table.add_row(name, f"{rate:.1f}", f"{found['copy'] / found['digest']:.0%}", f"{found['digest'] * 1e3:.3f}")
    console.print(table)

    table = Table("step", "images", "ms", "of features on the device", title=f"all-hit steps and the first on {device}")
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.randn(chosen.batch, 3, 224, 224, dtype=dtype, device=device)
        plain = Backbone(chosen.layers).to(device, dtype).eval().requires_grad_(False)
        head = nn.Linear(WIDTH, 10, device=device, dtype=dtype)
        with torch.no_grad():
            features = plain(images)
        runs: dict[str, Callable[[], object]] = {
            "features": lambda h=head, f=features: h(f).sum().backward(),
            "uncached": lambda h=head, p=plain, x=images: h(p(x)).sum().backward(),
        }
        for place in ("cpu", "auto"):
            kept = torchcache.mark(Backbone(chosen.layers).to(device, dtype), freeze=True, memory_cache_device=place)
            for _ in range(3):
                kept(images)
            where = "on the device" if place == "auto" else "on the host"
            runs[f"all hits, rows {where}"] = lambda h=head, k=kept, x=images: h(k(x)).sum().backward()
        found = medians(runs, device, chosen.repeats)
        filling = torchcache.mark(Backbone(chosen.layers).to(device, dtype), freeze=True)
        filling(images)  # what is learnt at first
        epochs = {"fill": filling, "uncached": plain}
        fill = medians({n: lambda b=b, h=head, x=images: _epoch(b, h, x) for n, b in epochs.items()}, device, EPOCHS)
        found["all misses"] = found["uncached"] * fill["fill"] / fill["uncached"]
        for name, took in found.items():
            table.add_row(name, str(dtype), f"{took * 1e3:.3f}", f"{took / found['features']:.2f}x")
    console.print(table)


def _epoch(body: nn.Module, head: nn.Module, images: torch.Tensor) -> None:
    """Some steps on images that nobody saw before."""
    for _ in range(STEPS):
        head(body(torch.randn_like(images))).sum().backward()


if __name__ == "__main__":
    main()
