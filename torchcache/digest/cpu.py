"""On the CPU: XXH3 or BLAKE3 of rows of bytes, by several threads where rows are long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from torchcache.threads import THREADED_ROW, in_parts


def digest_bytes(data: bytes, algorithm: str = "xxh3_128") -> bytes:
    """The digest of ``data``, 16 bytes; with the algorithm of the rows' digests where ``data`` comes with them."""
    return _hasher(algorithm)(data)


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


def hashed(rows: npt.NDArray[np.uint8], algorithm: str) -> list[bytes]:
    """The digest of each row of bytes, 16 bytes."""
    count, width = rows.shape
    if width < THREADED_ROW:
        return list(map(_hasher(algorithm), rows))
    return in_parts(count, width, lambda start, stop: list(map(_hasher(algorithm), rows[start:stop])))
