"""Of what: the 128-bit digest of each row of a batch, over every byte of every batched input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from torchcache.store.blob import row_bytes
from torchcache.threads import THREADED_ROW, in_parts

__all__ = ["digest_bytes", "digest_rows", "digest_tensor"]

# Rows of several inputs up to this many bytes are joined by one vectorised copy before hashing.
JOINED_ROW = 4 * 1024


def digest_rows(rows: Sequence[torch.Tensor], algorithm: str) -> list[bytes]:
    """Hash each row over all inputs.

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
    arrays = [row_bytes(host_rows(leaf)) for leaf in rows]
    width = sum([array.shape[1] for array in arrays])
    if len(arrays) > 1 and width <= JOINED_ROW:
        arrays = [np.concatenate(arrays, axis=1)]
    if len(arrays) == 1 and width < THREADED_ROW:
        return _one_input(arrays, 0, len(arrays[0]), algorithm)
    hash_range = _one_input if len(arrays) == 1 else _several_inputs
    return in_parts(len(arrays[0]), width, lambda start, stop: hash_range(arrays, start, stop, algorithm))


def digest_bytes(data: bytes, algorithm: str = "xxh3_128") -> bytes:
    """The digest of ``data``, 16 bytes; with the algorithm of the rows' digests where ``data`` comes with them."""
    return _hasher(algorithm)(data)


def digest_tensor(tensor: torch.Tensor, algorithm: str = "xxh3_128") -> bytes:
    """The digest of a tensor's elements in row-major order, 16 bytes."""
    return digest_rows([tensor.reshape(1, *tensor.shape)], algorithm)[0]


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


def _one_input(arrays: Sequence[npt.NDArray[np.uint8]], start: int, stop: int, algorithm: str) -> list[bytes]:
    return list(map(_hasher(algorithm), arrays[0][start:stop]))


def _several_inputs(arrays: Sequence[npt.NDArray[np.uint8]], start: int, stop: int, algorithm: str) -> list[bytes]:
    if algorithm != "xxh3_128":
        one_shot = _hasher(algorithm)
        return [one_shot(b"".join(array[index].tobytes() for array in arrays)) for index in range(start, stop)]
    digests = []
    for index in range(start, stop):
        hasher = xxhash.xxh3_128()
        for array in arrays:
            hasher.update(array[index])
        digests.append(hasher.digest())
    return digests
