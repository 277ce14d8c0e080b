"""What a first call must not decide for later ones: sizes that coincide, an empty batch, one sample, a mixing flag."""

import copy

import torch
from torch import nn

import torchcache


def served(model, *calls):
    """Rows that were hits in calls of a marked copy, each compared with the original."""
    cached = torchcache.mark(copy.deepcopy(model), freeze=True)
    for args, kwargs in calls:
        torch.testing.assert_close(cached(*args, **kwargs), model(*args, **kwargs))
    return torchcache.stats(cached).hits


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x, mask):
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, table, mixed=False):
        y = self.layer(x) + table.sum()
        return y - y.mean(0) if mixed else y


def frozen(model):
    return model.eval().requires_grad_(False)


def test_a_batch_as_long_as_the_side_of_a_shared_mask():
    x, mask = torch.randn(5, 5, 4), torch.zeros(5, 5)
    call = ((x, mask), {})
    assert served(frozen(Attend()), call, call, ((x[:3], mask), {})) == 8


def test_an_empty_batch_first():
    x, table = torch.randn(6, 4), torch.randn(3)
    assert served(frozen(Shifted()), ((x[:0], table), {}), ((x, table), {}), ((x, table), {})) == 6


def test_one_sample_without_a_batch_dimension_first():
    sample, x = torch.randn(3, 8, 8), torch.randn(6, 3, 8, 8)
    calls = [((given,), {}) for given in (sample, x, x, sample, x)]
    assert served(frozen(nn.Conv2d(3, 4, 3)), *calls) == 12


def test_a_call_whose_rows_mix_is_computed_and_others_go_on():
    x, table = torch.randn(6, 4), torch.randn(3)
    plain, mixing = ((x, table), {}), ((x, table), {"mixed": True})
    assert served(frozen(Shifted()), plain, mixing, plain, mixing, plain) == 12
