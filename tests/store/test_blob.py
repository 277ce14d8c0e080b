"""The bytes of a row."""

import struct

import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcache.store.blob import _DTYPES, FORMAT_VERSION, Codec, RowSpec

DTYPES = [getattr(torch, name) for name in _DTYPES if hasattr(torch, name)]
KEYS = [bytes([number]) * 32 for number in range(5)]

specs = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)), min_size=1, max_size=4
).map(lambda leaves: RowSpec(tuple(leaves)))


def rows_of(spec, seed=0, smooth=False):
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for (dtype, shape), width in zip(spec.leaves, spec.sizes, strict=True):
        high = 2 if smooth or dtype == torch.bool else 256
        data = torch.randint(0, high, (len(KEYS), width), generator=generator, dtype=torch.uint8)
        leaves.append(data.reshape(-1).view(dtype).reshape(len(KEYS), *shape))
    return leaves


def raw(leaf):
    return leaf.contiguous().reshape(-1).view(torch.uint8)


@settings(max_examples=150, deadline=None)
@given(specs, st.sampled_from([None, -5, 1, 3]), st.booleans())
def test_rows_come_back_bit_for_bit(spec, level, smooth):
    rows = rows_of(spec, smooth=smooth)
    codec = Codec(spec, level)
    sound, back = Codec(spec).decode(KEYS, codec.encode(KEYS, rows))
    assert sound == list(range(len(KEYS)))
    for leaf, again in zip(rows, back, strict=True):
        assert leaf.dtype == again.dtype
        assert leaf.shape == again.shape
        assert torch.equal(raw(leaf), raw(again))


SPEC = RowSpec(((torch.float32, (3, 40)), (torch.int64, (2,))))


@pytest.mark.parametrize("level", [None, 3])
def test_every_flipped_bit_and_every_truncation_is_found(level):
    rows = rows_of(SPEC, smooth=True)
    codec = Codec(SPEC, level)
    blobs = codec.encode(KEYS, rows)
    assert (len(blobs[2]) < SPEC.size) == (level is not None)
    for bit in range(len(blobs[2]) * 8):
        harmed = bytearray(blobs[2])
        harmed[bit // 8] ^= 1 << bit % 8
        assert codec.decode(KEYS, [*blobs[:2], bytes(harmed), *blobs[3:]])[0] == [0, 1, 3, 4]
    for length in range(len(blobs[2])):
        assert codec.decode(KEYS[2:3], [blobs[2][:length]])[0] == []


def test_a_row_filed_under_another_key_is_refused():
    codec = Codec(SPEC)
    blobs = codec.encode(KEYS, rows_of(SPEC))
    assert codec.decode(KEYS, [blobs[1], blobs[0], *blobs[2:]])[0] == [2, 3, 4]


def test_a_row_of_another_spec_is_refused():
    other = RowSpec(((torch.float32, (40, 3)), (torch.int64, (2,))))
    assert Codec(other).decode(KEYS, Codec(SPEC).encode(KEYS, rows_of(SPEC)))[0] == []


def test_a_decompression_bomb_is_refused():
    codec = Codec(SPEC, 3)
    blob = codec.encode(KEYS, rows_of(SPEC, smooth=True))[0]
    header = blob[: codec._payload_at]
    for bomb in (
        zstandard.compress(b"\0" * 10**8),
        zstandard.ZstdCompressor(write_content_size=False).compress(b"\0" * 10**7),
    ):
        body = header + bomb
        forged = body + xxhash.xxh3_64_digest(KEYS[0] + body)
        assert codec.decode(KEYS[:1], [forged])[0] == []


def test_the_format_is_as_documented():
    spec = RowSpec(((torch.float16, (2, 3)), (torch.bool, ())))
    rows = rows_of(spec)
    blob = Codec(spec).encode(KEYS, rows)[1]
    magic, flags, leaves, reserved, size = struct.unpack_from("<4sBBHQ", blob)
    assert magic == b"TCB" + bytes([FORMAT_VERSION])
    assert (flags, leaves, reserved, size) == (0, 2, 0, 2 * 6 + 1)
    assert struct.unpack_from("<BBQQ", blob, 16) == (2, 2, 2, 3)
    assert struct.unpack_from("<BB", blob, 16 + 18) == (9, 0)
    payload = blob[16 + 18 + 2 : -8]
    assert payload == raw(rows[0][1]).numpy().tobytes() + raw(rows[1][1]).numpy().tobytes()
    assert blob[-8:] == xxhash.xxh3_64_digest(KEYS[1] + blob[:-8])
