"""The model whose cache suffers: small rows for the database, large ones for files, right to the bit in any batch."""

from pathlib import Path

import torch
from torch import nn

import torchcache
from torchcache.store import disk


class Stretch(nn.Module):
    """Each input of shape ``(B, 4)`` times ``width`` weights."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, x):
        return (x.unsqueeze(-1) * self.weight).flatten(1)


class WrongRowError(AssertionError):
    """A row that differs from the computed one."""


def begin_anew(directory):
    """Have the next tier of ``directory`` be as in a new process."""
    disk._tiers.pop(Path(directory), None)


class Run:
    """A training run on ``directory``: two cached models, and what they answer."""

    def __init__(self, directory, **options):
        begin_anew(directory)
        self.tier = disk.disk_tier(Path(directory))
        options = {
            "persistent": True,
            "persistent_cache_dir": str(directory),
            "zstd_compression_level": None,
            **options,
        }
        self.models = {
            name: torchcache.mark(Stretch(width), freeze=True, **options)
            for name, width in {"small": 16, "large": 12_000}.items()
        }
        self.twins = {name: Stretch(len(model.weight)) for name, model in self.models.items()}

    def step(self, numbers, name="small"):
        """Run one model on the rows called ``numbers``; raises for a wrong answer."""
        x = rows(numbers)
        with torch.no_grad():
            if not torch.equal(self.models[name](x), self.twins[name](x)):
                raise WrongRowError(f"rows {list(numbers)} of {name}")

    def steps(self, count, large=8):
        """All rows below ``count``, in batches, and the first ``large`` of the large ones; all on disk at the end."""
        for start in range(0, count, 50):
            self.step(range(start, min(start + 50, count)))
        for start in range(0, large, 4):
            self.step(range(start, min(start + 4, large)), "large")
        torchcache.flush()

    def count(self, name):
        """The sum of one counter of ``torchcache.stats`` over both models."""
        return sum(
            getattr(region, name) for model in self.models.values() for region in torchcache.stats(model).regions
        )


def rows(numbers):
    """The inputs called ``numbers``: random ones, so that their outputs compress badly."""
    generator = torch.Generator()
    return torch.stack([torch.randn(4, generator=generator.manual_seed(number)) for number in numbers])
