"""Short rows of one call as one entry: what names each of them would take more room than what it holds.

A pack is a blob (``blob.py``) of four leaves of one row each, not compressed:

======= ====== ==============================================================================
leaf    dtype  what
======= ====== ==============================================================================
prefix  uint8  what all of its rows' blobs begin with: header and leaf descriptors, ``(p,)``
lengths int32  bytes of each row's payload, ``(n,)``; ``(1,)`` where all are alike
digests uint8  the rows' digests, ``(n, 16)``
rows    uint8  the payloads, one after the other
======= ====== ==============================================================================

Its key is the 16 bytes that its rows' keys begin with, ``MARK``, the number of rows (3 bytes, big-endian) and 5 bytes
of a hash of the rest. That of a row has a digest in this place, and is taken for a pack's once in 2^64 rows: it is then
found to be none, and dropped. The blobs of its rows have no checksum in it: the pack's own holds for all.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import xxhash

from torchcache.store.blob import CHECKSUM_SIZE, CODES, MAGIC, BlobError
from torchcache.store.header import Header, read_header
from torchcache.store.tier import Blob

MARK = b"\0pack\0\0\1"
# A longer row takes at most a tenth more for its name.
LONGEST_ROW = 3000
LONGEST_PREFIX = 512
# SQLite holds a little of it beside others, and the rest in two whole pages.
LONGEST_PACK = 34_700
# Fewer rows are entries of their own.
FEWEST = 16
CALL, DIGEST = 16, 16
# The header of its blob and the descriptors of its leaves.
_HEAD = struct.Struct("<4sBBHQ BBQ BBQ BBQQ BBQ")
_UINT8, _INT32 = CODES[torch.uint8], CODES[torch.int32]


def most_rows(length: int) -> int:
    """How many rows with blobs of so many bytes an entry has: one where such rows are not packed."""
    return LONGEST_PACK // (length + DIGEST) if length <= LONGEST_ROW else 1


def rows_in(key: bytes) -> int:
    """How many rows an entry of this key has; one where it is no pack."""
    return _count(key) or 1


def is_pack(key: bytes) -> bool:
    """Whether an entry of this key is a pack."""
    return _count(key) > 0


def _count(key: bytes) -> int:
    found = int.from_bytes(key[CALL + len(MARK) :][:3], "big") if key.startswith(MARK, CALL) else 0
    return found if found <= LONGEST_PACK // DIGEST else 0


class Pack:
    """The rows of a pack.

    Parameters
    ----------
    key : bytes
        Of the entry.
    blob : object
        Its value.

    Raises
    ------
    BlobError
        Where it is damaged.
    """

    def __init__(self, key: bytes, blob: object) -> None:
        if not isinstance(blob, bytes):
            raise BlobError("no bytes, or more than a pack has")
        prefix, lengths, rows = _sizes(key, blob)
        count = rows_in(key)
        digests_at = _HEAD.size + prefix + 4 * lengths
        rows_at = digests_at + DIGEST * count
        end = len(blob) - CHECKSUM_SIZE
        if end != rows_at + rows or xxhash.xxh3_64_digest(key + blob[:end]) != blob[end:]:
            raise BlobError("wrong checksum")
        self._call, self._prefix = key[:CALL], blob[_HEAD.size : _HEAD.size + prefix]
        self._digests, self._rows = blob[digests_at:rows_at], blob[rows_at:end]
        sizes = np.frombuffer(blob, "<i4", lengths, _HEAD.size + prefix).astype(np.int64)
        ends = np.cumsum(np.broadcast_to(sizes, count))
        if (sizes < 0).any() or ends[-1] != rows:
            raise BlobError("wrong lengths")
        self._ends: list[int] = [0, *ends.tolist()]

    def __len__(self) -> int:
        return len(self._digests) // DIGEST

    @property
    def keys(self) -> list[bytes]:
        """The keys of its rows."""
        return [self._call + self._digests[at : at + DIGEST] for at in range(0, len(self._digests), DIGEST)]

    def blob(self, place: int) -> bytes:
        """The blob of a row."""
        key = self._call + self._digests[DIGEST * place : DIGEST * (place + 1)]
        body = self._prefix + self._rows[self._ends[place] : self._ends[place + 1]]
        return body + xxhash.xxh3_64_digest(key + body)

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """The key and the blob of each row."""
        return ((key, self.blob(place)) for place, key in enumerate(self.keys))


def digests_in(key: bytes, head: bytes) -> bytes:
    """The digests of the rows of a pack, one after the other, from the beginning of its blob; empty where it is none.

    Nothing of it is checked: what it says of a row is seen to be wrong where that is looked for.
    """
    try:
        prefix, lengths, _ = _sizes(key, head)
    except BlobError:
        return b""
    at = _HEAD.size + prefix + 4 * lengths
    digests = head[at : at + DIGEST * rows_in(key)]
    return digests if len(digests) == DIGEST * rows_in(key) else b""


def header_in(key: bytes, head: bytes) -> Header:
    """The header of the blobs of a pack's rows, from the beginning of its own; ``BlobError`` where there is none."""
    prefix, _, _ = _sizes(key, head)
    return read_header(io.BytesIO(head[_HEAD.size : _HEAD.size + prefix]))


