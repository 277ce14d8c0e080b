"""The first call of a marked ViT with a linear head through each door, beside a plain forward; then an all-hit call.

    python tools/bench/first.py [--layers L] [--batch-sizes B ...] [--processes N]

Each first call is made in a process of its own, after a plain forward of the same batch. Seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from compiled import Classifier, seconds
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import ViTConfig

import torchcache

DOORS = ("call", "transform", "compile")
HITS = 30


def first_call(door: str, layers: int, batch_size: int) -> list[float]:
    """Seconds of a plain forward, of the head compiled and run alone, of the first call, and of an all-hit call."""
    x, model = torch.randn(batch_size, 3, 224, 224), Classifier(ViTConfig(num_hidden_layers=layers))
    with torch.no_grad():
        features = model.backbone(x)
        plain = min(seconds(lambda: model.backbone(x)) for _ in range(2))
    head = 0.0
    if door == "compile":
        alone = torch.compile(nn.Linear(*model.head.weight.shape[::-1]))
        head = seconds(lambda: alone(features))
    torchcache.mark(model.backbone)
    run = torch.compile(model, backend="torchcache") if door == "compile" else model
    if door == "transform":
        torchcache.transform(model)
    first = seconds(lambda: run(x))
    return [plain, head, first, statistics.median(seconds(lambda: run(x)) for _ in range(HITS))]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--only", choices=DOORS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(first_call(given.only, given.layers, given.batch_sizes[0])))
        return
    table = Table("door", "rows", "plain, s", "head alone, s", "first call, s", "all-hit call, ms")
    for rows in given.batch_sizes:
        for door in DOORS:
            arguments = ["--only", door, "--layers", f"{given.layers}", "--batch-sizes", f"{rows}"]
            runs = [json.loads(said(arguments)) for _ in range(given.processes)]
            plain, head, first, hit = (statistics.median(values) for values in zip(*runs, strict=True))
            table.add_row(door, f"{rows}", f"{plain:.2f}", f"{head:.2f}", f"{first:.2f}", f"{1e3 * hit:.2f}")
    Console(width=100).print(table)


def said(arguments: list[str]) -> str:
    """The last line of a process in which nothing was compiled before."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty},
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
