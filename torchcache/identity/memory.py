"""Elements of tensors read by their address: as numpy arrays that keep no tensor alive and change nothing about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_TYPES = {np.dtype(name).itemsize: np.dtype(name).str for name in ("u1", "u2", "u4", "u8", "c16")}

# Bytes that an element may have.
ITEM_SIZES = frozenset(_TYPES)


class _Memory:
    """Elements in memory, in numpy's protocol."""

    def __init__(self, address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, owner: Any) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "data": (address, False),  # torch warns of arrays that are read-only
            "shape": tuple(shape),
            "strides": tuple(step * itemsize for step in strides),
            "typestr": _TYPES[itemsize],
            "version": 3,
        }


def elements_at(
    address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, owner: Any = None
) -> npt.NDArray[Any]:
    """A view of elements in memory, whatever their dtype. ``Tensor.numpy`` would forbid to resize the storage.

    Parameters
    ----------
    address : int
        Of the first element.
    shape, strides : sequence of int
        In elements.
    itemsize : int
        Bytes of an element.
    owner : object, optional
        Keeps the memory, and is kept as long as the view. Without it the view may be read only while the caller knows
        that a tensor lies there.
    """
    if 0 in shape:
        return np.empty(tuple(shape), _TYPES[itemsize])
    return np.asarray(_Memory(address, shape, strides, itemsize, owner))


def row_major_bytes(elements: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Elements in row-major order, ``(bytes,)``; not copied where they lie so."""
    return np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
