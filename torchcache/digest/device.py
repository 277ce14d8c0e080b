"""Of what, on a device: the digest of each row (``lanes.py``), computed where the rows are, and brought to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from torchcache.digest.lanes import in_operators
from torchcache.logging import logger
from torchcache.store.select import element_bytes
from torchcache.streams import Coming


class OnTheWay:
    """The digests of a batch's rows, which its device computes while the host goes on.

    Parameters
    ----------
    leaf : torch.Tensor
        Of shape ``(B, *)`` and any dtype.
    """

    def __init__(self, leaf: torch.Tensor) -> None:
        self._coming = Coming(digests_on_device(leaf))

    def digests(self) -> list[bytes]:
        """16 bytes a row; the first who asks waits, for all that is on the way."""
        digests: list[bytes] = self._coming.words().astype("<i8", copy=False).view("V16").tolist()
        return digests


def digests_on_device(leaf: torch.Tensor) -> torch.Tensor:
    """The digest of each row of a batch, where the batch is.

    Parameters
    ----------
    leaf : torch.Tensor
        Of shape ``(B, *)`` and any dtype. Rows that are contiguous, and as long as a whole number of 4 bytes, are read
        where they are.

    Returns
    -------
    torch.Tensor
        ``(B, 2)`` of int64, on its device; the computation may still be going on.
    """
    with torch.no_grad():
        rows, size = _rows(leaf)
        if not rows.shape[0]:
            return torch.empty(0, 2, dtype=torch.int64, device=leaf.device)
        return _way(leaf.device)(rows, size)


def _rows(leaf: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows as 32-bit words, ``(B, words)``, one after the other within a row, and the bytes of one row."""
    leaf = leaf.detach().resolve_conj().resolve_neg()
    count = leaf.shape[0]
    if not leaf.numel():
        return torch.empty(count, 0, dtype=torch.int32, device=leaf.device), 0
    leaf = leaf if leaf[0].is_contiguous() else leaf.contiguous()
    # Whatever the strides of dimensions of one element say.
    rows = leaf.as_strided((count, leaf.numel() // count), (leaf.stride(0), 1))
    size = rows.shape[1] * rows.itemsize
    if all(place % 4 == 0 for place in (size, rows.stride(0) * rows.itemsize, rows.storage_offset() * rows.itemsize)):
        return rows.view(torch.int32), size
    whole = element_bytes(rows.contiguous()).view(count, size)
    return functional.pad(whole, (0, -size % 4)).view(torch.int32), size


def _way(device: torch.device) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """How digests are computed on a device: by a kernel where there is Triton for it."""
    way = _ways.get(device.type)
    if way is None:
        way = _ways[device.type] = _tried(device) if device.type == "cuda" else in_operators
    return way


def _tried(device: torch.device) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """The kernel, where it runs on a device and gives what operators give."""
    try:
        from torchcache.digest.kernel import in_kernel

        rows = torch.arange(3 * 9001, dtype=torch.int32, device=device).view(3, 9001)
        if torch.equal(in_kernel(rows, 4 * 9001), in_operators(rows, 4 * 9001)):
            return in_kernel
        logger.warning("rows on %s are hashed by operators of torch: the kernel's digests are others", device.type)
    except Exception as error:  # no Triton, no compiler, a card that it does not know
        logger.info("rows on %s are hashed by operators of torch (%s: %s)", device.type, type(error).__name__, error)
    return in_operators


_ways: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {}
