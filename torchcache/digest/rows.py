"""Of what: the 128-bit digest of each row of a batch, over every byte of every batched input, wherever it lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from torchcache.context import ids_given
from torchcache.digest.cpu import hashed, host_rows
from torchcache.digest.device import OnTheWay
from torchcache.lazy.use import digests_of, loaded
from torchcache.store.select import row_bytes

# Of several inputs, one whose rows have so many bytes counts by its own digest: who knows that needs no data.
LARGE_ROW = 1024
# Kinds of calls that are remembered.
MOST = 64

# By the ``id`` of an input: its digests, where a device is at work on them.
Started = Mapping[int, OnTheWay]
_NONE: Started = {}


class Early:
    """Has devices begin with digests before it is known who computes, so that the host waits for both at once.

    Parameters
    ----------
    algorithm : str
        Of the digests.
    """

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        # Of each kind of call: which arguments are its rows.
        self._places: dict[bytes, list[int]] = {}

    def start(self, kind: bytes, tensors: Sequence[torch.Tensor]) -> Started:
        """Begin with what the rows of such a call were before."""
        places = self._places.get(kind)
        if not places or ids_given() or max(places) >= len(tensors):
            return _NONE
        return _start([tensors[place] for place in places], self._algorithm)

    def digests(
        self, kind: bytes, tensors: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], started: Started
    ) -> list[bytes]:
        """The digests of the rows of a call."""
        if not rows[0].is_cpu and not started:
            if len(self._places) >= MOST:
                self._places.clear()
            self._places[kind] = [place for place, tensor in enumerate(tensors) if any(tensor is leaf for leaf in rows)]
        return digest_rows(rows, self._algorithm, started)


def digest_rows(rows: Sequence[torch.Tensor], algorithm: str, started: Started = _NONE) -> list[bytes]:
    """Hash each row over all inputs. Samples that are not loaded count by the digests that are known of them.

    What lies on a device is hashed there, by another function (``lanes.py``), unless BLAKE3 is asked for.

    Parameters
    ----------
    rows : sequence of torch.Tensor
        The batched inputs, each of shape ``(B, *)``. Contiguous CPU tensors are hashed where they are.
    algorithm : {"xxh3_128", "blake3"}
        XXH3 by Yann Collet (github.com/Cyan4973/xxHash), or BLAKE3 cut to 128 bits.
    started : mapping
        Digests of some of these very tensors that devices are at work on.

    Returns
    -------
    list of bytes
        ``B`` digests of 16 bytes.
    """
    under_way = {**started, **_start([leaf for leaf in rows if id(leaf) not in started], algorithm)}
    known = [under_way[id(leaf)].digests() if id(leaf) in under_way else digests_of(leaf, algorithm) for leaf in rows]
    if len(rows) == 1:
        return known[0] if known[0] is not None else hashed(row_bytes(host_rows(rows[0])), algorithm)
    parts = []
    for leaf, own in zip(rows, known, strict=True):
        if own is None and leaf.dtype.itemsize * math.prod(leaf.shape[1:]) < LARGE_ROW:
            parts.append(row_bytes(host_rows(leaf)))
            continue
        joined = b"".join(hashed(row_bytes(host_rows(leaf)), algorithm) if own is None else own)
        parts.append(np.frombuffer(joined, np.uint8).reshape(-1, 16))
    return hashed(np.concatenate(parts, axis=1), algorithm)


def digest_tensor(tensor: torch.Tensor, algorithm: str = "xxh3_128") -> bytes:
    """The digest of a tensor's elements in row-major order, 16 bytes."""
    return digest_rows([tensor.reshape(1, *tensor.shape)], algorithm)[0]


def _start(rows: Sequence[torch.Tensor], algorithm: str) -> dict[int, OnTheWay]:
    """Have devices begin with the digests of what lies there."""
    if algorithm != "xxh3_128":
        return {}
    away = [leaf for leaf in rows if not leaf.is_cpu and digests_of(leaf, algorithm) is None]
    return {id(leaf): OnTheWay(loaded(leaf)) for leaf in away}
