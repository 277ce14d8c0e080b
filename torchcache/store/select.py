"""Rows out of tensors and into them; dtypes without indexing kernels travel as integers of their size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from torchcache.dynamo import is_wrapped
from torchcache.streams import send
from torchcache.threads import in_parts

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
# Dtypes of torch that NumPy has as well.
_OF_NUMPY = INDEXABLE - {torch.bfloat16}


def select_rows(leaf: torch.Tensor, rows: Rows) -> torch.Tensor:
    """``rows`` of ``leaf`` in a fresh tensor."""
    if _is_plain(leaf):
        places = _numbers(rows)
        if len(places) and int(places.view(np.uint64).max()) >= len(leaf):  # negative ones are large then
            raise IndexError(f"one of {len(places)} rows is none of the {len(leaf)} that there are")
        target = torch.empty((len(places), *leaf.shape[1:]), dtype=leaf.dtype, device="cpu")
        copy_rows(row_bytes(leaf), places, row_bytes(target))
        return target
    index = _index(rows, leaf.device)
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


def copy_rows(source: npt.NDArray[np.uint8], places: npt.NDArray[np.int64], target: npt.NDArray[np.uint8]) -> None:
    """Copy rows of bytes, which must be there, to ``target``.

    ``index_select`` waits for all of torch's threads, where rows are long once a row: that takes many times as long as
    the copy where loaders keep the cores busy.
    """
    if not target.size:
        return

    def copy(start: int, stop: int) -> list[None]:
        # NumPy writes to ``out`` at once only in a mode that refuses no number.
        source.take(places[start:stop], axis=0, out=target[start:stop], mode="clip")
        return []

    in_parts(len(places), target.shape[1], copy)


def row_bytes(leaf: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous CPU tensor of shape ``(n, *)`` as an ``(n, bytes)`` array sharing its memory."""
    count = leaf.shape[0]
    if leaf.dtype in _OF_NUMPY:
        array = (leaf.detach() if leaf.requires_grad else leaf).numpy()
        if array.ndim == 2 and array.size:
            return array.view(np.uint8)
        flat = array.reshape(-1).view(np.uint8)
    else:
        flat = element_bytes(leaf.detach()).numpy()
    return flat.reshape(count, flat.size // count if count else 0)


def _is_plain(leaf: torch.Tensor) -> bool:
    """Whether its elements lie one after the other in the host's memory, and nobody asks how they were selected."""
    return (
        type(leaf) is torch.Tensor
        and leaf.is_cpu
        and leaf.layout is torch.strided
        and leaf.is_contiguous()
        and not (leaf.requires_grad or leaf.is_conj() or leaf.is_neg() or leaf.is_quantized or is_wrapped(leaf))
    )


def _numbers(rows: Rows) -> npt.NDArray[np.int64]:
    # torch.tensor takes several times as long to find out that a list holds integers.
    return rows if isinstance(rows, np.ndarray) else np.fromiter(rows, np.int64, len(rows))


def _index(rows: Rows, device: torch.device) -> torch.Tensor:
    return send(torch.from_numpy(_numbers(rows)), device)


def _carried(leaf: torch.Tensor) -> torch.Tensor:
    return leaf if leaf.dtype in INDEXABLE else leaf.view(_CARRIERS[leaf.dtype.itemsize])
