"""Digests on a device: operators, kernel and reference agree bit for bit, and it is a hash function."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import digest

from torchcache.digest.device import OnTheWay, digests_on_device

BITS = 128
HERE = Path(__file__).parent


def digests(leaf):
    return OnTheWay(leaf).digests()


def bits(leaf):
    """Of each row, its digest's bits."""
    found = np.frombuffer(b"".join(digests(leaf)), np.uint8).reshape(-1, 16)
    return np.unpackbits(found, axis=1).astype(int)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 1, 3, 4, 7, 8, 9, 1023, 1024, 1025, 32_767, 32_768, 32_772, 70_001]), st.integers(1, 3))
def test_operators_give_what_the_reference_says(size, count):
    rows = torch.randint(0, 256, (count, size), dtype=torch.uint8)
    assert digests(rows) == [digest(bytes(row.tolist())) for row in rows]


# Each is run in a process of its own: Triton decides when it is imported.
INTERPRETED = """
import torch
from torchcache.digest.device import _rows
from torchcache.digest.lanes import in_operators
from torchcache.digest.kernel import in_kernel
for size in (0, 1, 7, 8, 9, 1023, 1024, 1025, 2060, 32767, 32768, 32772, 70001, 32768 * 70):
    rows = torch.randint(0, 256, (1 if size > 100_000 else 3, size), dtype=torch.uint8)
    given = _rows(rows)
    assert torch.equal(in_kernel(*given), in_operators(*given)), size
apart = torch.randn(6, 5000)[::2, 8:4105]
given = _rows(apart)
assert given[0].data_ptr() == apart.data_ptr()  # read where they are
assert torch.equal(in_kernel(*given), in_operators(*given))
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torchcache.digest import kernel
from torchcache.digest.lanes import CONSTANTS, LANES
chunk = dict(zip(kernel._chunk.arg_names[5:], (*CONSTANTS[0], *CONSTANTS[1], LANES)))
row = dict(zip(kernel._row.arg_names[4:], (*CONSTANTS[0][:2], *CONSTANTS[1][:2], kernel.PARTS)))
for target in (*(GPUTarget("cuda", card, 32) for card in (80, 90, 120)), GPUTarget("hip", "gfx942", 64)):
    for steps in (1, 2, 4, 32):
        of_chunk = dict(rows="*i32", sums="*i64", stride="i32", width="i32", chunks="i32")
        of_chunk |= dict.fromkeys((*chunk, "steps"), "constexpr")
        triton.compile(ASTSource(kernel._chunk, of_chunk, {**chunk, "steps": steps}), target=target)
    of_row = dict(sums="*i64", digests="*i64", size="i32", chunks="i32") | dict.fromkeys(row, "constexpr")
    triton.compile(ASTSource(kernel._row, of_row, row), target=target)
"""


