"""What, besides the rows, makes a key: everything that a call fixes for all of its rows.

A key is 32 bytes: the fingerprint of the call (16) and the digest of the row (16).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torchcache.lookup.digest import digest_bytes
from torchcache.options import CacheOptions
from torchcache.store.blob import FORMAT_VERSION

__all__ = ["NumericMode", "call_fingerprint"]


class NumericMode(NamedTuple):
    """The ambient settings that change what the same program computes.

    Parameters
    ----------
    device : str
        Device type, without an index.
    autocast : torch.dtype or None
        The autocast dtype, ``None`` where autocast is off.
    matmul : str
        ``torch.get_float32_matmul_precision()``.
    default : torch.dtype
        ``torch.get_default_dtype()``.
    tf32 : bool
        Whether convolutions on this device may round to TF32: ``torch.backends.cudnn.allow_tf32`` on CUDA.
    """

    device: str
    autocast: torch.dtype | None
    matmul: str
    default: torch.dtype
    tf32: bool

    @classmethod
    def current(cls, device: str, autocast: torch.dtype | str | None = "ambient") -> NumericMode:
        """The mode in force on this thread for ``device``, or that with another autocast dtype."""
        if isinstance(autocast, str):
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        tf32 = device == "cuda" and torch._C._get_cudnn_allow_tf32()
        return cls(device, autocast, torch.get_float32_matmul_precision(), torch.get_default_dtype(), tf32)


def call_fingerprint(
    region: bytes,
    options: CacheOptions,
    mode: NumericMode,
    rows: Sequence[torch.Tensor],
    shared: Sequence[bytes],
    named: int,
) -> bytes:
    """16 bytes over everything but the contents of the rows.

    Parameters
    ----------
    region : bytes
        The region's fingerprint: program, state, arguments.
    options : CacheOptions
        For the options that change stored values or digests.
    mode : NumericMode
        The numeric mode.
    rows : sequence of torch.Tensor
        The batched inputs, for their dtypes and row shapes.
    shared : sequence of bytes
        Content digests of the inputs that all rows share.
    named : int
        0 where the rows' contents are hashed; n where the user's sample ids stand for them, in the region's n-th call
        with these ids.
    """
    shapes = tuple((leaf.dtype, leaf.shape[1:]) for leaf in rows)
    return _combine(region, options.cache_dtype, options.digest, mode, shapes, tuple(shared), named)


@functools.lru_cache(maxsize=1024)
def _combine(
    region: bytes,
    cache_dtype: torch.dtype | None,
    digest: str,
    mode: NumericMode,
    shapes: tuple[tuple[torch.dtype, tuple[int, ...]], ...],
    shared: tuple[bytes, ...],
    named: int,
) -> bytes:
    rows = [(str(dtype), tuple(int(size) for size in shape)) for dtype, shape in shapes]
    ambient = (str(mode.autocast), mode.matmul, str(mode.default), mode.device, mode.tf32)
    text = repr((FORMAT_VERSION, str(cache_dtype), digest, ambient, rows, len(shared), named))
    return digest_bytes(region + struct.pack("<I", len(text)) + text.encode() + b"".join(shared))
