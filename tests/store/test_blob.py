"""The bytes of a row."""

import re
import struct
import tracemalloc

import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcache.store.blob import FORMAT_VERSION, Codec, RowSpec, storable

# All that a tensor can have on the CPU; what is left out has no elements of whole bytes, or is quantized.
DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
        and not re.match(r"torch\.(bits|qu?int|quint|float4_|u?int[1-7]$)", str(value))
    },
    key=str,
)
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


def test_every_dtype_of_the_cpu_can_be_stored():
    assert {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex32, torch.uint64} <= set(DTYPES)
    assert [dtype for dtype in DTYPES if not storable(RowSpec(((dtype, ()),)))] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [None, 1])
def test_every_dtype_comes_back_compressed_or_not(dtype, level):
    spec = RowSpec(((dtype, (4, 100)), (dtype, (0, 2)), (torch.bool, ())))
    rows = rows_of(spec, smooth=True)
    blobs = Codec(spec, level).encode(KEYS, rows)
    assert {blob[4] & 1 for blob in blobs} == {int(level is not None)}
    sound, back = Codec(spec).decode(KEYS, blobs)
    assert sound == [0, 1, 2, 3, 4]
    assert all(torch.equal(raw(leaf), raw(again)) for leaf, again in zip(rows, back, strict=True))


def test_what_compression_does_not_shrink_is_stored_as_it_is():
    spec = RowSpec(((torch.uint8, (1000,)),))
    rows = rows_of(spec)
    assert Codec(spec, 3).encode(KEYS, rows) == Codec(spec, None).encode(KEYS, rows)


def forged(body, key=KEYS[0]):
    return body + xxhash.xxh3_64_digest(key + body)


@pytest.mark.parametrize(
    ("zeros", "shrinks"),
    [
        (slice(0, 40_000), False),
        (slice(360_000, None), False),
        (slice(40_000, None), True),
        (slice(0, 360_000), True),
    ],
)
def test_what_is_done_to_a_long_row_is_chosen_by_all_of_it(zeros, shrinks):
    row = torch.randint(0, 256, (1, 400_000), dtype=torch.uint8)
    row[:, zeros] = 0
    blob = Codec(RowSpec(((torch.uint8, (400_000,)),)), 1).encode(KEYS[:1], [row])[0]
    assert (len(blob) < 400_000) == shrinks


def test_forged_headers_and_payloads_with_a_right_checksum_are_refused():
    codec = Codec(SPEC, 3)
    blob = codec.encode(KEYS, rows_of(SPEC, smooth=True))[0]
    plain = Codec(SPEC).encode(KEYS, rows_of(SPEC, smooth=True))[0]
    at = 16 + 2 + 16 + 2 + 8
    header, frame = blob[:at], blob[at:-8]
    assert codec.decode(KEYS[:1], [forged(header + frame)])[0] == [0]
    wrong = {
        "magic": b"XCB" + blob[3:-8],
        "version": blob[:3] + b"\x02" + blob[4:-8],
        "unknown flag": blob[:4] + bytes([blob[4] | 4]) + blob[5:-8],
        "shuffled and not compressed": plain[:4] + b"\x02" + plain[5:-8],
        "leaves": blob[:5] + b"\x03" + blob[6:-8],
        "reserved": blob[:6] + b"\x01" + blob[7:-8],
        "larger size": blob[:8] + struct.pack("<Q", 2**60) + blob[16:-8],
        "another dtype": blob[:16] + b"\x01" + blob[17:-8],
        "another dimension": blob[:18] + struct.pack("<Q", 2**40) + blob[26:-8],
        "no payload": header,
        "no frame": header + b"not a frame",
        "half a frame": header + frame[: len(frame) // 2],
        "short payload": plain[:-9],
        "long payload": plain[:-8] + b"\0",
    }
    for name, body in wrong.items():
        assert codec.decode(KEYS[:1], [forged(body)])[0] == [], name


def test_bombs_are_refused_before_anything_of_their_size_is_allocated():
    codec = Codec(SPEC, 3)
    blob = codec.encode(KEYS, rows_of(SPEC, smooth=True))[0]
    header = blob[: 16 + 2 + 16 + 2 + 8]
    claims = [
        header + zstandard.compress(b"\0" * 2**26),
        header + zstandard.ZstdCompressor(write_content_size=False).compress(b"\0" * 2**26),
        header[:8] + struct.pack("<Q", 2**26) + header[16:] + zstandard.compress(b"\0" * 2**26),
    ]
    bombs = [forged(claim) for claim in claims]
    tracemalloc.start()
    try:
        assert codec.decode(KEYS[:1] * 3, bombs)[0] == []
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_compressed_blob_can_be_read_by_the_page_alone():
    spec = RowSpec(((torch.float32, (400,)), (torch.int16, (3,))))
    values = torch.linspace(1, 2, 400).repeat(len(KEYS), 1)
    numbers = torch.arange(15, dtype=torch.int16).reshape(5, 3)
    blob = Codec(spec, 3).encode(KEYS, [values, numbers])[4]
    magic, flags, leaves, reserved, size = struct.unpack_from("<4sBBHQ", blob)
    assert (magic[:3], flags, leaves, reserved, size) == (b"TCB", 3, 2, 0, 400 * 4 + 3 * 2)
    payload = zstandard.decompress(blob[16 + 10 + 10 : -8], max_output_size=size)
    floats, shorts = payload[: 400 * 4], payload[400 * 4 :]
    assert b"".join(floats[at::400] for at in range(400)) == values[4].numpy().tobytes()
    assert b"".join(shorts[at::3] for at in range(3)) == numbers[4].numpy().tobytes()


def test_a_blob_holds_1_to_255_leaves():
    for count in (0, 256):
        with pytest.raises(ValueError, match=str(count)):
            Codec(RowSpec(((torch.bool, ()),) * count))
    spec = RowSpec(((torch.uint8, ()),) * 255)
    rows = rows_of(spec)
    assert Codec(spec).decode(KEYS, Codec(spec).encode(KEYS, rows))[0] == [0, 1, 2, 3, 4]
