"""Data sets of files, as users write them, for the tests of the loader."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import torchcache

SHAPE = (3, 20, 20)


class Files(Dataset):
    """Arrays in files, with labels; a file beside them counts what is loaded, in any process."""

    def __init__(self, folder, count, factor=1.0):
        self.folder, self.count, self.factor = str(folder), count, factor
        os.makedirs(self.folder, exist_ok=True)
        for index in range(count):
            self.write(index, np.random.default_rng(index).standard_normal(SHAPE).astype(np.float32))

    def write(self, index, array):
        np.save(f"{self.folder}/{index}.npy", array)

    def __len__(self):
        return self.count

    def read(self, index):
        with open(f"{self.folder}/loaded", "a") as log:
            log.write(f"{index}\n")
        return torch.from_numpy(np.load(f"{self.folder}/{index}.npy")) * self.factor

    def __getitem__(self, index):
        return self.read(index), index % 5

    def loads(self):
        """Which were loaded since the last time this was asked."""
        path = f"{self.folder}/loaded"
        if not os.path.exists(path):
            return []
        with open(path) as log:
            found = [int(line) for line in log]
        os.remove(path)
        return found


def encoder(**options):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 18 * 18, 16))
    return torchcache.mark(body, freeze=True, **options)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.body = encoder(**options)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x))


def train(loader, model, epochs, after=lambda epoch: None):
    """The losses of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        after(epoch)
    return losses
