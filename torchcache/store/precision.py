"""How the outputs of a row are stored: as they are, in another dtype, or as small numbers with a scale.

A scaled leaf is two: its numbers of one byte, and behind all outputs one scale a row, of shape ``(1, ..., 1)`` so that
``numbers * scale`` are the values. The scale is the row's largest magnitude by the largest number of the dtype, in
float32, or in float64 for a leaf of float64. What is stored of a row is a function of that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from torchcache.options import SCALED, CacheOptions
from torchcache.store.blob import RowSpec


class Loss(NamedTuple):
    """How far a stored leaf may be from what it was, at the most.

    Parameters
    ----------
    relative : float
        As a share of the row's largest magnitude.
    absolute : float
        Beyond that, where numbers are as small as its dtype has them.
    """

    relative: float = 0.0
    absolute: float = 0.0


EXACT = Loss()


class Precision:
    """How rows of one layout are stored.

    Parameters
    ----------
    names : sequence of str
        The names of the leaves.
    given : RowSpec
        The rows as they are computed.
    options : CacheOptions
        For the dtypes that the user chose.

    Attributes
    ----------
    stored : RowSpec
        The rows as they are stored: the leaves, then the scales of those that have one.
    losses : list of Loss
        What storing it may change, for each leaf.
    """

    def __init__(self, names: Sequence[str], given: RowSpec, options: CacheOptions) -> None:
        self.names = list(names)
        dtypes, shapes = [dtype for dtype, _ in given.leaves], [shape for _, shape in given.leaves]
        kept = [_kept(dtype, options.dtype_for(name)) for name, dtype in zip(names, dtypes, strict=True)]
        pairs = list(zip(dtypes, kept, strict=True))
        self._scaled = [index for index, (old, new) in enumerate(pairs) if new in SCALED and new is not old]
        scales = [(_wide(dtypes[index]), (1,) * len(shapes[index])) for index in self._scaled]
        self.stored = RowSpec((*zip(kept, shapes, strict=True), *scales))
        self.losses = [_loss(old, new) for old, new in pairs]

    def alike(self, index: int, other: int) -> bool:
        """Whether equal elements of these two leaves come back equal: what has a scale depends on its row."""
        one, two = self.stored.leaves[index][0], self.stored.leaves[other][0]
        return one is two and not {index, other} & {*self._scaled}

    def pack(self, rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Computed rows as they are stored.

        Returns
        -------
        rows : list of torch.Tensor
            One tensor a leaf of ``stored``; those without a scale are still to be cast.
        held : torch.Tensor or None
            Which rows come back as they are but for rounding, boolean; ``None`` where all do. The others have values
            that their dtype lacks: too large, too small for a scale, or infinite or not a number.
        """
        packed, scales, held = list(rows), list[torch.Tensor](), list[torch.Tensor]()
        for index, leaf in enumerate(rows):
            dtype = self.stored.leaves[index][0]
            if index in self._scaled:
                packed[index], scale, fits = _numbers(leaf, dtype)
                scales.append(scale)
                held.append(fits)
            elif dtype is not leaf.dtype and leaf.numel() and (fitting := _fits(leaf, dtype)) is not None:
                held.append(fitting)
        every = torch.stack([fits.cpu() for fits in held]).all(0) if held else None
        return [*packed, *scales], None if every is None or bool(every.all()) else every

    def unpack(
        self, stored: Sequence[torch.Tensor], empty: Callable[[int, int], torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Leaves of stored rows, those with a scale as they were given; the others are still to be cast.

        Parameters
        ----------
        stored : sequence of torch.Tensor
            One tensor a leaf of ``stored``.
        empty : callable
            From a leaf's index and a number of rows to a tensor for them, in the leaf's own dtype.
        """
        leaves = list(stored[: len(self.names)])
        for index, scale in zip(self._scaled, stored[len(self.names) :], strict=True):
            numbers, factor = _quick(leaves[index])
            values = empty(index, len(scale)).copy_(numbers)
            leaves[index] = values.mul_((scale * factor).to(values.device))
        return leaves


def _kept(given: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """The dtype of a stored leaf; a byte an element is not made another."""
    if chosen is None or not given.is_floating_point or (chosen in SCALED and given.itemsize == 1):
        return given
    return chosen


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the scale of a leaf is computed and stored in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _top(dtype: torch.dtype) -> float:
    return float((torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max)


def _loss(given: torch.dtype, kept: torch.dtype) -> Loss:
    if given is kept:
        return EXACT
    if kept not in SCALED:
        about = torch.finfo(kept)
        return Loss(about.eps / 2, about.tiny * about.eps / 2)
    # Half the distance of the largest numbers; the product is rounded to the leaf's own dtype.
    top = _top(kept)
    distance = torch.finfo(kept).eps * 2.0 ** (math.frexp(top)[1] - 1) if kept.is_floating_point else 1.0
    about = torch.finfo(given)
    return Loss(distance / top / 2 + about.eps, about.tiny * about.eps)


def _numbers(leaf: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers, scales, and which rows come back from them."""
    top, wide = _top(dtype), _wide(leaf.dtype)
    rows = leaf.reshape(len(leaf), leaf[:1].numel()).to(wide)
    largest = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(leaf))
    scale = largest / top
    about = torch.finfo(wide)
    fits = (largest == 0) | ((scale >= about.tiny) & (scale * top <= about.max))  # neither holds for not-a-number
    numbers = rows / torch.where(scale > 0, scale, 1)[:, None]
    if not dtype.is_floating_point:
        numbers.round_()
    return numbers.to(dtype).view(leaf.shape), scale.view(-1, *(1,) * (leaf.ndim - 1)), fits


def _quick(numbers: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Numbers that are quick to cast, and what they are to be multiplied by to be ``numbers``.

    Processors have no instruction for float8_e4m3fn, and torch casts it element by element. Its bits, with the exponent
    where float16 has it, are the same numbers by 2**8, whose exponents begin 8 lower. Not-a-number is not stored.
    """
    if numbers.dtype is not torch.float8_e4m3fn or numbers.device.type != "cpu":
        return numbers, 1.0
    bits = numbers.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return bits.bitwise_and_(~0x4000).view(torch.float16), 256.0  # what the sign left beside itself


def _fits(leaf: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Which rows have no finite value that ``dtype`` makes infinite; ``None`` where all are so."""
    most = torch.finfo(dtype).max
    if most >= torch.finfo(leaf.dtype).max:
        return None
    low, high = torch.aminmax(leaf)
    if bool((low >= -most) & (high <= most)):
        return None
    rows = leaf.reshape(len(leaf), -1)
    return ~((rows.abs() > most) & rows.isfinite()).any(1)
