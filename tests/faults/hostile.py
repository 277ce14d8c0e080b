"""What somebody could put into a cache directory: blobs, rows and settings made to harm whoever reads them."""

import collections
import contextlib
import random
import sqlite3
import struct

import torch
import zstandard
from trained import Run

import torchcache
from torchcache.store.blob import CHECKSUM_SIZE, Codec, RowSpec, _checksum

KEY = b"k" * 32
SPECS = [
    RowSpec(((torch.float32, (8,)),)),
    RowSpec(((torch.float16, (3, 4)), (torch.int64, ()))),
    RowSpec(((torch.uint8, (0,)), (torch.bool, (5,)))),
    RowSpec(((torch.float32, (512,)),)),
]
EXTREMES = [0, 1, 2, 3, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
SENTINEL = 0x5A


def fuzz_blobs(seed, count):
    """Decode ``count`` forged blobs; what was done with them. Raises where one does what it should not."""
    chance, counts = random.Random(seed), collections.Counter()
    codecs = [(spec, Codec(spec, level), sample(spec, level, chance)) for spec in SPECS for level in (None, 1)]
    for _ in range(count):
        spec, codec, blob = chance.choice(codecs)
        forged = forge(blob, spec, chance)
        # One row more than asked for: nothing is written behind the row.
        rows = [torch.full((2 * max(width, 1),), SENTINEL, dtype=torch.uint8) for width in spec.sizes]
        targets = [
            row[: 2 * width].view(dtype).view(2, *shape)[:1] if width else torch.empty((1, *shape), dtype=dtype)
            for row, width, (dtype, shape) in zip(rows, spec.sizes, spec.leaves, strict=True)
        ]
        sound = codec.decode_into([KEY], [forged], targets)
        for row, width in zip(rows, spec.sizes, strict=True):
            assert bool((row[width:] == SENTINEL).all()), f"written behind the row, seed {seed}"
        if sound:
            # Right checksum, lengths and header: whatever it holds is a row of this spec.
            assert codec.decode([KEY], codec.encode([KEY], targets))[0] == [0]
        counts["blobs taken" if sound else "blobs refused"] += 1
    return counts


def sample(spec, level, chance):
    """An honest blob; of zeros where it is to be compressed."""
    size = 0 if level is not None else 255
    rows = [
        torch.tensor([chance.randint(0, size) for _ in range(width)], dtype=torch.uint8).view(dtype).view(1, *shape)
        if dtype is not torch.bool
        else torch.zeros(1, *shape, dtype=dtype)
        for width, (dtype, shape) in zip(spec.sizes, spec.leaves, strict=True)
    ]
    return Codec(spec, level).encode([KEY], rows)[0]


def forge(blob, spec, chance):
    """A harmful relative of ``blob``, most often with a right checksum, so that what lies behind it is reached."""
    body = bytearray(blob[:-CHECKSUM_SIZE])
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        chance.choice([flip, overwrite, cut, repeat, number, frame, noise])(body, spec, chance)
    if chance.random() < 0.1:
        return bytes(body) + chance.randbytes(CHECKSUM_SIZE)
    return bytes(body) + _checksum(KEY, bytes(body))


def flip(body, spec, chance):
    if body:
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)


def overwrite(body, spec, chance):
    at = chance.randrange(len(body) + 1)
    more = chance.randbytes(chance.randrange(1, 16))
    body[at : at + len(more)] = more


def cut(body, spec, chance):
    at = chance.randrange(len(body) + 1)
    del body[at : at + chance.choice([1, 4, 8, len(body)])]


def repeat(body, spec, chance):
    at = chance.randrange(len(body) + 1)
    body[at:at] = body[at : at + chance.randrange(64)] * chance.choice([1, 2, 50])


def number(body, spec, chance):
    """An integer of any width, somewhere in the header or the frame's."""
    form = chance.choice("BHIQ")
    packed = struct.pack(f"<{form}", chance.choice(EXTREMES) % 2 ** (8 * struct.calcsize(form)))
    at = chance.randrange(min(len(body), 64) + 1)
    body[at : at + len(packed)] = packed


def frame(body, spec, chance):
    """Another zstd frame in place of the payload: of another length, of no declared length, several, huge ones."""
    size = chance.choice([spec.size, spec.size, spec.size + 1, max(spec.size - 1, 0), 0, 10**6])
    compressor = zstandard.ZstdCompressor(
        level=chance.choice([-5, 1, 3]),
        write_content_size=chance.random() < 0.7,
        write_checksum=chance.random() < 0.5,
    )
    payload = compressor.compress(bytes(size))
    head = Codec(spec)._prefixes[chance.choice([0, 1, 3])]
    body[:] = head + payload * chance.choice([1, 1, 2])


def noise(body, spec, chance):
    body[:] = chance.randbytes(chance.choice([0, 1, 15, 16, 17, 100, 5000]))


COLUMNS = ("key", "raw", "store_time", "expire_time", "access_time", "access_count", "tag", "size", "mode")
COLUMNS += ("filename", "value")
PICKLES = [
    b"cos\nsystem\n(S'touch {marker}'\ntR.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x07touch {marker}\x85R.",
]


def values(chance, marker):
    """A value of any type that SQLite has, of any size."""
    return chance.choice(
        [
            None,
            chance.choice(EXTREMES) % 2**63,
            -chance.choice(EXTREMES) % 2**62,
            chance.choice([0.5, -1e308, float("inf")]),
            chance.choice(["", "text", "\0", "x" * 100_000, str(marker), f"../../{marker.name}", "..", "/etc/passwd"]),
            "ab/cd/" + "e" * 28 + ".val",
            chance.choice(PICKLES).replace(b"{marker}", str(marker).encode()),
            chance.randbytes(chance.choice([0, 1, 32, 5000])),
            bytes(chance.choice([10, 2_000_000])),
        ]
    )


def plant(database, chance, marker, count):
    """Put values of any kind into ``count`` columns of rows and settings."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        for _ in range(count):
            with contextlib.suppress(sqlite3.IntegrityError):
                if chance.random() < 0.9:
                    column = chance.choice(COLUMNS)
                    row = "(SELECT rowid FROM Cache ORDER BY random() LIMIT 1)"
                    connection.execute(f"UPDATE Cache SET {column} = ? WHERE rowid = {row}", (values(chance, marker),))
                else:
                    row = "(SELECT rowid FROM Settings ORDER BY random() LIMIT 1)"
                    connection.execute(f"UPDATE Settings SET value = ? WHERE rowid = {row}", (values(chance, marker),))
        connection.commit()


def endure_rows(directory, marker, seed, planted=40):
    """Train on a directory with planted rows; what was counted. Raises for a wrong answer."""
    chance = random.Random(seed)
    Run(directory).steps(100, 4)
    plant(next(directory.rglob("cache.db")), chance, marker, planted)
    run = Run(directory)
    run.steps(120, 6)
    run.steps(120, 6)
    Run(directory).steps(120, 6)
    torchcache.flush()
    assert not marker.exists(), f"planted code was run, seed {seed}"
    return collections.Counter({"values planted": planted, "rows compared": 3 * 126})
