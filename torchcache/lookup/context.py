"""What a ``with`` block around a call says to every lookup inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import numpy as np
import torch
import xxhash

from torchcache.errors import SampleKeyError

__all__ = ["bypass", "bypassed", "computing", "current_ids", "inside_region", "sample_keys"]

_bypass: ContextVar[bool] = ContextVar("torchcache_bypass", default=False)
_computing: ContextVar[bool] = ContextVar("torchcache_computing", default=False)
_ids: ContextVar[list[bytes] | None] = ContextVar("torchcache_ids", default=None)


@contextlib.contextmanager
def bypass() -> Iterator[None]:
    """Compute everything and store nothing inside this block."""
    token = _bypass.set(True)
    try:
        yield
    finally:
        _bypass.reset(token)


@contextlib.contextmanager
def sample_keys(ids: Sequence[int] | Sequence[str] | torch.Tensor) -> Iterator[None]:
    """Use ``ids`` instead of hashes of the inputs inside this block.

    Weights, code, arguments, row shapes and dtypes still count; the inputs' contents do not, so
    an id must name its sample's content (with augmentation: content and seed).

    Parameters
    ----------
    ids : sequence of int or str, or integer tensor of shape (B,)
        One id a row, in the batch's order.

    Raises
    ------
    SampleKeyError
        When an id is neither an integer of up to 127 bits nor a string, or when their number is not that of
        the rows of a marked call inside the block.
    """
    token = _ids.set(_encode_ids(ids))
    try:
        yield
    finally:
        _ids.reset(token)


def _encode_ids(ids: Sequence[int] | Sequence[str] | torch.Tensor) -> list[bytes]:
    if isinstance(ids, torch.Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise SampleKeyError(f"sample_keys takes a 1-D integer tensor, not {ids.dtype} of shape {tuple(ids.shape)}")
        ids = ids.tolist()
    return [_encode_id(position, value) for position, value in enumerate(ids)]


def _encode_id(position: int, value: object) -> bytes:
    if isinstance(value, str):
        return bytes(xxhash.xxh3_128_digest(b"id:" + value.encode("utf-8", "surrogatepass")))
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        try:
            return int(value).to_bytes(16, "big", signed=True)
        except OverflowError:
            pass
    raise SampleKeyError(f"sample_keys takes ints (up to 127 bits) and strings; id {position} is {value!r}")


def bypassed() -> bool:
    """Whether the caller asked for ``bypass``."""
    return _bypass.get()


def current_ids(rows: int, name: str) -> list[bytes] | None:
    """The ids given for this batch of ``rows`` rows of the region ``name``, if any were."""
    ids = _ids.get()
    if ids is not None and len(ids) != rows:
        raise SampleKeyError(f"sample_keys got {len(ids)} ids, but {name} is called with a batch of {rows} rows")
    return ids


def inside_region() -> bool:
    """Whether an original is being computed: marks inside it belong to the outer one."""
    return _computing.get()


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Compute an original: without gradients, marks inside it at rest."""
    token = _computing.set(True)
    try:
        with torch.no_grad():
            yield
    finally:
        _computing.reset(token)
