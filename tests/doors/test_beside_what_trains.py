"""What is set beside a frozen part is no part of it: sweeps, schedules and annealing keep its rows, and only these."""

import copy

import pytest
import torch
from test_partly import DOORS, assert_trains_the_same, counted, opened
from torch import nn
from torch.nn import functional

import torchcache


class Swept(nn.Module):
    """A frozen layer with dropout, and a trainable head with all that a sweep sets in it."""

    def __init__(self, dropout=0.1, act=torch.relu, eps=1e-5, alpha=1.0, frozen=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.frozen = nn.Linear(6, 6).requires_grad_(False), frozen
        self.drop, self.norm = nn.Dropout(dropout).eval(), nn.LayerNorm(6, eps)
        self.act, self.alpha, self.top = act, alpha, nn.Linear(6, 3)

    def forward(self, x):
        x = self.frozen(self.drop(self.body(x)))
        return self.top(self.act(self.norm(x)) * self.alpha)


def run_once(door, twin, x, directory, **options):
    """Rows served, and rows stored, in a step of a run of its own over ``directory``."""
    model = torchcache.mark(copy.deepcopy(twin), persistent=True, persistent_cache_dir=directory, **options)
    assert_trains_the_same(opened(door, model), model, twin, [x])
    torchcache.flush()
    torch._dynamo.reset()
    return counted(model)[:2]


SWEEP = [{}, {"dropout": 0.5}, {"act": torch.sigmoid}, {"act": functional.gelu}, {"eps": 1e-3}, {"alpha": 16.0}]


@pytest.mark.parametrize("door", DOORS)
def test_a_sweep_over_what_trains_is_served_by_its_first_run(door, tmp_path):
    x = torch.randn(8, 6)
    for settings in SWEEP:
        assert run_once(door, Swept(**settings), x, tmp_path) == ((8, 0) if settings else (0, 8))


@pytest.mark.parametrize("door", DOORS)
def test_what_is_annealed_beside_a_frozen_part_keeps_its_rows(door):
    twin = Swept()
    model, x = torchcache.mark(copy.deepcopy(twin)), torch.randn(8, 6)
    run = opened(door, model)
    for epoch in range(6):
        for each in (model, twin):
            each.alpha, each.norm.eps = 1.0 + epoch, 1e-5 * (1 + epoch)
        for rows in (x[:4], x[4:]):
            assert_trains_the_same(run, model, twin, [rows])
    assert counted(model) == (40, 8, 0)


def _doubled(x):
    return torch.tanh(x) * 2


def _capped(x):
    return torch.tanh(x).clamp(max=0.5)


@pytest.mark.parametrize("door", DOORS)
def test_what_the_frozen_part_itself_computes_by_counts(door, tmp_path):
    x = torch.randn(8, 6)
    for frozen in (torch.tanh, functional.relu, functional.softsign, functional.tanhshrink, _doubled, _capped):
        assert run_once(door, Swept(frozen=frozen), x, tmp_path) == (0, 8)


class Pooled(nn.Module):
    """A frozen layer, one of two functions that torch gives one qualified name, and a head."""

    def __init__(self, pool):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.top, self.pool = nn.Conv2d(1, 2, 3, padding=1).requires_grad_(False), nn.Linear(8, 3), pool

    def forward(self, x):
        return self.top(self.pool(self.conv(x), (2, 2)).flatten(1))


@pytest.mark.parametrize("door", DOORS)
def test_functions_of_one_qualified_name_are_told_apart(door, tmp_path):
    assert functional.max_pool2d.__qualname__ == functional.adaptive_max_pool2d.__qualname__
    x = torch.randn(8, 1, 5, 5)
    for pool in (functional.max_pool2d, functional.adaptive_max_pool2d):
        assert run_once(door, Pooled(pool), x, tmp_path) == (0, 8)


@pytest.mark.parametrize("door", DOORS)
def test_a_kernel_that_was_put_into_torch_counts(door):
    twin = Swept()
    model, x = torchcache.mark(copy.deepcopy(twin)), torch.randn(8, 6)
    run = opened(door, model)
    assert_trains_the_same(run, model, twin, [x])
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("tanh", lambda x: x * 0.25, "CPU", allow_override=True)
        torch.testing.assert_close(torch.tanh(x), x * 0.25)
        assert_trains_the_same(run, model, twin, [x])
        assert counted(model)[:2] == (0, 16)
    assert_trains_the_same(run, model, twin, [x])
    assert counted(model)[0] == 8


_by = [2.0]


@torch.library.custom_op("torchcache_tests::scaled_by", mutates_args=())
def _scaled_by(x: torch.Tensor) -> torch.Tensor:
    return x * _by[0]


_scaled_by.register_fake(torch.empty_like)


@pytest.mark.parametrize("door", DOORS)
def test_what_an_operator_of_the_users_own_reads_counts(door):
    twin = Swept(frozen=lambda x: _scaled_by(torch.tanh(x)))
    model, x = torchcache.mark(copy.deepcopy(twin)), torch.randn(8, 6)
    run = opened(door, model)
    assert_trains_the_same(run, model, twin, [torch.randn(8, 6)])  # torch sets its operator up
    try:
        for _by[0] in (2.0, 3.0, 2.0):
            assert_trains_the_same(run, model, twin, [x])
    finally:
        _by[0] = 2.0
    assert counted(model)[:2] == (8, 24)


def test_a_name_of_the_users_own_counts_with_a_frozen_part_that_is_torchs(tmp_path):
    x = torch.randn(8, 6)
    for name, found in (("first", (0, 8)), ("second", (0, 8)), ("first", (8, 0))):
        assert run_once("call", Swept(), x, tmp_path, persistent_module_hash=name) == found