@pytest.mark.parametrize(("program", "interpreted"), [(INTERPRETED, "1"), (COMPILED, "0")], ids=["runs", "compiles"])
def test_the_kernel(program, interpreted, tmp_path):
    """It gives what operators give where it is interpreted, and compiles for cards that are not here."""
    pytest.importorskip("triton")
    ambient = {**os.environ, "TRITON_INTERPRET": interpreted, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=ambient, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def described(leaf):
    """The bytes of each row, in row-major order."""
    rows = leaf.resolve_conj().resolve_neg().contiguous().reshape(len(leaf), -1)
    return [bytes(row.contiguous().view(torch.uint8).tolist()) for row in rows]


@pytest.mark.parametrize(
    "leaf",
    [
        torch.randn(3, 5).bfloat16(),
        torch.rand(3, 7) > 0.5,
        torch.randn(3, 4).to(torch.float8_e4m3fn),
        torch.randn(3, 2, dtype=torch.complex64).conj(),
        torch.randn(3, 2, dtype=torch.complex128),
        torch.randint(0, 9, (5,)),
        torch.randint(0, 9, (8, 2))[:, 1:],
        torch.randn(3, 2, 8, 8).to(memory_format=torch.channels_last),
        torch.randn(6, 8)[::2],
        torch.randn(6, 8)[:, 1:4],
        torch.randn(1, 8).expand(4, 8),
        torch.randn(3, 8).double()[:, ::2],
        torch.randint(0, 9, (3, 9), dtype=torch.uint8)[:, 1:],
        torch.randn(3, 0),
    ],
    ids=lambda leaf: f"{leaf.dtype} {tuple(leaf.shape)} {leaf.stride()}",
)
def test_what_counts_is_the_bytes_of_a_row(leaf):
    assert digests(leaf) == [digest(row) for row in described(leaf)]


def test_no_rows_have_no_digests():
    assert digests(torch.randn(0, 5)) == []


def test_each_bit_of_a_row_changes_half_of_the_digest():
    """Avalanche: over all bits of rows of some lengths, also those of the last, padded word."""
    generator = torch.Generator().manual_seed(0)
    for size in (5, 8, 64, 1100):
        row = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        places = torch.arange(size * 8) if size < 100 else torch.randint(0, size * 8, (500,), generator=generator)
        changed = row.repeat(len(places), 1)
        changed[torch.arange(len(places)), places // 8] ^= (1 << places % 8).to(torch.uint8)
        flips = bits(changed) != bits(row[None])
        assert flips.sum(1).min() > 35  # of 128, 64 are expected, give or take 5.7
        assert flips.sum(1).max() < 93
        share = flips.mean(0)
        assert np.all(np.abs(share - 0.5) < 6 * 0.5 / np.sqrt(len(places)))


def assert_all_differ(leaf):
    """No two rows agree in either half of their digests."""
    halves = digests_on_device(leaf).T
    for half in halves:
        assert len(half.unique()) == len(leaf)


def test_rows_of_zeros_of_any_length_differ():
    seen = {
        digests(torch.zeros(1, size, dtype=torch.uint8))[0] for size in (*range(300), 32_767, 32_768, 32_769, 65_536)
    }
    assert len(seen) == 304


def test_sparse_rows_differ():
    size = 300
    rows = torch.eye(size * 8).reshape(size * 8, size, 8).to(torch.uint8)
    rows = (rows << torch.arange(8)).sum(-1).to(torch.uint8)  # one bit each
    pairs = rows[
        torch.randint(0, len(rows), (4000, 2), generator=torch.Generator().manual_seed(0)).sort().values.unique(dim=0)
    ]
    pairs = pairs[(pairs[:, 0] != pairs[:, 1]).any(1)]
    assert_all_differ(torch.cat([torch.zeros(1, size, dtype=torch.uint8), rows, pairs[:, 0] ^ pairs[:, 1]]))


def test_words_that_change_places_count():
    """Within a lane, between lanes, and between chunks."""
    words = torch.arange(1, 3 * 128 * 32 + 1)
    rows = [words]
    for one, other in ((0, 1), (0, 128), (5, 4096 + 5), (127, 128), (4095, 4096), (0, len(words) - 1)):
        changed = words.clone()
        changed[[one, other]] = words[[other, one]]
        rows.append(changed)
    assert_all_differ(torch.stack([*rows, words.roll(1), words.roll(128), words.roll(4096), words.flip(0)]))


def test_signs_that_change_in_many_ways_count():
    """Changes of the highest bit alone, which products do not spread."""
    base = torch.randn(6 * 128, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 1, 2, 256, 257, 258, 512, 513, 514, 600])
    ways = torch.arange(1 << len(places))
    rows = base.repeat(len(ways), 1)
    rows[:, places] *= 1 - 2.0 * ((ways[:, None] >> torch.arange(len(places))) & 1)
    assert_all_differ(rows)


def test_ten_million_rows_differ():
    found = []
    for start in range(0, 10_000_000, 50_000):
        rows = torch.arange(start, start + 50_000)[:, None]
        found.append(digests_on_device(rows))
    for half in torch.cat(found).T:
        assert len(half.unique()) == 10_000_000


def test_the_halves_tell_nothing_of_each_other():
    found = bits(torch.arange(40_000)[:, None]) - 0.5
    together = np.abs(found[:, :64].T @ found[:, 64:]) / len(found) * 4
    assert together.max() < 6 / np.sqrt(len(found))
    assert np.abs(found.mean(0)).max() < 3 / np.sqrt(len(found))
