"""Which batches of a data loader are this process's, where several processes work on the same one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["Share", "generators_of", "my_share", "rank_and_world"]


class Share:
    """Every ``world``-th item of ``items``, from item ``rank`` on.

    Parameters
    ----------
    items : iterable
        Batches, or the lists of indices of batches.
    rank, world : int
        This process, and how many there are.
    """

    def __init__(self, items: Iterable[Any], rank: int, world: int) -> None:
        self.items, self.rank, self.world = items, rank, world

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.items), self.rank, None, self.world)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.items), self.world))  # type: ignore[arg-type]  # raises what items raise


def my_share(loader: Iterable[Any], rank: int, world: int) -> Iterable[Any]:
    """The part of ``loader`` that is this process's: all of it where it is divided already.

    A plain ``DataLoader`` over a data set with indices loads nothing but this part.
    """
    if world == 1 or _is_divided(loader):
        return loader
    if type(loader) is not DataLoader or loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return Share(loader, rank, world)
    workers = loader.num_workers
    return DataLoader(
        loader.dataset,
        batch_sampler=Share(loader.batch_sampler, rank, world),
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor if workers else None,
    )


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are, under ``torch.distributed``; else 0 and 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def generators_of(loader: Any) -> list[torch.Generator]:
    """The random generators that decide the order of ``loader``."""
    found = [getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None))]
    return [generator for generator in dict.fromkeys(found) if isinstance(generator, torch.Generator)]


def _is_divided(loader: Any) -> bool:
    """Whether each process has its own part of the data: by a sampler, or by accelerate's loaders."""
    sampler = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return (
        isinstance(sampler, DistributedSampler)
        or isinstance(inner, DistributedSampler)
        or (type(loader).__module__.partition(".")[0] == "accelerate")
    )