def head_size(key: bytes) -> int:
    """How long a beginning of the blob ``digests_in`` takes."""
    return _HEAD.size + LONGEST_PREFIX + (4 + DIGEST) * rows_in(key)


def _sizes(key: bytes, blob: bytes) -> tuple[int, int, int]:
    """Bytes of the prefix, number of lengths, bytes of all payloads."""
    if len(blob) < _HEAD.size:
        raise BlobError("cut short")
    found = _HEAD.unpack_from(blob)
    prefix, lengths, rows = found[7], found[10], found[17]
    count = rows_in(key)
    if lengths not in (1, count) or not count or found != _head(count, prefix, lengths, rows):
        raise BlobError("no pack of so many rows")
    return prefix, lengths, rows


def _head(count: int, prefix: int, lengths: int, rows: int) -> tuple[bytes | int, ...]:
    size = prefix + 4 * lengths + DIGEST * count + rows
    leaves = (_UINT8, 1, prefix, _INT32, 1, lengths, _UINT8, 2, count, DIGEST, _UINT8, 1, rows)
    return (MAGIC, 0, 4, 0, size, *leaves)


def packed(entries: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Pairs of key and blob, where short rows of a call are in packs, if there are enough of them."""
    alike: dict[tuple[bytes, bytes], dict[bytes, bytes]] = {}
    others = []
    prefix = b""
    for key, blob in entries:
        if not (prefix and blob.startswith(prefix)):
            prefix = _prefix(blob)
        if len(blob) > LONGEST_ROW or not 0 < len(prefix) <= LONGEST_PREFIX or is_pack(key):
            others.append((key, blob))
        else:
            alike.setdefault((key[:CALL], prefix), {})[key] = blob
    for (call, prefix), rows in alike.items():
        if len(rows) >= FEWEST:
            others += [_make(call, prefix, some) for some in _portions(prefix, rows)]
        else:
            others += rows.items()
    return others


def rows_of(entries: Mapping[bytes, Blob]) -> tuple[dict[bytes, Blob], dict[bytes, Blob]]:
    """The rows of entries, and those of the entries that are damaged packs; key to blob."""
    rows: dict[bytes, Blob] = {}
    damaged: dict[bytes, Blob] = {}
    for key, blob in entries.items():
        if not is_pack(key):
            rows[key] = blob
            continue
        try:
            rows.update(Pack(key, blob).rows())
        except BlobError:
            damaged[key] = blob
    return rows, damaged


def join(entries: Mapping[bytes, Blob]) -> list[tuple[bytes, bytes]]:
    """The rows of short packs, in longer ones; pairs of key and blob."""
    rows, _ = rows_of(entries)
    return packed([(key, blob) for key, blob in rows.items() if isinstance(blob, bytes)])


def _make(call: bytes, prefix: bytes, rows: Mapping[bytes, bytes]) -> tuple[bytes, bytes]:
    """The key and the blob of a pack.

    Parameters
    ----------
    call, prefix : bytes
        What the keys and the blobs of all rows begin with.
    rows : mapping of bytes to bytes
        Key to blob, in any order.
    """
    payloads = [blob[len(prefix) : -CHECKSUM_SIZE] for blob in rows.values()]
    lengths = list(map(len, payloads))
    if min(lengths) == max(lengths):
        lengths = lengths[:1]
    described = struct.pack(f"<{len(lengths)}i", *lengths)
    body = b"".join((prefix, described, *(key[CALL:] for key in rows), *payloads))
    key = call + MARK + len(rows).to_bytes(3, "big") + xxhash.xxh3_128_digest(body)[:5]
    body = _HEAD.pack(*_head(len(rows), len(prefix), len(lengths), sum(map(len, payloads)))) + body
    return key, body + xxhash.xxh3_64_digest(key + body)


def _prefix(blob: bytes) -> bytes:
    try:
        return blob[: read_header(io.BytesIO(blob)).payload_at]
    except BlobError:
        return b""


def _portions(prefix: bytes, rows: Mapping[bytes, bytes]) -> Iterator[dict[bytes, bytes]]:
    """Rows in portions that fit in a pack."""
    alike = len(set(map(len, rows.values()))) == 1
    beside = (DIGEST if alike else DIGEST + 4) - len(prefix) - CHECKSUM_SIZE
    whole = LONGEST_PACK - _HEAD.size - len(prefix) - 4 - CHECKSUM_SIZE
    some: dict[bytes, bytes] = {}
    room = whole
    for key, blob in rows.items():
        size = beside + len(blob)
        if size > room:
            yield some
            some, room = {}, whole
        some[key] = blob
        room -= size
    if some:
        yield some
