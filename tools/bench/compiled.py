"""The torch.compile door: an all-hit step of a ViT-B backbone with a linear head, and what compiling costs."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from bare import bare_hash
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import ViTConfig, ViTModel

import torchcache
from torchcache.digest.rows import digest_rows

TABLE = 4096  # rows of precomputed features


class Backbone(nn.Module):
    """A ViT's class token, ``(B, hidden)``."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vit(pixels).last_hidden_state[:, 0]


class Classifier(nn.Module):
    """A linear head on it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.hidden_size, 100)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixels))


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def step(run: Callable[[torch.Tensor], torch.Tensor], head: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    head.zero_grad()
    run(x).sum().backward()


def first_step(which: str, layers: int, batch_size: int) -> float:
    """Seconds of the first step in a process of its own, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, __file__, "--only", which, "--layers", str(layers), "--batch-size", str(batch_size)],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty},
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout.split()[-1])


def run_first_step(which: str, config: ViTConfig, x: torch.Tensor) -> None:
    """What such a process does."""
    model = Classifier(config)
    torch.compile(nn.Linear(2, 2))(torch.ones(2, 2))  # loads the compiler, which both need
    if which == "cached":
        torchcache.mark(model.backbone)
    run = torch.compile(model, backend="torchcache" if which == "cached" else "inductor")
    print(seconds(lambda: step(run, model.head, x)))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--first-steps", type=int, default=3, help="processes that time their first step, of each kind; 0 for none"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", choices=["cached", "uncached"], help="time the first step of one, and nothing else")
    arguments = parser.parse_args()
    config = ViTConfig(num_hidden_layers=arguments.layers)
    x = torch.randn(arguments.batch_size, 3, 224, 224)
    if arguments.only:
        run_first_step(arguments.only, config, x)
        return

    first: dict[str, list[float]] = {"uncached": [], "cached": []}
    for _ in range(arguments.first_steps):
        for which in random.sample(list(first), len(first)):
            first[which].append(first_step(which, arguments.layers, arguments.batch_size))
    plain = Classifier(config).eval()
    model = Classifier(config)
    model.load_state_dict(plain.state_dict())
    torchcache.mark(model.backbone)
    cached = torch.compile(model, backend="torchcache", options={"compile_misses": False})
    step(cached, model.head, x)
    with torch.no_grad():
        torch.testing.assert_close(cached(x), plain(x), rtol=1e-3, atol=1e-3)
        features = plain.backbone(x)
    table = features.repeat(TABLE // len(x) + 1, 1)
    head = torch.compile(plain.head)
    step(head, plain.head, features)

    def unguarded() -> None:
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            step(cached, model.head, x)

    def fed_step() -> None:
        step(head, plain.head, table[torch.randint(len(table), (len(x),))])

    def hash_rows() -> None:
        digest_rows([x], "xxh3_128")

    actions: dict[str, Callable[[], object]] = {
        "all-hit step": lambda: step(cached, model.head, x),
        "head on precomputed features, gathered": fed_step,
        "head on one batch of features, at rest": lambda: step(head, plain.head, features),
        "hash of the batch, bare XXH3-128 in threads": bare_hash(x),
        "hash of the batch, as torchcache does it": hash_rows,
        "such a hash, then the gathered head": lambda: (hash_rows(), fed_step()),
        "all-hit step without torch.compile's guards": unguarded,
    }
    runs: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(arguments.repeats):
        for name in random.sample(list(actions), len(actions)):
            runs[name].append(seconds(actions[name]))
    hits, fed, _, bare, own, both, _ = (1e3 * statistics.median(values) for values in runs.values())
    report = Table("what", "figure", title=f"ViT with {arguments.layers} blocks, batch {arguments.batch_size}")
    for name, values in runs.items():
        report.add_row(name, f"{1e3 * statistics.median(values):.2f} ms")
    report.add_row("all-hit step / (gathered + bare hash)", f"{hits / (fed + bare):.2f}")
    report.add_row("all-hit step / (gathered + our hash)", f"{hits / (fed + own):.2f}")
    report.add_row("all-hit step / our hash and head one after the other", f"{hits / both:.2f}")
    if arguments.first_steps:
        compile_plain, compile_cached = (statistics.median(values) for values in first.values())
        report.add_row("first step uncached, compile included", f"{compile_plain:.1f} s")
        report.add_row("first step cached, compile included", f"{compile_cached:.1f} s")
        report.add_row("the same as a ratio", f"{compile_cached / compile_plain:.2f}")
    Console(width=110).print(report)


if __name__ == "__main__":
    main()
