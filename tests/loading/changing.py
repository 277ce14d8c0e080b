"""Training through the loader while files, labels and the data set change under it, beside PyTorch's loader."""

from __future__ import annotations

import collections
import random

import numpy as np
import torch
from image_files import SHAPE, Files, encoder
from torch.utils import data

import torchcache

EPOCHS = 8
USES = {
    "nothing": lambda x: x,
    "moved": lambda x: x.to("cpu", copy=True),
    "cut": lambda x: x[: len(x) // 2 + 1],
    "turned": lambda x: x[list(range(len(x)))[::-1]],
    "twice": lambda x: torch.cat([x, x]),
    "written": lambda x: x.mul_(2),
    "computed": lambda x: x + 1,
}


class WrongBatchError(AssertionError):
    """A batch, or what a cached model made of it, that differs."""


def endure(folder, seed):
    """Some epochs; how many batches were compared."""
    chance = random.Random(seed)
    files = Files(folder, chance.randrange(5, 40))
    options = {"batch_size": chance.randrange(1, 12), "num_workers": chance.choice([0, 0, 0, 2])}
    loader = torchcache.DataLoader(files, check=1.0, **options)
    plain = data.DataLoader(files, batch_size=options["batch_size"])
    model, counts = encoder(audit=0.0), collections.Counter()
    for epoch in range(EPOCHS):
        change(files, chance)
        loader.remembered._checked_at -= 3600  # as after an hour: all samples are checked
        used = False
        for (x, y), (expected, labels) in zip(loader, plain, strict=True):
            # What is read in every batch would be loaded from then on.
            used = not used and chance.random() < 0.5
            name = chance.choice([*USES] if used else ["nothing", "moved", "cut", "turned", "twice"])
            given = USES[name](x), USES[name](expected)
            with torchcache.bypass():
                wanted = model(given[1])
            if not torch.equal(y, labels) or not torch.allclose(model(given[0]), wanted, atol=1e-4):
                raise WrongBatchError(f"seed {seed}, epoch {epoch}, after {name}")
            if used and not torch.equal(x + 0, expected):
                raise WrongBatchError(f"seed {seed}, epoch {epoch}: the batch itself, after {name}")
            counts["batches compared"] += 1
    counts["samples not loaded"] += torchcache.stats(loader).skipped
    return counts


def change(files, chance):
    """Nothing, some files, or all that the data set makes of them."""
    kind = chance.choice(["nothing", "nothing", "nothing", "files", "factor"])
    if kind == "files":
        for index in chance.sample(range(len(files)), chance.randrange(1, len(files))):
            files.write(index, np.full(SHAPE, chance.random(), np.float32))
    if kind == "factor":
        files.factor = chance.choice([1.0, 2.0, -1.0])
