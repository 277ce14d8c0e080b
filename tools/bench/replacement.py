"""Hit rates of replacement policies on traces of training, beside the memory tier's own and the optimum.

Batches are looked up whole, then the rows that were missing are admitted, as the library does it. ``torchcache`` is the
tier itself; the others are as small as they can be.
"""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

from torchcache.store.blob import RowSpec
from torchcache.store.memory import MemoryTier
from torchcache.store.slab import ABSENT

ROWS = 1000
BATCH = 50
EPOCHS = 10
SPEC = RowSpec(((torch.int64, ()),))

Batch = Sequence[int]


def batches(rows: Sequence[int]) -> list[Batch]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def scan(share: float, *, shuffled: bool) -> list[Batch]:
    order, chance, trace = list(range(int(share * ROWS))), random.Random(0), []
    for _ in range(EPOCHS):
        if shuffled:
            chance.shuffle(order)
        trace += batches([*order])
    return trace


def augmented(training: float, validation: float) -> list[Batch]:
    trace, size = [], int(training * ROWS)
    for epoch in range(1, EPOCHS + 1):
        trace += batches(range(10**6 + epoch * size, 10**6 + (epoch + 1) * size))
        trace += batches(range(int(validation * ROWS)))
    return trace


def window(share: float, uses: int) -> list[Batch]:
    """Replay: batches drawn from the latest rows, a new row for every ``uses`` rows drawn."""
    chance, trace, newest = random.Random(0), [], 0
    for _ in range(2000):
        newest += BATCH // uses
        trace.append([chance.randrange(max(0, newest - int(share * ROWS)), newest) for _ in range(BATCH)])
    return trace


