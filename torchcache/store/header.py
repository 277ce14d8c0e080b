"""What a blob says of itself: read and checked without knowing what row to expect, in bounded memory.

Training never needs this, since it knows the row it asks for; tools that walk a whole directory do.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from typing import BinaryIO

import torch
import xxhash
import zstandard

from torchcache.store.blob import CHECKSUM_SIZE, BlobError, RowSpec, dtype_of_code, unpack_head
from torchcache.store.file import is_plausible

# A larger row than any network puts out for one sample; what claims to be one is not read.
LARGEST_ROW = 2**31
HEAD_BYTES = 16
_CHUNK = 1024 * 1024
# The shortest zstd frame, and the longest header of one.
_FRAME, _FRAME_HEAD = 9, 18
_WINDOW = 128 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a blob.

    Parameters
    ----------
    spec : RowSpec
        Dtypes and shapes of its leaves.
    compressed, shuffled : bool
        How its payload is stored.
    payload_at : int
        Bytes before the payload.
    stored : int
        Bytes of the payload as it is stored; 0 where only the header was read.
    """

    spec: RowSpec
    compressed: bool
    shuffled: bool
    payload_at: int
    stored: int = 0

    def stored_in(self, length: int) -> int:
        """Bytes of the payload as it is stored in a blob of ``length`` bytes."""
        return length - self.payload_at - CHECKSUM_SIZE


def read_header(file: BinaryIO) -> Header:
    """The header at the start of ``file``; ``BlobError`` where there is none."""
    head = _exactly(file, HEAD_BYTES)
    compressed, shuffled, count, size = unpack_head(head)
    leaves, at = [], HEAD_BYTES
    for _ in range(count):
        code, rank = _exactly(file, 2)
        shape = struct.unpack(f"<{rank}Q", _exactly(file, 8 * rank))
        leaves.append((_dtype(code), shape))
        at += 2 + 8 * rank
    spec = RowSpec(tuple(leaves))
    if spec.size != size or size > LARGEST_ROW:
        raise BlobError("sizes that do not agree, or larger than any row")
    return Header(spec, compressed, shuffled, at)


def check_blob(key: bytes, file: BinaryIO, length: int) -> Header:
    """Check header, lengths, checksum and zstd frame of the blob of ``length`` bytes in ``file``.

    A frame that expands beyond what is plausible is not decoded; its checksum and the length that it tells are right.

    Returns
    -------
    Header
        What it holds.

    Raises
    ------
    BlobError
        Where anything is wrong.
    """
    header = read_header(file)
    stored = header.stored_in(length)
    size = header.spec.size
    if (
        stored < (_FRAME_HEAD if header.compressed else 0)
        or stored > size + size // 128 + 512
        or (not header.compressed and stored != size)
    ):
        raise BlobError("wrong length")
    file.seek(0)
    hasher = xxhash.xxh3_64(key)
    for chunk in _chunks(file, length - CHECKSUM_SIZE):
        hasher.update(chunk)
    if hasher.digest() != _exactly(file, CHECKSUM_SIZE) or file.read(1):
        raise BlobError("wrong checksum")
    if header.compressed:
        file.seek(header.payload_at)
        _check_frame(file, size, stored)
    return dataclasses.replace(header, stored=stored)


def _check_frame(file: BinaryIO, size: int, stored: int) -> None:
    decoded = 0
    try:
        start = file.tell()
        if zstandard.frame_content_size(file.read(_FRAME_HEAD)) != size:
            raise BlobError("wrong length")
        if not is_plausible(size, stored):
            return
        file.seek(start)
        # Read, not fed: a reader gives out what it is asked for, however much a few bytes of input expand to.
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(file, closefd=False)
        while decoded < size and (chunk := reader.read(min(_CHUNK, size - decoded))):
            decoded += len(chunk)
    except zstandard.ZstdError as error:
        raise BlobError(str(error)) from None
    if decoded != size:
        raise BlobError("wrong length")


def _dtype(code: int) -> torch.dtype:
    dtype = dtype_of_code(code)
    if dtype is None:
        raise BlobError("unknown dtype")
    return dtype


def _chunks(file: BinaryIO, count: int) -> Iterator[bytes]:
    while count:
        chunk = file.read(min(count, _CHUNK))
        if not chunk:
            raise BlobError("cut short")
        count -= len(chunk)
        yield chunk


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise BlobError("cut short")
    return data
