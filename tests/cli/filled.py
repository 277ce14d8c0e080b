"""A model with two marked backbones, and a cache directory that it filled."""

import torch
from torch import nn

import torchcache
from torchcache.cli.main import main

ROWS = 40


class Model(nn.Module):
    """Small rows that compress (``text``), and rows that are files of their own (``vision``)."""

    def __init__(self, directory, vision=40_000):
        super().__init__()
        torch.manual_seed(0)
        options = {"freeze": True, "persistent": True, "persistent_cache_dir": directory}
        self.text = torchcache.mark(nn.Sequential(nn.Linear(10, 800), nn.ReLU()), **options)
        self.vision = torchcache.mark(nn.Linear(10, vision), **options)
        self.head = nn.Linear(800, 2)

    def forward(self, x):
        return self.head(self.text(x)) + self.vision(x).mean(1, keepdim=True)


def data(count=ROWS, seed=1):
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))


def run(directory, x=None, model=None, door=torchcache.transform):
    """Outputs of a model that caches in ``directory``, its misses and its disk hits."""
    model = door(model or Model(directory))
    with torch.no_grad():
        outputs = model(data() if x is None else x)
    torchcache.flush()
    stats = torchcache.stats(model)
    return outputs, stats.misses, sum(region.disk_hits for region in stats.regions)


def command(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err
