"""One row's outputs as bytes: the blob format, version 1.

All integers are little-endian and unsigned. A blob is

====== ======== ====================================================================
offset size     field
====== ======== ====================================================================
0      4        magic, ``b"TCB"`` and the format version as one byte
4      1        flags: bit 0 the payload is a zstd frame, bit 1 it is byte-shuffled
5      1        n, the number of leaves (output tensors), 1 to 255
6      2        reserved, zero
8      8        bytes of the decoded payload
16     variable n leaf descriptors: dtype code (1), rank (1), each row dimension (8)
then   variable the payload, to 8 bytes before the end
end-8  8        XXH3-64 of the key and of every byte of the blob before this field
====== ======== ====================================================================

The decoded payload is the leaves' row-major bytes one after the other. Byte-shuffled means that each
leaf holds all first bytes of its elements, then all second ones, and so on (the filter of HDF5 and
Blosc), which groups the exponent bytes of floats. The key is hashed in, so that a blob filed under
another row's key is as damaged as one with a flipped bit. A reader checks magic, lengths and checksum
before it allocates, and allocates what the caller expects, never what the blob claims.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
import zstandard

from torchcache.store.file import SCATTERS, BlobFile, BlobFileError
from torchcache.store.select import row_bytes, select_rows
from torchcache.threads import THREADED_ROW, in_parts

FORMAT_VERSION = 1
MAGIC = b"TCB" + bytes([FORMAT_VERSION])
COMPRESSED, SHUFFLED = 1, 2
CHECKSUM_SIZE = 8
MOST_LEAVES = 255
# Below this gain a frame costs more to decode than its smaller size saves to read.
WORTHWHILE = 0.80
# And shuffled ones take twice as long to decode (tools/bench/compression.py).
SHUFFLE_GAIN = 0.90
# What filters are tried on: blocks of a multiple of every element's size.
SAMPLE_BYTES, BLOCK = 64 * 1024, 4 * 1024

_HEAD = struct.Struct("<4sBBHQ")
# A dtype's code is its place in this table: append only.
_DTYPES = """
    float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint16 uint32 uint64
    float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz complex32 float8_e8m0fnu bcomplex32
    """.split()
CODES = {getattr(torch, name): code for code, name in enumerate(_DTYPES) if hasattr(torch, name)}


class BlobError(ValueError):
    """The bytes are no blob of the expected row: damaged, foreign or misfiled."""


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """Dtypes and shapes of one row's leaves, as stored.

    Parameters
    ----------
    leaves : tuple of (torch.dtype, tuple of int)
        Per output tensor its stored dtype and its shape without the batch dimension.
    """

    leaves: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each leaf's row."""
        return [dtype.itemsize * math.prod(shape) for dtype, shape in self.leaves]

    @property
    def size(self) -> int:
        """Bytes of one row over all leaves."""
        return sum(self.sizes)

    @classmethod
    def of(cls, rows: Sequence[torch.Tensor]) -> RowSpec:
        """The spec of ``rows``, tensors of shape ``(n, *)``."""
        return cls(tuple((leaf.dtype, tuple(leaf.shape[1:])) for leaf in rows))

    def empty(self, count: int, device: torch.device | str = "cpu") -> list[torch.Tensor]:
        """Uninitialised tensors for ``count`` rows."""
        return [torch.empty((count, *shape), dtype=dtype, device=device) for dtype, shape in self.leaves]


def storable(spec: RowSpec) -> bool:
    """Whether a blob can hold such a row: the format has a code for each dtype, and room for so many leaves."""
    return 1 <= len(spec.leaves) <= MOST_LEAVES and all(dtype in CODES for dtype, _ in spec.leaves)


def dtype_of_code(code: int) -> torch.dtype | None:
    """The dtype that the format means by ``code``; ``None`` where this torch has none such."""
    dtype = getattr(torch, _DTYPES[code], None) if code < len(_DTYPES) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def unpack_head(head: bytes) -> tuple[bool, bool, int, int]:
    """The first 16 bytes of a blob: compressed, shuffled, number of leaves, bytes of the decoded payload."""
    magic, flags, count, reserved, size = _HEAD.unpack(head)
    if magic != MAGIC or flags not in (0, COMPRESSED, COMPRESSED | SHUFFLED) or not count or reserved:
        raise BlobError("foreign header")
    return bool(flags & COMPRESSED), bool(flags & SHUFFLED), count, size


