"""Which arguments may have rows, along which dimension, and arguments with other rows in the place of theirs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from torchcache.values.layout import laid
from torchcache.values.take import Taken

Tensors = Sequence[torch.Tensor]
# For each tensor argument the dimension of its rows; ``None`` where all rows share it.
Roles = tuple[int | None, ...]

# Ways to tell rows from shared arguments that are tried before giving up.
MOST_GUESSES = 8


def guesses(tensors: Tensors, whole: Taken | None, batch_dim: int) -> Iterator[Roles]:
    """Roles that could explain the outputs, likely ones first, and not too many."""
    return itertools.islice(_all_guesses(tensors, whole, batch_dim), MOST_GUESSES)


def _all_guesses(tensors: Tensors, whole: Taken | None, batch_dim: int) -> Iterator[Roles]:
    """Roles that could explain the outputs: all tensors as long as the batch have rows, or all but one, or two."""
    shapes = [tuple(leaf.shape) for leaf in whole.tensors] if whole is not None else []
    for size in counts_of(tensors, batch_dim):
        # Of one row alone an output may lack the dimension: forward may squeeze it.
        if not size or not (size == 1 or all(size in shape for shape in shapes)):
            continue
        roles = [
            next(
                (dim for dim in dict.fromkeys((batch_dim, 0)) if tensor.ndim > dim and tensor.shape[dim] == size), None
            )
            for tensor in tensors
        ]
        candidates = [place for place, dim in enumerate(roles) if dim is not None]
        for count in range(min(3, len(candidates))):
            for shared in itertools.combinations(reversed(candidates), count):
                yield tuple(None if place in shared else dim for place, dim in enumerate(roles))


def counts_of(tensors: Tensors, batch_dim: int) -> list[int]:
    """How many rows there could be."""
    dims = dict.fromkeys((batch_dim, 0))
    return [*dict.fromkeys(tensor.shape[dim] for tensor in tensors for dim in dims if tensor.ndim > dim)]


def rows_of(tensors: Tensors, roles: Sequence[int | None]) -> list[torch.Tensor]:
    """The tensors that have rows, with their rows first."""
    return [
        tensor if dim == 0 else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, roles, strict=True)
        if dim is not None
    ]


def select(tensors: Tensors, roles: Sequence[int | None], rows: Tensors) -> list[torch.Tensor]:
    """``tensors`` with ``rows``, rows first, in place of those that have rows, and as these lie in memory."""
    given = iter(rows)
    return [
        tensor if dim is None else laid(next(given) if dim == 0 else next(given).movedim(0, dim), tensor, dim)
        for tensor, dim in zip(tensors, roles, strict=True)
    ]
