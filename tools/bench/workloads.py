"""What is measured: stand-ins for backbones, their data, and an epoch. Imports no cache, as peers are measured too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

SEED = 0


class Pooled(nn.Module):
    """Stands for an image backbone: reads every pixel, gives 768 features."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 768, 32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.patch(x).mean((2, 3))


class Sentence(nn.Module):
    """Stands for a sentence encoder: token ids to 384 features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 384)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids).mean(1)


class Tokens(nn.Module):
    """Stands for a vision transformer whose token features are kept: 197 of 768 a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 768)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids)


class Model(nn.Module):
    """A head on a backbone."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.backbone(x)
        return self.head(features if features.ndim == 2 else features.mean(1))


def workloads(quick: bool) -> dict[str, tuple[nn.Module, int, torch.Tensor]]:
    """Backbone, features and data of each workload; the same in every process."""
    torch.manual_seed(SEED)
    images = 256 if quick else 512
    rows = 1024 if quick else 4096
    return {
        "images 3x224x224 to 768": (Pooled(), 768, torch.randn(images, 3, 224, 224)),
        "64 token ids to 384": (Sentence(), 384, torch.randint(1000, (rows, 64))),
        "197 token ids to 197x768": (Tokens(), 768, torch.randint(1000, (images, 197))),
    }


def batches(data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A shuffled epoch: the inputs of a batch, gathered as a loader would, and their row numbers."""
    for rows in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).split(64):
        yield data[rows], rows


def epoch(
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    head: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """One epoch of training the head."""
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    for x, rows in loader:
        loss = nn.functional.cross_entropy(step(x, rows), rows % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
