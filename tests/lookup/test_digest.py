"""Digests of rows: every byte, and nothing but the row."""

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcache.lookup.digest import digest_rows

ALGORITHMS = ["xxh3_128", "blake3"]


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    if request.param == "blake3":
        pytest.importorskip("blake3")
    return request.param


def test_a_digest_is_xxh3_128_of_the_rows_bytes():
    x = torch.randn(5, 7, 3)
    assert digest_rows([x], "xxh3_128") == [xxhash.xxh3_128_digest(row.numpy().tobytes()) for row in x]


@pytest.mark.parametrize("width", [3, 40, 5000])
def test_several_inputs_are_hashed_one_after_the_other(algorithm, width):
    x, y = torch.randn(6, width), torch.randint(0, 9, (6, 4))
    together = torch.cat([x.view(torch.uint8).reshape(6, -1), y.view(torch.uint8).reshape(6, -1)], 1)
    assert digest_rows([x, y], algorithm) == digest_rows([together], algorithm)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=12), st.sampled_from([1, 6, 9000]))
def test_a_digest_does_not_depend_on_the_batch(rows, width):
    pool = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    alone = [digest_rows([pool[row : row + 1]], "xxh3_128")[0] for row in range(8)]
    assert digest_rows([pool[rows]], "xxh3_128") == [alone[row] for row in rows]
    assert len(set(alone)) == 8


@pytest.mark.parametrize("width", [16, 40_000])
def test_every_byte_counts(algorithm, width):
    x = torch.zeros(1, width, dtype=torch.uint8)
    seen = set(digest_rows([x], algorithm))
    for position in [*range(16), width - 1, width // 2]:
        x[0, position] += 1
        seen.update(digest_rows([x], algorithm))
    assert len(seen) == 19


def test_memory_order_does_not_count():
    x = torch.randn(6, 5, 4)
    assert digest_rows([x.transpose(1, 2)], "xxh3_128") == digest_rows([x.transpose(1, 2).contiguous()], "xxh3_128")
    assert digest_rows([x[:, ::2]], "xxh3_128") == digest_rows([x[:, ::2].clone()], "xxh3_128")
    z = torch.randn(3, 2, dtype=torch.complex64)
    assert digest_rows([z.conj()], "xxh3_128") == digest_rows([z.conj().resolve_conj().clone()], "xxh3_128")


def test_rows_without_bytes_have_a_digest():
    assert len(set(digest_rows([torch.empty(3, 0)], "xxh3_128"))) == 1