def folds(share: float, count: int = 5) -> list[Batch]:
    chance, trace, size = random.Random(0), [], int(share * ROWS)
    parts = [range(fold * size // count, (fold + 1) * size // count) for fold in range(count)]
    for held in parts:
        training = [row for part in parts if part is not held for row in part]
        for _ in range(3):
            chance.shuffle(training)
            trace += [*batches([*training]), *batches(held)]
    return trace


def zipf(exponent: float) -> list[Batch]:
    weights = 1 / np.arange(1, 20_001) ** exponent
    return batches(np.random.default_rng(0).choice(20_000, 100_000, p=weights / weights.sum()).tolist())


TRACES = {
    "scan of 1.1x, in order": scan(1.1, shuffled=False),
    "scan of 1.1x, shuffled": scan(1.1, shuffled=True),
    "scan of 2x, in order": scan(2, shuffled=False),
    "scan of 2x, shuffled": scan(2, shuffled=True),
    "scan of 5x, in order": scan(5, shuffled=False),
    "scan of 5x, shuffled": scan(5, shuffled=True),
    "augmented 0.8x, validation 0.5x": augmented(0.8, 0.5),
    "augmented 1.5x, validation 0.5x": augmented(1.5, 0.5),
    "augmented 5x, validation 0.5x": augmented(5, 0.5),
    "replay of the latest 0.5x": window(0.5, 5),
    "replay of the latest 1x": window(1, 5),
    "replay of the latest 2x": window(2, 5),
    "five folds of 2x": folds(2),
    "Zipf 0.8": zipf(0.8),
    "Zipf 1.0": zipf(1.0),
}


class Lru:
    """The row that was used longest ago goes."""

    def __init__(self) -> None:
        self.rows: collections.OrderedDict[int, int] = collections.OrderedDict()

    def look(self, batch: Batch) -> list[bool]:
        found = [row in self.rows for row in batch]
        for row in batch:
            if row in self.rows:
                self.rows.move_to_end(row)
        return found

    def admit(self, missing: Batch) -> None:
        for row in missing:
            if len(self.rows) >= ROWS:
                self.rows.popitem(last=False)
            self.rows[row] = 0


class First(Lru):
    """First come, stays."""

    def admit(self, missing: Batch) -> None:
        super().admit(missing[: ROWS - len(self.rows)])


class TinyLfu(Lru):
    """LRU that admits only rows that were asked for more often than the one that would go; counts halve."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[int] = collections.Counter()
        self.asked = 0

    def look(self, batch: Batch) -> list[bool]:
        self.counts.update(batch)
        self.asked += len(batch)
        if self.asked >= 10 * ROWS:
            self.asked //= 2
            self.counts = collections.Counter({row: count // 2 for row, count in self.counts.items() if count > 1})
        return super().look(batch)

    def admit(self, missing: Batch) -> None:
        for row in missing:
            if len(self.rows) < ROWS or self.counts[row] > self.counts[next(iter(self.rows))]:
                super().admit([row])


class S3Fifo:
    """A small queue, a main queue, and the names of what the small one dropped."""

    def __init__(self) -> None:
        self.small: collections.OrderedDict[int, int] = collections.OrderedDict()
        self.main: collections.OrderedDict[int, int] = collections.OrderedDict()
        self.ghosts: collections.OrderedDict[int, int] = collections.OrderedDict()

    def look(self, batch: Batch) -> list[bool]:
        for row in batch:
            for queue in (self.small, self.main):
                if row in queue:
                    queue[row] = min(3, queue[row] + 1)
        return [row in self.small or row in self.main for row in batch]

    def admit(self, missing: Batch) -> None:
        for row in missing:
            while len(self.small) + len(self.main) >= ROWS:
                self._drop()
            queue = self.small if self.ghosts.pop(row, None) is None else self.main
            queue[row] = 0

    def _drop(self) -> None:
        if len(self.small) >= ROWS // 10 or not self.main:
            row, uses = self.small.popitem(last=False)
            if uses:
                self.main[row] = 0
                return
            self.ghosts[row] = 0
            if len(self.ghosts) > ROWS:
                self.ghosts.popitem(last=False)
        else:
            row, uses = self.main.popitem(last=False)
            if uses:
                self.main[row] = uses - 1


class Brrip:
    """Two bits a row for when it is expected again; 31 of 32 new rows are expected last."""

    def __init__(self) -> None:
        self.rows: collections.OrderedDict[int, int] = collections.OrderedDict()
        self.chance = random.Random(1)

    def look(self, batch: Batch) -> list[bool]:
        found = [row in self.rows for row in batch]
        self.rows.update({row: 0 for row in batch if row in self.rows})
        return found

    def admit(self, missing: Batch) -> None:
        for row in missing:
            if len(self.rows) >= ROWS:
                gone = max(self.rows, key=self.rows.__getitem__)
                nearer = 3 - self.rows.pop(gone)
                if nearer:
                    self.rows.update({other: age + nearer for other, age in self.rows.items()})
            self.rows[row] = 2 if self.chance.random() < 1 / 32 else 3


class Ours:
    """The library's memory tier."""

    def __init__(self) -> None:
        self.tier = MemoryTier(ROWS * SPEC.size)

    def look(self, batch: Batch) -> list[bool]:
        slab = self.tier.slab(b"")
        if slab is None:
            return [False] * len(batch)
        return [slot != ABSENT for slot in slab.take([row.to_bytes(16, "big") for row in batch])[0]]

    def admit(self, missing: Batch) -> None:
        digests = [row.to_bytes(16, "big") for row in missing]
        self.tier.admit(b"", digests, [torch.tensor(missing)], SPEC, torch.device("cpu"))


POLICIES: dict[str, Callable[[], Lru | S3Fifo | Brrip | Ours]] = {
    "LRU": Lru,
    "first come": First,
    "S3-FIFO": S3Fifo,
    "BRRIP": Brrip,
    "TinyLFU": TinyLfu,
    "torchcache": Ours,
}


def replay(trace: list[Batch], policy: Lru | S3Fifo | Brrip | Ours) -> int:
    hits = 0
    for batch in trace:
        found = policy.look(batch)
        hits += sum(found)
        missing = list(dict.fromkeys(row for row, there in zip(batch, found, strict=True) if not there))
        if missing:
            policy.admit(missing)
    return hits


def optimum(trace: list[Batch]) -> int:
    """Belady's: what is asked for again last goes."""
    uses: dict[int, collections.deque[float]] = collections.defaultdict(collections.deque)
    for step, batch in enumerate(trace):
        for row in set(batch):
            uses[row].append(step)
    kept: dict[int, float] = {}
    hits = 0
    for batch in trace:
        hits += sum(row in kept for row in batch)
        for row in set(batch):
            uses[row].popleft()
            kept[row] = uses[row][0] if uses[row] else math.inf
        if len(kept) > ROWS:
            kept = dict(sorted(kept.items(), key=lambda item: item[1])[:ROWS])
    return hits


def main() -> None:
    print("| trace |", " | ".join([*POLICIES, "optimum"]), "|")
    print("|---" * (len(POLICIES) + 2) + "|")
    for name, trace in TRACES.items():
        hits = [*(replay(trace, policy()) for policy in POLICIES.values()), optimum(trace)]
        print(
            f"| {name} |", " | ".join(f"{100 * count / sum(map(len, trace)):.0f}%" for count in hits), "|", flush=True
        )


if __name__ == "__main__":
    main()
