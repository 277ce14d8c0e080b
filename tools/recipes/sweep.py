"""K-fold cross-validation and a sweep over learning rates, sharing one cache across processes.

Every process has its own model; they share the directory. It is filled once, by ``warm``, so that processes that
start together do not all compute the same rows; after that no run computes any.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import tempfile

import torch
from torch import nn

import torchcache


def backbone(width):
    """Your own: any frozen model; all processes load the same weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Classifier(nn.Module):
    """A linear layer on frozen features, whose rows are kept in ``directory``."""

    def __init__(self, width, directory):
        super().__init__()
        self.features = torchcache.mark(backbone(width), freeze=True, persistent=True, persistent_cache_dir=directory)
        self.head = nn.Linear(width, 4)

    def forward(self, images):
        return self.head(self.features(images))


def data(samples):
    """Images and labels, the same in every process."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, 32, 32, generator=draw), torch.randint(4, (samples,), generator=draw)


def run(fold, rate, given):
    """Train on all folds but one; the accuracy on that one, and the rows that were computed for it."""
    torch.set_num_threads(1)
    images, labels = data(given.samples)
    held_out = torch.arange(given.samples) % given.folds == fold
    model = torchcache.transform(Classifier(given.width, given.directory))
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=rate)
    for _ in range(given.epochs):
        for part in (~held_out).nonzero().flatten().split(32):
            loss = nn.functional.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return right, torchcache.stats(model).misses


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 1e-3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--directory", help="where rows are kept; a temporary directory without")
    given = parser.parse_args(argv)
    given.directory = given.directory or tempfile.mkdtemp(prefix="sweep-")

    images, _ = data(given.samples)
    filled = torchcache.warm(
        torchcache.transform(Classifier(given.width, given.directory)), images.split(32), progress=False
    )
    runs = list(itertools.product(range(given.folds), given.rates))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.processes, mp_context=spawn) as pool:
        found = list(pool.map(run, *zip(*runs, strict=True), [given] * len(runs)))
    for rate in given.rates:
        scores = [right for (_, used), (right, _) in zip(runs, found, strict=True) if used == rate]
        print(f"rate {rate:g}: accuracy {sum(scores) / len(scores):.3f} over {len(scores)} folds")
    computed = sum(misses for _, misses in found)
    print(f"{filled.misses} rows computed ahead, and {computed} in {len(runs)} runs on {given.samples} samples")


if __name__ == "__main__":
    main()
