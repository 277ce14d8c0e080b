"""Of what: the 128-bit digest of each row of a batch, over every byte of every batched input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from torchcache.digest.device import digests_on_device, to_host
from torchcache.lazy.use import digests_of, loaded
from torchcache.store.blob import row_bytes
from torchcache.threads import THREADED_ROW, in_parts

__all__ = ["LARGE_ROW", "digest_bytes", "digest_rows", "digest_tensor", "row_size"]

# Of several inputs, one whose rows have so many bytes counts by its own digest: who knows that needs no data.
LARGE_ROW = 1024


def digest_rows(rows: Sequence[torch.Tensor], algorithm: str) -> list[bytes]:
    """Hash each row over all inputs. Samples that are not loaded count by the digests that are known of them.

    What lies on a device is hashed there, by another function (``lanes.py``), unless BLAKE3 is asked for.

    Parameters
    ----------
    rows : sequence of torch.Tensor
        The batched inputs, each of shape ``(B, *)``. Contiguous CPU tensors are hashed where they are.
    algorithm : {"xxh3_128", "blake3"}
        XXH3 by Yann Collet (github.com/Cyan4973/xxHash), or BLAKE3 cut to 128 bits.

    Returns
    -------
    list of bytes
        ``B`` digests of 16 bytes.
    """
    known: list[list[bytes] | None] = [digests_of(leaf, algorithm) for leaf in rows]
    if algorithm == "xxh3_128":
        away = [place for place, leaf in enumerate(rows) if known[place] is None and not leaf.is_cpu]
        found = to_host([digests_on_device(loaded(rows[place])) for place in away])
        for place, digests in zip(away, found, strict=True):
            known[place] = digests
    if len(rows) == 1:
        return _one_input(rows[0], algorithm) if known[0] is None else known[0]
    parts = []
    for leaf, own in zip(rows, known, strict=True):
        if own is None and row_size(leaf) < LARGE_ROW:
            parts.append(row_bytes(host_rows(leaf)))
            continue
        joined = b"".join(_one_input(leaf, algorithm) if own is None else own)
        parts.append(np.frombuffer(joined, np.uint8).reshape(-1, 16))
    return _hashed(np.concatenate(parts, axis=1), algorithm)


def digest_bytes(data: bytes, algorithm: str = "xxh3_128") -> bytes:
    """The digest of ``data``, 16 bytes; with the algorithm of the rows' digests where ``data`` comes with them."""
    return _hasher(algorithm)(data)


def digest_tensor(tensor: torch.Tensor, algorithm: str = "xxh3_128") -> bytes:
    """The digest of a tensor's elements in row-major order, 16 bytes."""
    return digest_rows([tensor.reshape(1, *tensor.shape)], algorithm)[0]


def row_size(leaf: torch.Tensor) -> int:
    """Bytes of one row."""
    return leaf.dtype.itemsize * math.prod(leaf.shape[1:])


def host_rows(leaf: torch.Tensor) -> torch.Tensor:
    """``leaf`` as a contiguous CPU tensor of plain elements, itself where it is one."""
    if leaf.is_cpu and leaf.is_contiguous() and not leaf.is_conj() and not leaf.is_neg():
        return leaf
    leaf = leaf.detach()
    if leaf.is_conj() or leaf.is_neg():
        leaf = leaf.resolve_conj().resolve_neg()
    return leaf.cpu().contiguous()


def _hasher(algorithm: str) -> Callable[[Any], bytes]:
    if algorithm == "xxh3_128":
        one_shot: Callable[[Any], bytes] = xxhash.xxh3_128_digest
        return one_shot
    if algorithm != "blake3":
        raise ValueError(f"no digest {algorithm!r}")
    import blake3

    return lambda data: bytes(blake3.blake3(data).digest(length=16))


def _one_input(leaf: torch.Tensor, algorithm: str) -> list[bytes]:
    return _hashed(row_bytes(host_rows(leaf)), algorithm)


def _hashed(rows: npt.NDArray[np.uint8], algorithm: str) -> list[bytes]:
    count, width = rows.shape
    if width < THREADED_ROW:
        return list(map(_hasher(algorithm), rows))
    return in_parts(count, width, lambda start, stop: list(map(_hasher(algorithm), rows[start:stop])))
