"""Modules whose rows depend on each other, on chance or on earlier calls: refused by name, or left out and right."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn

import torchcache

DOORS = {
    "eager": lambda model: model,
    "transform": torchcache.transform,
    "compile": lambda model: torch.compile(model, backend="torchcache", options={"inner": "eager"}),
}


class Backbone(nn.Module):
    """A frozen stem before the part under test."""

    def __init__(self, part):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.part = part

    def forward(self, x, *others):
        return self.part(self.stem(x), *others)


class Net(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.backbone = Backbone(part)

    def forward(self, *inputs):
        return self.backbone(*inputs) * 2


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.norm(x).relu()


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Gram(nn.Module):
    def forward(self, x):
        return (x @ x.T).sum(1, keepdim=True) * x


class Ranked(nn.Module):
    def forward(self, x):
        return x.softmax(0).relu()


class Contrast(nn.Module):
    def forward(self, x, y):
        x, y = nn.functional.normalize(x, dim=1), nn.functional.normalize(y, dim=1)
        return (x @ y.t()).logsumexp(1)


class Dropped(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        self.average.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.average


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = torch.zeros(4)

    def forward(self, x):
        y = x + self.last
        self.last = x[-1].clone()
        return y


class Shuffled(nn.Module):
    def forward(self, x):
        return x.T.contiguous().cumsum(1).flip(1).T.contiguous()


computed = []


LIBRARY = torch.library.Library("torchcache_tests", "FRAGMENT")
LIBRARY.define("cosh(Tensor x) -> Tensor")


@torch.library.impl(LIBRARY, "cosh", "CompositeExplicitAutograd")
def cosh(x):
    computed.append(len(x))
    return x.cosh()


@torch.library.register_fake("torchcache_tests::cosh", lib=LIBRARY)
def fake_cosh(x):
    return torch.empty_like(x)


class Curved(nn.Module):
    def forward(self, x):
        return torch.ops.torchcache_tests.cosh(x)


class Nudged(nn.Module):
    def forward(self, x):
        return x + 1e-5 * x.mean(0)


MIXING = {
    Normed: "batch_norm",
    Centred: "mean",
    Gram: "matmul",
    Ranked: "softmax",
    Contrast: "matmul",
}
RANDOM = {Dropped: "dropout", Noisy: "randn_like"}
KEEPING = [Counting, Averaging, Remembering]


def opened(part, door):
    model = Net(part()).eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    torchcache.mark(model.backbone)
    return DOORS[door](model), model, twin


def batches(part, rows=6):
    count = 2 if part is Contrast else 1
    return [[torch.randn(rows, 4) for _ in range(count)] for _ in range(3)]


def refused(run, inputs):
    with pytest.raises(torchcache.RowwiseError) as caught:
        run(*inputs)
    return str(caught.value)


def right(run, twin, inputs):
    torch.manual_seed(1)
    got = run(*inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(got, twin(*inputs))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("part", [Centred, Gram, Ranked])
def test_what_mixes_rows_is_named_with_its_line_and_module(part, door):
    run, model, _ = opened(part, door)
    text = refused(run, batches(part)[0])
    assert text.startswith(("Backbone cannot", "backbone (Backbone) cannot"))
    line = inspect.getsourcelines(part.forward)[1] + 1
    where = re.escape(f"part, a {part.__name__} ({__file__}:{line})")
    assert re.search(rf"`{MIXING[part]}` in (backbone\.)?{where}", text)
    assert torchcache.stats(model).hits == 0


@pytest.mark.parametrize("part", [Normed, Contrast, Dropped, Noisy])
def test_the_eager_door_names_what_the_graph_doors_leave_out(part):
    run, _, _ = opened(part, "eager")
    text = refused(run, batches(part)[0])
    assert f"`{(MIXING | RANDOM)[part]}` in part" in text
    assert ("computed again" if part in RANDOM else "other rows") in text


@pytest.mark.parametrize("door", ["transform", "compile"])
@pytest.mark.parametrize("part", [Normed, Contrast, Dropped, Noisy])
def test_the_graph_doors_cache_what_comes_before(part, door):
    run, model, twin = opened(part, door)
    data = batches(part)
    for inputs in (*data, *data):
        right(run, twin, inputs)
    assert torchcache.stats(model).hits == 18


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("part", KEEPING)
def test_a_module_that_keeps_state_is_refused_or_right_in_every_call(part, door):
    run, _, twin = opened(part, door)
    data = batches(part)
    if door == "eager":
        assert "changes its own attributes or buffers" in refused(run, data[0])
        return
    for inputs in (*data, *data):
        right(run, twin, inputs)


@pytest.mark.parametrize("door", DOORS)
def test_rows_that_mix_where_they_are_not_first_give_the_list_of_likely_culprits(door):
    run, _, _ = opened(Shuffled, door)
    assert "Likely: BatchNorm" in refused(run, batches(Shuffled)[0])


@pytest.mark.parametrize("door", DOORS)
def test_rows_that_differ_by_little_are_named_as_well(door):
    run, _, _ = opened(Nudged, door)
    assert "`mean`" in refused(run, batches(Nudged)[0])


@pytest.mark.parametrize("door", DOORS)
def test_a_passing_probe_costs_three_calls_of_two_or_three_rows(door):
    run, _, twin = opened(Curved, door)
    data = batches(Curved)
    twin(*data[0])  # torch.ops changes when an operator is first used
    computed.clear()
    for inputs in (*data, *data):
        run(*inputs)
    assert sorted(computed) == [2, 2, 3, 6, 6, 6]
