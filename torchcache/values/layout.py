"""How tensors lie in memory, and how others are made to lie so."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch

from torchcache.errors import Bypass
from torchcache.store.buffers import Buffers
from torchcache.store.select import element_bytes

# How a tensor with rows lies in memory: nothing where its dimensions lie in their order without gaps, their order where
# they lie without gaps, else their order and strides; for one row alone these, and a mark.
Lie = tuple[tuple[int, ...], ...]
_ALONE = (1,)


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

    def empty(self, count: int, near: torch.device, buffers: Buffers) -> torch.Tensor:
        """A row-major tensor for ``count`` rows of a call with inputs on ``near``, its contents undefined."""
        return _empty((count, *self.shape), self.dtype, place_of(self.device, near), buffers)

    def apply(self, leaf: torch.Tensor, near: torch.device, buffers: Buffers) -> torch.Tensor:
        """``leaf``, row-major and batch first, for a call with inputs on ``near``, as this layout says."""
        place = place_of(self.device, near)
        here = leaf.dtype == self.dtype and leaf.device == place
        if here and self.batch_dim == 0 and self.order == tuple(range(leaf.ndim)):
            return leaf
        placed = leaf.movedim(0, self.batch_dim)
        turned = placed.permute(*self.order)
        if here and turned.is_contiguous():
            return dense(placed, self.order)
        return _empty(turned.shape, self.dtype, place, buffers).copy_(turned).permute(*inverted(self.order))


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf of the output that is a view of another one.

    Parameters
    ----------
    base : int
        Which leaf it is a view of, whose rows come first and lie behind each other without gaps.
    shape, stride : tuple of int
        Its own; the size of the batch is that of the base.
    offset : int
        Elements from the first of the base to its first.
    batch_dim : int
        Which of its dimensions is the batch.
    """

    base: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    batch_dim: int

    @classmethod
    def among(
        cls, leaves: Sequence[torch.Tensor], dims: Sequence[int], alike: Callable[[int, int], bool]
    ) -> tuple[View | None, ...]:
        """Which leaves of an output, whose rows lie along ``dims``, are views of others; empty where none is.

        Only two of which ``alike`` says that equal elements of them come back equal.
        """
        if len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves):
            return ()
        found = tuple([cls._of(place, leaves, dims, alike) for place in range(len(leaves))])
        return found if any(found) else ()

    @classmethod
    def _of(
        cls, place: int, leaves: Sequence[torch.Tensor], dims: Sequence[int], alike: Callable[[int, int], bool]
    ) -> View | None:
        """Of which leaf one is a view: of the largest that holds each of its rows, the first of several."""
        leaf, dim = leaves[place], dims[place]
        reach = sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride(), strict=True))
        reach -= (leaf.shape[dim] - 1) * leaf.stride(dim)
        for index in sorted(range(len(leaves)), key=lambda index: -leaves[index].numel()):
            base = leaves[index]
            if dims[index] or not (share_memory(base, leaf) and _is_base(base) and alike(index, place)):
                continue
            if index == place:  # what holds it comes before it
                return None
            offset = leaf.storage_offset() - base.storage_offset()
            if base.stride(0) == leaf.stride(dim) and offset >= 0 and offset + reach < base.stride(0):
                return cls(index, tuple(leaf.shape), leaf.stride(), int(offset), dim)
        return None

    def apply(self, base: torch.Tensor) -> torch.Tensor:
        """The leaf, where ``base`` is what it is a view of."""
        shape = (*self.shape[: self.batch_dim], base.shape[0], *self.shape[self.batch_dim + 1 :])
        return base.as_strided(shape, self.stride, base.storage_offset() + self.offset)


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, which may have no data, lie in one memory, and their elements are read alike."""
    if type(one) is not type(other) or one.dtype != other.dtype or not one.layout == other.layout == torch.strided:
        return False
    if (one.is_conj(), one.is_neg()) != (other.is_conj(), other.is_neg()):
        return False
    return one.untyped_storage() is other.untyped_storage()


def _is_base(base: torch.Tensor) -> bool:
    """Whether the rows of a tensor, which come first, lie behind each other without gaps."""
    return bool(base.numel()) and not memory_order(base.shape, base.stride())[0] and is_dense(base.shape, base.stride())


def place_of(seen: torch.device, near: torch.device) -> torch.device:
    """Where an output of inputs on ``near`` lies that was ``seen`` elsewhere: devices of one kind share keys."""
    return near if near.type == seen.type else seen


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, buffers: Buffers) -> torch.Tensor:
    return buffers.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def lie_of(tensor: torch.Tensor, batch_dim: int | None = None) -> Lie:
    """How a tensor lies in memory, which code may ask for, and which decides how what operators make of it lies.

    With the sizes it tells every stride, of dimensions of one element too: where one has several channels or one,
    convolutions take the order of the dimensions from these strides.

    Parameters
    ----------
    tensor : torch.Tensor
        Of any shape and strides.
    batch_dim : int, optional
        The dimension of its rows. What comes back does not depend on how many there are, unless there are gaps.

    Raises
    ------
    Bypass
        Where some of its elements share memory, but are no expanded dimension.
    """
    return _lie(tensor.shape, tensor.stride(), batch_dim)


def is_alone(lie: Lie) -> bool:
    """Whether only a tensor of one row lies so."""
    return lie[2:] == (_ALONE,)


@functools.lru_cache(maxsize=4096)
def _lie(shape: tuple[int, ...], stride: tuple[int, ...], batch_dim: int | None) -> Lie:
    # A stride of one element counts where it is within others.
    elements = math.prod(max(1, size) for size in shape)
    stride = tuple([min(step, elements) if size == 1 else step for size, step in zip(shape, stride, strict=True)])
    usual = tuple(range(len(shape)))
    alone = batch_dim is not None and shape[batch_dim] == 1
    # That of one row does not where the row lies as usual.
    counted = [dim for dim in usual if not (alone and dim == batch_dim)]
    sizes, steps = [shape[dim] for dim in counted], tuple([stride[dim] for dim in counted])
    if steps == _strides(sizes, range(len(sizes))):
        return ()
    order = memory_order(shape, stride)
    if stride == _strides(shape, order):
        return (order,)
    if not _apart(shape, stride):
        raise Bypass("elements of an argument share memory", "pass its contiguous()", lasting=False)
    return (order, stride, _ALONE) if alone else (order, stride)


def laid(rows: torch.Tensor, like: torch.Tensor, batch_dim: int) -> torch.Tensor:
    """``rows`` as ``like`` lies in memory, whose rows lie along ``batch_dim`` as well.

    Where so many rows, or rows that differ, cannot lie so, their dimensions are in its order, without gaps.
    """
    order, *strides = lie_of(like, batch_dim) or (tuple(range(like.ndim)),)
    if not strides or not _apart(rows.shape, strides[0]):
        return dense(rows, order)
    step, count = strides[0][batch_dim], rows.shape[batch_dim]
    if not step and count > 1 and not _alike(rows.movedim(batch_dim, 0)):
        return dense(rows, order)
    made = torch.empty_strided(rows.shape, strides[0], dtype=rows.dtype, device=rows.device)
    target = made
    for dim in [dim for dim, step in enumerate(strides[0]) if not step and rows.shape[dim] > 1]:
        target, rows = target.narrow(dim, 0, 1), rows.narrow(dim, 0, 1)
    target.copy_(rows)
    return made


def _alike(rows: torch.Tensor) -> bool:
    """Whether all rows have the same bytes."""
    found = element_bytes(rows.contiguous()).view(rows.shape[0], -1)
    return bool((found == found[:1]).all())


def dense(leaf: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """``leaf`` without gaps, its dimensions in this memory order; itself where it is so already."""
    strides = _strides(leaf.shape, order)
    if leaf.stride() == strides:
        return leaf
    turned = leaf.permute(*order).contiguous()
    return turned.as_strided(leaf.shape, strides)


def inverted(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Dimensions by falling stride, of equal ones those of one element last; as they are where one is broadcast."""
    dims = range(len(shape))
    return tuple(dims if 0 in stride else sorted(dims, key=lambda dim: (-stride[dim], shape[dim] == 1)))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor has no gaps and no element twice, whatever the order of its dimensions."""
    return tuple(stride) == _strides(shape, memory_order(shape, stride))


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps whose dimensions lie in this order."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


def _apart(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether each dimension steps over all that lies within it, but for expanded ones."""
    reach = 0
    for step, size in sorted(zip(stride, shape, strict=True)):
        if step and size > 1:
            if step <= reach:
                return False
            reach += step * (size - 1)
    return True
