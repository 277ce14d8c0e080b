"""The first epoch: rows computed and stored, in memory and on disk, beside the same model uncached."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import torchcache

BATCH = 16
BLOCK = 8  # batches in a row: the writer has to keep up with them


class Block(nn.Module):
    """One block of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.heads, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.heads(self.norms[0](x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.joined(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Encoder(nn.Module):
    """A vision transformer of some depth; its mean token ``(B, 384)`` or all tokens ``(B, 196, 384)``."""

    def __init__(self, depth: int, tokens: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 384, 16, 16)
        self.blocks = nn.Sequential(*(Block(384) for _ in range(depth)))
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.blocks(self.patch(x).flatten(2).mT)
        return found if self.tokens else found.mean(1)


class Classifier(nn.Module):
    """A linear head on it."""

    def __init__(self, backbone: Encoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(384, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.backbone(x)
        return self.head(found if found.ndim == 2 else found.mean(1))


def block(model: Classifier) -> float:
    """Seconds of some training steps on images never seen before."""
    batches = [torch.randn(BATCH, 3, 224, 224) for _ in range(BLOCK)]
    start = time.perf_counter()
    for x in batches:
        model.head.zero_grad()
        model(x).sum().backward()
    return time.perf_counter() - start


def fill(depth: int, tokens: bool, repeats: int) -> tuple[float, dict[str, float], float]:
    """Milliseconds a row uncached, each contender's median ratio to that, and what the first call takes more (s)."""
    torch.manual_seed(0)
    plain = Classifier(Encoder(depth, tokens).eval().requires_grad_(False))
    with tempfile.TemporaryDirectory() as folder:
        models = {"uncached": plain}
        for name, options in (
            ("memory", {}),
            ("memory and disk", {"persistent": True, "persistent_cache_dir": folder}),
        ):
            backbone = Encoder(depth, tokens)
            backbone.load_state_dict(plain.backbone.state_dict())
            torchcache.mark(backbone, freeze=True, max_memory_cache_size=4e9, **options)
            models[name] = torchcache.transform(Classifier(backbone))
        x = torch.randn(BATCH, 3, 224, 224)
        first = {name: seconds(lambda model=model: model(x)) for name, model in models.items()}
        spent: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(repeats):
            for name in random.sample(list(models), len(models)):
                spent[name].append(block(models[name]))
                torchcache.flush()
        assert torchcache.stats(models["memory and disk"]).misses == BATCH * (1 + BLOCK * repeats)
    base = statistics.median(spent["uncached"])
    ratios = {name: statistics.median(values) / base for name, values in spent.items() if name != "uncached"}
    return 1e3 * base / BLOCK / BATCH, ratios, first["memory and disk"] - first["uncached"]


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="blocks of each contender")
    arguments = parser.parse_args()
    table = Table("blocks", "stored a row", "uncached, ms/row", "memory", "memory and disk", "first call, s more")
    for tokens in (False, True):
        for depth in (0, 1, 2, 4, 8):
            row_ms, ratios, first = fill(depth, tokens, arguments.repeats)
            stored = "196x384 (300 KB)" if tokens else "384 (1.5 KB)"
            table.add_row(str(depth), stored, f"{row_ms:.1f}", *(f"{r:.3f}x" for r in ratios.values()), f"{first:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
