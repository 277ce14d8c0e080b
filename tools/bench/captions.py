"""Captions of 5 to 77 tokens on a frozen T5 encoder, in batches padded to their longest: time and bytes.

    python tools/bench/captions.py [--count 512] [--width 512]

Uncached; cached as the batches come; with ``padding=``; all padded to 77; and tokens that were computed by hand, padded
in each batch. Medians of later epochs, each run's in a row.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5EncoderModel

import torchcache

LONGEST, WORDS, BATCH = 77, 1000, 32
Batch = tuple[torch.Tensor, torch.Tensor]


class Model(nn.Module):
    """A linear head on the mean of a caption's tokens."""

    def __init__(self, width: int, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = T5Config(vocab_size=WORDS, d_model=width, d_kv=64, d_ff=4 * width, num_layers=6, num_heads=width // 64)
        self.encoder = T5EncoderModel(config).eval().requires_grad_(False)
        self.head = nn.Linear(width, 10)
        if options:
            torchcache.mark(self.encoder, **options)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.pooled(
            self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask
        )

    def pooled(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the head makes of tokens."""
        return self.head((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def batches(captions: list[torch.Tensor], longest: int = 0) -> Iterator[tuple[list[int], Batch]]:
    """Shuffled batches, each padded to its longest caption, or to ``longest``."""
    order = random.sample(range(len(captions)), len(captions))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids = pad_sequence([captions[row] for row in rows], batch_first=True)
        ids = nn.functional.pad(ids, (0, max(0, longest - ids.shape[1])))
        yield rows, (ids, (ids > 0).long())


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512, help="captions")
    parser.add_argument("--width", type=int, default=512, help="of the encoder")
    parser.add_argument("--epochs", type=int, default=7)
    chosen = parser.parse_args()
    chance = random.Random(0)
    captions = [
        torch.tensor([chance.randrange(1, WORDS) for _ in range(chance.randint(5, LONGEST))])
        for _ in range(chosen.count)
    ]
    plain = Model(chosen.width)
    with torch.no_grad():
        by_hand = [plain.encoder(input_ids=ids[None]).last_hidden_state[0] for ids in captions]
    marked = {
        "cached as they come": (Model(chosen.width, audit=0.01), 0),
        "all padded to 77": (Model(chosen.width, audit=0.01), LONGEST),
        'padding="attention_mask"': (Model(chosen.width, padding="attention_mask"), 0),
    }

    def hand(rows: list[int], batch: Batch) -> torch.Tensor:
        return plain.pooled(pad_sequence([by_hand[row] for row in rows], batch_first=True), batch[1])

    runs: dict[str, tuple[Callable[[list[int], Batch], torch.Tensor], nn.Module, int]] = {
        "uncached": (lambda rows, batch: plain(*batch), plain, 0),
        **{name: (lambda rows, batch, model=model: model(*batch), model, end) for name, (model, end) in marked.items()},
        "tokens by hand": (hand, plain, 0),
    }
    table = Table(
        "run", "first epoch, s", "later, s", "of by hand", "hits", "bytes a row", title=f"{chosen.count} captions"
    )
    found = {}
    for name, (compute, model, end) in runs.items():
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        seconds = []
        for _ in range(chosen.epochs if name != "uncached" else 2):
            start = time.perf_counter()
            for rows, batch in batches(captions, end):
                optimizer.zero_grad()
                nn.functional.cross_entropy(compute(rows, batch), torch.tensor([row % 10 for row in rows])).backward()
                optimizer.step()
            seconds.append(time.perf_counter() - start)
        found[name] = seconds[0], statistics.median(seconds[2:] or seconds[1:])
    hand_bytes = sum(tokens.nbytes for tokens in by_hand) / len(by_hand)
    for name, (first, later) in found.items():
        hits, size = "", f"{hand_bytes:,.0f}" if name == "tokens by hand" else ""
        if name in marked:
            stats = torchcache.stats(marked[name][0])
            hits = f"{stats.hits / (stats.hits + stats.misses + stats.bypasses):.0%}"
            size = f"{sum(region.memory_bytes for region in stats.regions) / chosen.count:,.0f}"
        table.add_row(name, f"{first:.2f}", f"{later:.3f}", f"{later / found['tokens by hand'][1]:.2f}x", hits, size)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
