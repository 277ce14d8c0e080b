"""Rows out of tensors and into them; dtypes without indexing kernels travel as integers of their size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from torchcache.streams import send

Rows = Sequence[int] | npt.NDArray[np.int64]

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Dtypes with indexing kernels.
INDEXABLE = {
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


def select_rows(leaf: torch.Tensor, rows: Rows, out: torch.Tensor | None = None) -> torch.Tensor:
    """``rows`` of ``leaf`` in a fresh tensor, or in ``out``, which has their shape and dtype."""
    index = _index(rows, leaf.device)
    if out is not None:
        torch.index_select(_carried(leaf), 0, index, out=_carried(out))
        return out
    if leaf.dtype in INDEXABLE:
        return leaf.index_select(0, index)
    return _carried(leaf).index_select(0, index).view(leaf.dtype)


def place_rows(target: torch.Tensor, rows: Rows, leaf: torch.Tensor) -> None:
    """Write ``leaf``, cast to the target's device and dtype, to ``rows`` of ``target``."""
    index = _index(rows, target.device)
    _carried(target).index_copy_(0, index, _carried(leaf.to(target.device, target.dtype)))


def concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all ``parts``, one after the other."""
    with torch.autocast(parts[0].device.type, enabled=False):  # it would promote, or refuse, some dtypes
        return torch.cat([*map(_carried, parts)]).view(parts[0].dtype)


def element_bytes(leaf: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, in one dimension, sharing its memory."""
    # One element is contiguous whatever its stride says, and only a stride of one can be viewed as bytes.
    return leaf.as_strided((leaf.numel(),), (1,)).view(torch.uint8)


def _index(rows: Rows, device: torch.device) -> torch.Tensor:
    # torch.tensor takes several times as long to find out that a list holds integers.
    index = torch.from_numpy(rows if isinstance(rows, np.ndarray) else np.fromiter(rows, np.int64, len(rows)))
    return send(index, device)


def _carried(leaf: torch.Tensor) -> torch.Tensor:
    return leaf if leaf.dtype in INDEXABLE else leaf.view(_CARRIERS[leaf.dtype.itemsize])
