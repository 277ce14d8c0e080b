"""Corners that random programs of operations found: modes, strides, empty and repeated calls."""

import copy

import pytest
import torch
from torch import nn

import torchcache

DOORS = {
    "eager": lambda model: model,
    "transform": torchcache.transform,
    "compile": lambda model: torch.compile(
        model, backend=torchcache.torchcache_backend, options={"inner": "aot_eager"}
    ),
}


class Net(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, *inputs):
        return self.backbone(*inputs) * 2


def cached(backbone, door):
    """A model with ``backbone`` marked, opened through ``door``, and its uncached twin."""
    model = Net(backbone.eval()).requires_grad_(False)
    twin = copy.deepcopy(model)
    torchcache.mark(model.backbone)
    return DOORS[door](model), twin


@pytest.mark.parametrize("door", DOORS)
def test_several_missing_batches_in_inference_mode(door):
    model, twin = cached(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), door)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(3, 4)
            assert torch.equal(model(x), twin(x))
    assert torchcache.stats(model).misses == 12
    with torch.inference_mode():
        assert torch.equal(model(x), twin(x))
    assert torch.equal(model(x), twin(x))
    assert torchcache.stats(model).hits == 6


@pytest.mark.parametrize("door", DOORS)
def test_half_precision_rows_under_autocast_to_another(door):
    model, twin = cached(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), door)
    for _ in range(2):
        x = torch.randn(3, 4, dtype=torch.float16)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("door", DOORS)
def test_a_batch_of_one_element_with_a_stride(door):
    model, twin = cached(nn.Embedding(9, 5), door)
    x = torch.arange(8).reshape(4, 2)
    for _ in range(2):
        for row in range(4):
            assert torch.equal(model(x[row : row + 1, 1]), twin(x[row : row + 1, 1]))


@pytest.mark.parametrize("door", DOORS)
def test_the_second_call_with_the_same_ids_has_rows_of_its_own(door):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.backbone(x).tanh() - self.backbone(y).relu()

    model = Two().requires_grad_(False)
    twin = copy.deepcopy(model)
    torchcache.mark(model.backbone)
    run = DOORS[door](model)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for _ in range(3):
        with torchcache.sample_keys([5, 6, 7]):
            torch.testing.assert_close(run(x, y), twin(x, y))
    assert torchcache.stats(model).misses == 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_an_empty_batch_that_does_not_trace(door):
    model, twin = cached(Attention(), door)
    padding = torch.tensor([[False, False, True]] * 4)
    x = torch.randn(4, 3, 8)
    assert model(x[:0], padding[:0]).shape == twin(x[:0], padding[:0]).shape == (0, 3, 8)
    for _ in range(2):
        torch.testing.assert_close(model(x, padding), twin(x, padding))
    assert torchcache.stats(model).hits == 4


class Shares(nn.Module):
    def forward(self, x):
        return x.tanh() / x.shape[0]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("rows", [2, 3, 6])
def test_rows_that_depend_on_the_size_of_the_batch_are_refused(door, rows):
    model, _ = cached(nn.Sequential(Shares()), door)
    with pytest.raises(torchcache.RowwiseError):
        model(torch.randn(rows, 4))


@pytest.mark.parametrize("door", DOORS)
def test_rows_of_a_batch_of_one_are_not_trusted_before_more_are_seen(door):
    model, twin = cached(nn.Sequential(Shares()), door)
    x = torch.randn(6, 4)
    refused = []
    for rows in (*(x[row : row + 1] for row in range(6)), x):
        try:
            assert torch.equal(model(rows), twin(rows))
        except torchcache.RowwiseError:
            refused.append(len(rows))
    assert refused in ([6], [1] * 6 + [6])  # a graph of one row cannot tell


@pytest.mark.parametrize("door", DOORS)
def test_batches_of_one_are_cached_and_share_rows_once_more_were_seen(door):
    model, _ = cached(nn.Sequential(nn.Linear(4, 4)), door)
    x = torch.randn(6, 4)
    for _ in range(2):
        model(x[:1])
    assert torchcache.stats(model).hits == 1
    model(x)
    misses = torchcache.stats(model).misses
    for row in range(6):
        model(x[row : row + 1])
    assert torchcache.stats(model).misses == misses


def test_a_traced_batch_is_given_back_as_it_was():
    model, _ = cached(nn.Sequential(nn.Linear(4, 4)), "compile")
    x = torch.randn(6, 4)
    model(x)
    assert not getattr(x, "_dynamo_weak_dynamic_indices", None)
