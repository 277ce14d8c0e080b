"""A ViT-B that is loaded in each run, and one that is deferred: time to the end of the first epochs, and memory.

    python tools/bench/deferred.py [--count 64] [--layers 12]

Each run is a process of its own over one directory. Needs transformers; weights are random.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import torchcache

BATCH, EPOCHS = 16, 8
RUNS = (("mark", "first"), ("mark", "second"), ("deferred", "first"), ("deferred", "second"))


def first_token(found: Any) -> torch.Tensor:
    """What a linear probe reads of a ViT."""
    return found.last_hidden_state[:, 0]


def resident() -> float:
    """Megabytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def run(how: str, directory: str, count: int, layers: int) -> None:
    """Train a linear head, and print seconds to the end of the first epoch and of all, and memory at the end."""
    start = time.perf_counter()

    def build() -> nn.Module:
        from transformers import ViTConfig, ViTModel

        torch.manual_seed(0)
        return ViTModel(ViTConfig(num_hidden_layers=layers))

    options: dict[str, Any] = {"persistent_cache_dir": directory, "output": first_token}
    if how == "mark":
        encoder = torchcache.mark(build(), freeze=True, persistent=True, **options)
    else:
        encoder = torchcache.deferred(build, identity="vit", **options)
    head = nn.Linear(768, 10)
    images = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ends = []
    for _ in range(EPOCHS):
        for part in images.split(BATCH):
            head(encoder(part)).sum().backward()
        ends.append(time.perf_counter() - start)
    if how == "deferred" and encoder.built:  # it stays for ten times as long as it took to build
        time.sleep(max(0.0, 10 * vars(encoder)["_seconds"] - ends[-1] + ends[0]))
        for part in images.split(BATCH):
            encoder(part)
    gc.collect()
    print(f"{ends[0]:.2f} {ends[-1]:.2f} {resident():.0f}")


def main() -> None:
    """Measure each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="images")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--run", nargs=2, metavar=("HOW", "DIRECTORY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        return run(*given.run, given.count, given.layers)
    table = Table("how", "run", "first epoch, s", f"{EPOCHS} epochs, s", "memory at the end, MB")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        for how, name in RUNS:
            command = [sys.executable, __file__, "--run", how, f"{directory}/{how}"]
            command += ["--count", str(given.count), "--layers", str(given.layers)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            table.add_row(how, name, *done.stdout.splitlines()[-1].split())
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
