"""What, besides the rows, makes a key: everything that a call fixes for all of its rows.

A key is 32 bytes: the fingerprint of the call (16) and the digest of the row (16).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch

from torchcache.digest.cpu import digest_bytes
from torchcache.identity.numeric import NumericMode
from torchcache.options import CacheOptions, cache_dtype_text
from torchcache.store.blob import FORMAT_VERSION


def call_fingerprint(
    who: bytes,
    options: CacheOptions,
    mode: NumericMode,
    rows: Sequence[torch.Tensor],
    shared: Sequence[bytes],
    named: int,
) -> bytes:
    """16 bytes over everything but the contents of the rows.

    Parameters
    ----------
    who : bytes
        Identity, the structure and constants of the arguments, and which of them have rows.
    options : CacheOptions
        For the options that change stored values or digests.
    mode : NumericMode
        The numeric mode.
    rows : sequence of torch.Tensor
        The arguments with rows, rows first, for their dtypes and row shapes.
    shared : sequence of bytes
        Content digests of the arguments that all rows share.
    named : int
        0 where the rows' contents are hashed; n where the user's sample ids stand for them, in the region's n-th call
        with these ids.
    """
    shapes = tuple([(leaf.dtype, leaf.shape[1:]) for leaf in rows])
    return _combine(who, options.cache_dtype, options.digest, mode, shapes, tuple(shared), named)


def layout_fingerprint(call: bytes, layout: bytes) -> bytes:
    """16 bytes over a call's fingerprint and the digest of its output's layout: what rows are filed under."""
    return digest_bytes(call + layout)


@functools.lru_cache(maxsize=1024)
def _combine(
    who: bytes,
    cache_dtype: object,
    digest: str,
    mode: NumericMode,
    shapes: tuple[tuple[torch.dtype, tuple[int, ...]], ...],
    shared: tuple[bytes, ...],
    named: int,
) -> bytes:
    rows = [(str(dtype), tuple(int(size) for size in shape)) for dtype, shape in shapes]
    ambient = [(name, str(setting)) for name, setting in mode._asdict().items()]
    text = repr((FORMAT_VERSION, cache_dtype_text(cache_dtype), digest, ambient, rows, len(shared), named))
    return digest_bytes(who + struct.pack("<I", len(text)) + text.encode() + b"".join(shared), digest)
