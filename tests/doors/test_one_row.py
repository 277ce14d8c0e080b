"""Partly trainable marks that are called with one row: that is traced apart, and its rows are those of batches."""

import contextlib

import pytest
import torch
from test_partly import DOORS, Net, assert_trains_the_same, counted, nets, opened
from torch import nn

import torchcache


class Heads(Net):
    """Reads the number of rows wherever code usually does."""

    def __init__(self):
        super().__init__(8)
        self.token = nn.Parameter(torch.randn(1, 1, 4), requires_grad=False)

    def forward(self, x):
        rows = x.shape[0]
        h = self.body(x).view(rows, 2, 4)
        h = torch.cat([self.token.expand(rows, -1, -1), h, self.token.repeat(rows, 1, 1)], 1)
        mask = torch.zeros(rows, 4, device=x.device)[:, None]
        h = torch.softmax(h @ h.transpose(1, 2) + mask, -1) @ h
        return self.top(h.reshape(rows, -1)[:, :8])


@pytest.mark.parametrize("sizes", [(4, 1), (1, 4), (1, 3, 4), (3, 1)])
@pytest.mark.parametrize("kind", [Net, Heads])
@pytest.mark.parametrize("door", DOORS)
def test_rows_are_found_one_by_one_and_in_batches(door, kind, sizes):
    model, twin = nets(kind)
    run, x = opened(door, model), torch.randn(12, model.body.in_features)
    for size in sizes:
        for batch in x.split(size):
            assert_trains_the_same(run, model, twin, [batch])
    assert counted(model) == (12 * (len(sizes) - 1), 12, 0)


def test_rows_on_disk_are_found_one_by_one(tmp_path):
    x = torch.randn(6, 8)
    for size in (6, 1):
        model, twin = nets(Heads, persistent=True, persistent_cache_dir=tmp_path)
        for batch in x.split(size):
            assert_trains_the_same(model, model, twin, [batch])
        torchcache.flush()
    assert counted(model) == (6, 0, 0)


class Other(Net):
    """Computes something else for one row."""

    def __init__(self):
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 6), requires_grad=False)

    def forward(self, x):
        return self.top(self.part(torch.tanh(self.body(x))))


def _branch(net, h):
    return h * 2 if len(h) == 1 else h


def _divided(net, h):
    return h / len(h)


def _squeezed(net, h):
    return torch.softmax(h.squeeze(), 0).view(len(h), -1)


def _squeezed_back(net, h):
    h = h.squeeze(0)
    return (h.cumsum(-1) if h.ndim == 1 else h.cumsum(0)).view(-1, 6)


def _mixed(net, h):
    return torch.softmax(h, 0) * h


def _centred(net, h):
    return h - h.mean(0, keepdim=True)


def _spread(net, h):
    return (h.unsqueeze(0) * h.unsqueeze(1)).sum(0)


def _against_state(net, h):
    return (h + net.pos.expand(len(h), -1)) * (1 if len(h) > 1 else net.pos)


def _largest(net, h):
    return h * (h == h.amax(0))


def _flipped(net, h):
    return h.flip(0) + h.roll(1, 0)


def _turned(net, h):
    return h.t().reshape(len(h), 6)


def _counted(net, h):
    return h + torch.arange(len(h)).view(-1, 1)


KINDS = [
    _branch, _divided, _squeezed, _squeezed_back, _mixed, _centred, _spread, _against_state, _largest, _flipped,
    _turned, _counted,
]  # fmt: skip


@pytest.mark.parametrize("sizes", [(4, 1, 4, 1), (1, 4, 1), (3, 2, 1, 3)])
@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("door", ["call", "aot_eager"])
def test_what_is_something_else_for_one_row_is_that(door, part, sizes):
    kind = type("Kind", (Other,), {"part": part})
    model, twin = nets(kind)
    run, x = opened(door, model), torch.randn(12, 6)
    for size in sizes:
        for batch in x.split(size):
            # Of several rows that depend on each other this is said.
            with contextlib.suppress(*[torchcache.RowwiseError] * (size > 1)):
                assert_trains_the_same(run, model, twin, [batch])


class Spread(Net):
    """Takes one row only."""

    def __init__(self):
        super().__init__()
        self.many = nn.Parameter(torch.randn(5, 6), requires_grad=False)

    def forward(self, x):
        return self.top(torch.tanh(self.body(x) + self.many).mean(0, keepdim=True))


@pytest.mark.parametrize("door", DOORS)
def test_what_takes_one_row_only_is_found_again_and_nothing_is_said(door, capfd):
    model, twin = nets(Spread)
    run, x = opened(door, model), torch.randn(6, 6)
    for batch in [*x.split(1), *x.split(1)]:
        assert_trains_the_same(run, model, twin, [batch])
    assert counted(model)[0] == 6
    assert "failed" not in capfd.readouterr().err
