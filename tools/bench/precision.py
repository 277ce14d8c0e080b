"""What ``cache_dtype`` saves and costs for the tokens of a small ViT: bytes a row, time of a batch of hits, error.

    python tools/bench/precision.py [--rows 64] [--calls 60]

The batches of all dtypes take turns, so that what else the machine does shows in all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import ViTConfig, ViTModel

import torchcache

BATCHES = 3
DTYPES = (None, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def backbone() -> nn.Module:
    """The first blocks of a ViT-S, weights as they are drawn: 197 tokens of 384 numbers a row."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1536)
    return ViTModel(config, add_pooling_layer=False)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--calls", type=int, default=60)
    arguments = parser.parse_args()
    batches = [torch.randn(arguments.rows, 3, 224, 224) for _ in range(BATCHES)]
    # Named rows are not hashed: the time is that of finding rows and of giving them back.
    names = [range(start * arguments.rows, (start + 1) * arguments.rows) for start in range(BATCHES)]
    models = {dtype: torchcache.mark(backbone(), freeze=True, cache_dtype=dtype, audit=0) for dtype in DTYPES}
    for model in models.values():
        for batch, ids in zip(batches, names, strict=True):
            with torchcache.sample_keys(ids):
                model(batch)
    seconds: dict[torch.dtype | None, list[float]] = {dtype: [] for dtype in DTYPES}
    for call in range(arguments.calls):
        for dtype, model in models.items():
            with torchcache.sample_keys(names[call % BATCHES]):
                start = time.perf_counter()
                model(batches[call % BATCHES])
                seconds[dtype].append(time.perf_counter() - start)
    table = Table("cache_dtype", title=f"all-hit batches of {arguments.rows} rows, 197x384 float32")
    for name in ("bytes a row", "ms a batch", "largest error"):
        table.add_column(name, justify="right")
    for dtype, model in models.items():
        with torchcache.sample_keys(names[0]):
            (audited,) = torchcache.audit(model, batches[0], rows=16).regions
        (region,) = torchcache.stats(model).regions
        milliseconds = f"{1e3 * statistics.median(seconds[dtype]):.1f}"
        size = f"{region.memory_bytes // region.rows_stored:,}"
        table.add_row(str(dtype).removeprefix("torch."), size, milliseconds, f"{100 * audited.largest_relative:.2g}%")
    Console().print(table)


if __name__ == "__main__":
    main()
