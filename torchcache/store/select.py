"""Rows out of tensors and into them; dtypes without indexing kernels travel as integers of their size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["join_rows", "place_rows", "select_rows"]

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INDEXABLE = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
}


def select_rows(leaf: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """A fresh tensor of ``rows`` of ``leaf``."""
    index = torch.tensor(rows, dtype=torch.int64, device=leaf.device)
    return _carried(leaf).index_select(0, index).view(leaf.dtype)


def place_rows(target: torch.Tensor, rows: Sequence[int], leaf: torch.Tensor) -> None:
    """Write ``leaf``, cast to the target's device and dtype, to ``rows`` of ``target``."""
    index = torch.tensor(rows, dtype=torch.int64, device=target.device)
    _carried(target).index_copy_(0, index, _carried(leaf.to(target.device, target.dtype)))


def join_rows(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The rows of both, one after the other."""
    return torch.cat((_carried(first), _carried(second))).view(first.dtype)


def _carried(leaf: torch.Tensor) -> torch.Tensor:
    return leaf if leaf.dtype in _INDEXABLE else leaf.view(_CARRIERS[leaf.dtype.itemsize])
