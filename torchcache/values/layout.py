"""How a leaf of the output lies in memory, and how it is made to lie so again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from torchcache.store.buffers import Buffers
from torchcache.store.select import select_rows

__all__ = ["Layout", "dense", "inverted", "memory_order", "pick_rows"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a leaf of the output looks like to its user.

    Parameters
    ----------
    dtype : torch.dtype
        Its dtype.
    shape : tuple of int
        Its row shape.
    order : tuple of int
        Its dimensions, as its user sees them, from the outermost to the innermost in memory.
    device : torch.device
        Where it lives.
    batch_dim : int, default: 0
        Which of its dimensions is the batch. Where rows are stored, the batch comes first.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    device: torch.device
    batch_dim: int = 0

    @classmethod
    def of(cls, leaf: torch.Tensor, batch_dim: int = 0) -> Layout:
        """The layout of a tensor whose rows lie along ``batch_dim``."""
        shape = (*leaf.shape[:batch_dim], *leaf.shape[batch_dim + 1 :])
        return cls(leaf.dtype, shape, memory_order(leaf.shape, leaf.stride()), leaf.device, batch_dim)

    def place(self, near: torch.device) -> torch.device:
        """Where a leaf goes whose inputs are on ``near``: keys are shared between the devices of one kind."""
        return near if near.type == self.device.type else self.device

    def empty(self, count: int, near: torch.device, buffers: Buffers) -> torch.Tensor:
        """A row-major tensor for ``count`` rows of a call with inputs on ``near``, its contents undefined."""
        return _empty((count, *self.shape), self.dtype, self.place(near), buffers)

    def apply(self, leaf: torch.Tensor, near: torch.device, buffers: Buffers) -> torch.Tensor:
        """``leaf``, row-major and batch first, for a call with inputs on ``near``, as this layout says."""
        place = self.place(near)
        here = leaf.dtype == self.dtype and leaf.device == place
        if here and self.batch_dim == 0 and self.order == tuple(range(leaf.ndim)):
            return leaf
        turned = leaf.movedim(0, self.batch_dim).permute(*self.order)
        if here and self.batch_dim != 0 and turned.is_contiguous():
            return turned.permute(*inverted(self.order))
        return _empty(turned.shape, self.dtype, place, buffers).copy_(turned).permute(*inverted(self.order))


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, buffers: Buffers) -> torch.Tensor:
    return buffers.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def pick_rows(leaf: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """``rows`` of ``leaf`` in a fresh tensor that lies in memory as ``leaf`` does."""
    picked = select_rows(leaf, rows)
    return picked if leaf.is_contiguous() else dense(picked, memory_order(leaf.shape, leaf.stride()))


def dense(leaf: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """``leaf`` without gaps, its dimensions in this memory order; itself where it is so already."""
    if order == tuple(range(len(order))):
        return leaf.contiguous()
    return leaf.permute(*order).contiguous().permute(*inverted(order))


def inverted(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Dimensions by falling stride; those of size one and broadcast ones keep their place where they can."""
    dims = list(range(len(shape)))
    if any(step == 0 and size > 1 for size, step in zip(shape, stride, strict=True)):
        return tuple(dims)
    real = [dim for dim in dims if shape[dim] != 1]
    ordered = sorted(real, key=lambda dim: -stride[dim])
    if ordered == real:
        return tuple(dims)
    places = iter(ordered)
    return tuple(next(places) if shape[dim] != 1 else dim for dim in dims)