def _sample(leaf: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Bytes from all over a long leaf, whole elements of it, enough to try filters on."""
    every = leaf.size // SAMPLE_BYTES
    return leaf if every < 2 else leaf[: -(leaf.size % BLOCK) or None].reshape(-1, BLOCK)[::every].reshape(-1)


def _checksum(key: bytes, *parts: bytes | bytearray | memoryview) -> bytes:
    hasher = xxhash.xxh3_64(key)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


class Codec:
    """Rows of one spec to blobs and back.

    Parameters
    ----------
    spec : RowSpec
        What one row holds.
    level : int or None
        zstd level; ``None`` never compresses.

    Attributes
    ----------
    longest, plain : int
        Bytes of the longest blob of such a row, and of one that is not compressed.
    """

    def __init__(self, spec: RowSpec, level: int | None = None) -> None:
        if not 1 <= len(spec.leaves) <= MOST_LEAVES:
            raise ValueError(f"a blob holds 1 to {MOST_LEAVES} leaves, not {len(spec.leaves)}")
        self.spec = spec
        self._level = level
        self._descriptors = b"".join(
            struct.pack(f"<BB{len(shape)}Q", CODES[dtype], len(shape), *shape) for dtype, shape in spec.leaves
        )
        self._size, self._widths = spec.size, spec.sizes
        self._payload_at = _HEAD.size + len(self._descriptors)
        # A payload that compression makes longer is longer by this at the most.
        self.longest = self._payload_at + self._size + self._size // 128 + 512 + CHECKSUM_SIZE
        self.plain = self._payload_at + self._size + CHECKSUM_SIZE
        self._prefixes = {flags: self._prefix(flags) for flags in (0, COMPRESSED, COMPRESSED | SHUFFLED)}

    def encode(self, keys: Sequence[bytes], rows: Sequence[torch.Tensor]) -> list[bytes]:
        """One blob for each of ``keys`` from ``rows``, contiguous CPU tensors of shape ``(len(keys), *)``."""
        leaves = [row_bytes(leaf) for leaf in rows]
        count = len(keys)
        if not count:
            return []
        flags = self._best_filter([leaf[0] for leaf in leaves])
        compressor = zstandard.ZstdCompressor(level=self._level or 0, write_checksum=False) if flags else None
        prefix, blobs = self._prefixes[flags], []
        for index, key in enumerate(keys):
            parts: list[Any] = [leaf[index] for leaf in leaves]
            if compressor is not None:
                parts = [compressor.compress(self._payload(parts, flags))]
            blobs.append(b"".join((prefix, *parts, _checksum(key, prefix, *parts))))
        return blobs

    def decode(self, keys: Sequence[bytes], blobs: Sequence[bytes | BlobFile]) -> tuple[list[int], list[torch.Tensor]]:
        """The rows of the sound ones among ``blobs``.

        Returns
        -------
        sound : list of int
            Indices of the blobs that decoded.
        rows : list of torch.Tensor
            Per leaf, shape ``(len(sound), *)``, on the CPU.
        """
        rows = self.spec.empty(len(keys))
        sound = self.decode_into(keys, blobs, rows)
        return sound, [leaf[: len(sound)] for leaf in rows]

    def decode_into(
        self, keys: Sequence[bytes], blobs: Sequence[bytes | BlobFile], rows: Sequence[torch.Tensor]
    ) -> list[int]:
        """Write the rows of the sound ones among ``blobs`` to the first of ``rows``, contiguous CPU tensors.

        Returns
        -------
        list of int
            Indices of the blobs that decoded, in order.
        """
        if self._decode_plain(keys, blobs, rows):
            return list(range(len(keys)))
        targets = [memoryview(row_bytes(leaf).reshape(-1)) for leaf in rows]  # type: ignore[arg-type]

        def work(start: int, stop: int) -> list[int]:
            decompressor = zstandard.ZstdDecompressor()
            sound = []
            for index in range(start, stop):
                row = [
                    target[index * width : (index + 1) * width]
                    for target, width in zip(targets, self._widths, strict=True)
                ]
                try:
                    self._decode(keys[index], blobs[index], row, decompressor)
                except (BlobError, BlobFileError, zstandard.ZstdError, OSError):
                    continue
                sound.append(index)
            return sound

        sound = in_parts(len(keys), self._size, work)
        if len(sound) < len(keys):
            for leaf in rows:
                leaf[: len(sound)] = select_rows(leaf, sound)
        return sound

    def _decode_plain(
        self, keys: Sequence[bytes], blobs: Sequence[bytes | BlobFile], rows: Sequence[torch.Tensor]
    ) -> bool:
        """Write the rows of short blobs in one go; ``False`` if not all of them are sound and uncompressed."""
        length = self.plain
        plain = [blob for blob in blobs if type(blob) is bytes and len(blob) == length]
        if not plain or len(plain) < len(blobs) or self._size > THREADED_ROW:
            return False
        sums = [xxhash.xxh3_64_digest(key + blob[:-CHECKSUM_SIZE]) for key, blob in zip(keys, plain, strict=True)]
        table = np.frombuffer(b"".join(plain), dtype=np.uint8).reshape(len(plain), length)
        head, end = np.frombuffer(self._prefixes[0], dtype=np.uint8), length - CHECKSUM_SIZE
        if table[:, end:].tobytes() != b"".join(sums) or not (table[:, : self._payload_at] == head).all():
            return False
        at = self._payload_at
        for leaf, width in zip(rows, self._widths, strict=True):
            row_bytes(leaf)[: len(plain)] = table[:, at : at + width]
            at += width
        return True

    def _decode(
        self,
        key: bytes,
        blob: bytes | BlobFile,
        row: Sequence[memoryview],
        decompressor: zstandard.ZstdDecompressor,
    ) -> None:
        """Write the leaves of one row."""
        if isinstance(blob, BlobFile):
            if SCATTERS and blob.size == self.plain and self._read_plain(key, blob, row):
                return
            blob = blob.read(self.longest)
        payload = self._open(key, blob, decompressor)
        at = 0
        for leaf in row:
            leaf[:] = payload[at : at + len(leaf)]
            at += len(leaf)

    def _read_plain(self, key: bytes, blob: BlobFile, row: Sequence[memoryview]) -> bool:
        """Read a row that is not compressed from its file to where it goes; ``False`` if it is no such row."""
        head, checksum = bytearray(self._payload_at), bytearray(CHECKSUM_SIZE)
        if blob.scatter([head, *row, checksum]) != blob.size or head != self._prefixes[0]:
            return False
        if _checksum(key, head, *row) != checksum:
            raise BlobError("wrong checksum")
        return True

    def _open(self, key: bytes, blob: bytes, decompressor: zstandard.ZstdDecompressor) -> memoryview:
        flags = blob[4] if len(blob) > 4 else 0
        prefix = self._prefixes.get(flags)
        if prefix is None or not blob.startswith(prefix):
            raise BlobError("foreign header")
        end = len(blob) - CHECKSUM_SIZE
        view = memoryview(blob)
        if _checksum(key, view[:end]) != view[end:]:
            raise BlobError("wrong checksum")
        stored = view[self._payload_at : end]
        size = self._size
        if not flags & COMPRESSED:
            if len(stored) != size:
                raise BlobError("wrong length")
            return stored
        if zstandard.frame_content_size(stored) != size:
            raise BlobError("wrong length")
        payload = decompressor.decompress(stored, max_output_size=size)
        if len(payload) != size:
            raise BlobError("wrong length")
        return memoryview(self._unshuffle(payload) if flags & SHUFFLED else payload)

    def _prefix(self, flags: int) -> bytes:
        return _HEAD.pack(MAGIC, flags, len(self.spec.leaves), 0, self.spec.size) + self._descriptors

    def _best_filter(self, row: Sequence[npt.NDArray[np.uint8]]) -> int:
        """What to do to rows like this one: the smallest of raw, zstd and shuffled zstd, raw unless it gains."""
        if self._level is None or not self.spec.size:
            return 0
        row = [*map(_sample, row)]
        compressor = zstandard.ZstdCompressor(level=self._level, write_checksum=False)
        options = (COMPRESSED, COMPRESSED | SHUFFLED)
        sizes = {flags: len(compressor.compress(self._payload(row, flags))) for flags in options}
        shuffled = sizes[COMPRESSED | SHUFFLED] < SHUFFLE_GAIN * sizes[COMPRESSED]
        best = COMPRESSED | SHUFFLED if shuffled else COMPRESSED
        return best if sizes[best] < WORTHWHILE * sum(leaf.size for leaf in row) else 0

    def _payload(self, row: Sequence[npt.NDArray[np.uint8]], flags: int) -> bytes:
        if flags & SHUFFLED:
            row = [leaf.reshape(-1, dtype.itemsize).T for leaf, (dtype, _) in zip(row, self.spec.leaves, strict=True)]
        return row[0].tobytes() if len(row) == 1 else b"".join(leaf.tobytes() for leaf in row)

    def _unshuffle(self, payload: bytes) -> bytes:
        parts, start = [], 0
        for (dtype, _), width in zip(self.spec.leaves, self.spec.sizes, strict=True):
            leaf = np.frombuffer(payload, dtype=np.uint8, count=width, offset=start)
            parts.append(leaf.reshape(dtype.itemsize, -1).T.tobytes())
            start += width
        return b"".join(parts)
