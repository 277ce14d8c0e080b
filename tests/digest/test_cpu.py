"""Digests of rows: every byte, and nothing but the row."""

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchcache
from torchcache.digest.cpu import digest_bytes
from torchcache.digest.rows import digest_rows, digest_tensor

ALGORITHMS = ["xxh3_128", "blake3"]


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    if request.param == "blake3":
        pytest.importorskip("blake3")
    return request.param


def test_a_digest_is_xxh3_128_of_the_rows_bytes():
    x = torch.randn(5, 7, 3)
    assert digest_rows([x], "xxh3_128") == [xxhash.xxh3_128_digest(row.numpy().tobytes()) for row in x]


@pytest.mark.parametrize("width", [3, 40])
def test_several_inputs_are_hashed_one_after_the_other(algorithm, width):
    x, y = torch.randn(6, width), torch.randint(0, 9, (6, 4))
    together = torch.cat([x.view(torch.uint8).reshape(6, -1), y.view(torch.uint8).reshape(6, -1)], 1)
    assert digest_rows([x, y], algorithm) == digest_rows([together], algorithm)


def test_of_several_inputs_a_large_one_counts_by_its_own_digest(algorithm):
    x, y = torch.randn(6, 5000), torch.randint(0, 9, (6, 4))
    own = torch.frombuffer(bytearray(b"".join(digest_rows([x], algorithm))), dtype=torch.uint8).reshape(6, 16)
    assert digest_rows([x, y], algorithm) == digest_rows([own, y], algorithm)


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


def test_whatever_comes_with_rows_is_hashed_as_they_are():
    blake3 = pytest.importorskip("blake3").blake3
    tensor = torch.arange(600.0)
    data = tensor.numpy().tobytes()
    assert digest_bytes(data, "blake3") == digest_tensor(tensor, "blake3") == blake3(data).digest(length=16)
    assert digest_bytes(data) == digest_tensor(tensor) == xxhash.xxh3_128_digest(data)


def test_an_unknown_digest_is_an_error():
    with pytest.raises(ValueError, match="md5"):
        digest_bytes(b"", "md5")


class Classes(nn.Module):
    """Similarities to prototypes that all rows share, by an exponent that is a number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, prototypes, scale=1.0):
        return self.layer(x) @ prototypes.T * scale


def test_under_blake3_shared_arguments_are_hashed_by_it(monkeypatch):
    monkeypatch.setattr("torchcache.checks.learning.content_digest", lambda tensor: bytes(16))
    net = torchcache.mark(Classes(), freeze=True, digest="blake3", audit=0)
    x, one, other = torch.randn(6, 4), torch.randn(3, 4), torch.randn(3, 4)
    for prototypes in (one, other, one):
        torch.testing.assert_close(net(x, prototypes), net.layer(x) @ prototypes.T)
    assert torchcache.stats(net).hits == 6


def test_ids_and_constants_are_hashed_by_what_nobody_can_make_collide(monkeypatch):
    net = torchcache.mark(Classes(), freeze=True, audit=0)
    x, one = torch.randn(6, 4), torch.randn(3, 4)
    net(x, one)
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: bytes(16))
    torch.testing.assert_close(net(x, one, 2.0), net.layer(x) @ one.T * 2.0)
    with torchcache.sample_keys(list("abcdef")):
        torch.testing.assert_close(net(x, one), net.layer(x) @ one.T)
    y = x.flip(0)
    with torchcache.sample_keys(list("ghijkl")):
        torch.testing.assert_close(net(y, one), net.layer(y) @ one.T)
