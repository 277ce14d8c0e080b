"""Marks on whole models where what trains, or what is read of it, changes in the course of a run."""

import contextlib
import copy
import gc
import itertools
import weakref

import pytest
import torch
from test_partly import DOORS, counted, opened
from torch import nn

import torchcache
from torchcache import dynamo


class Blocks(nn.Module):
    """Layers, one upon the other, and a head; only the head trains."""

    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth)).requires_grad_(False)
        self.head = nn.Linear(6, 3)
        self.scale = 1.0

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x) * self.scale


class Adapter(nn.Module):
    """A frozen layer, and a trainable one beside it that can be switched off."""

    def __init__(self):
        super().__init__()
        self.base, self.beside = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)
        self.off = False

    def forward(self, x):
        return self.base(x) if self.off else self.base(x) + self.beside(x)


class Adapted(Blocks):
    """Adapters train in place of the head."""

    def __init__(self):
        super().__init__()
        self.head.requires_grad_(False)
        self.blocks.append(Adapter())

    @contextlib.contextmanager
    def without(self):
        """As PEFT switches adapters off: they do not train meanwhile."""
        adapter = self.blocks[-1]
        adapter.off = not adapter.beside.requires_grad_(False).weight.requires_grad
        yield
        adapter.off = not adapter.beside.requires_grad_(True).weight.requires_grad


def during(model, work):
    """Rows served, computed and stored, and computed only, in what is done in ``work``."""
    before = counted(model)
    work()
    return [now - then for now, then in zip(counted(model), before, strict=True)]


def step(nets, x):
    """One step of training, which must come out the same for both."""
    outputs = [net(x) for net in nets]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for net, output in zip(nets, outputs, strict=True):
        net.zero_grad()
        output.square().sum().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter -= 0.01 * parameter.grad


def evaluate(nets, x):
    with torch.no_grad():
        torch.testing.assert_close(*[net(x) for net in nets], atol=1e-5, rtol=1e-5)


def test_each_stage_of_unfreezing_is_served():
    torch.manual_seed(0)
    twin = Blocks(10)
    nets = torchcache.mark(copy.deepcopy(twin), audit=0), twin
    model, data, held_out = nets[0], [torch.randn(4, 6) for _ in range(4)], torch.randn(4, 6)
    traced = []

    def epoch():
        for x in data:
            step(nets, x)
        evaluate(nets, held_out)

    for stage in range(10):
        assert during(model, epoch) == [0, 20, 0] or not stage
        assert during(model, epoch) == [20, 0, 0]
        traced += [weakref.ref(graph) for graph in torchcache.graphs(model)] if not stage else []
        for net in nets:
            net.blocks[9 - stage].requires_grad_(True)
    gc.collect()
    assert traced
    assert not any(graph() for graph in traced)


@pytest.mark.parametrize(("seconds", "most"), [(1000.0, 8), (0.0, 1)])
def test_a_program_that_changes_in_each_call_is_traced_a_few_times_until_it_stays(seconds, most, warnings, monkeypatch):
    monkeypatch.setattr("torchcache.graph.traced.LONG", seconds)
    torch.manual_seed(0)
    twin = Blocks()
    nets = torchcache.mark(copy.deepcopy(twin), audit=0), twin
    model, x = nets[0], torch.randn(4, 6)
    for _ in range(40):
        for net in nets:
            net.scale += 0.01
        step(nets, x)
    assert len(torchcache.graphs(model)) == most
    assert counted(model)[2] >= 100
    assert any("keeps changing" in text for text in warnings)
    for _ in range(50):
        step(nets, x)
    assert during(model, lambda: step(nets, x)) == [4, 0, 0]


@pytest.mark.parametrize("door", DOORS)
def test_a_model_is_its_own_reference_without_its_adapters(door):
    torch.manual_seed(0)
    twin = Adapted()
    model = torchcache.mark(copy.deepcopy(twin), audit=0)
    nets, data = (opened(door, model), twin), [torch.randn(4, 6) for _ in range(4)]

    def epoch():
        for x in data:
            with model.without(), twin.without():
                evaluate(nets, x)
            step(nets, x)

    for _ in range(3):
        epoch()
    for _ in range(10):
        assert during(model, epoch) == [32, 0, 0]


def _doubled(module, args, output):
    return output * 2


CHANGES = {
    "a number": lambda net: setattr(net, "scale", 2.0),
    "a hook": lambda net: net.blocks[0].register_forward_hook(_doubled),
    "a weight": lambda net: net.blocks[0].weight.data.mul_(2),
    "a parameter": lambda net: setattr(net.blocks[0], "bias", nn.Parameter(torch.ones(6), requires_grad=False)),
    "a layer": lambda net: net.blocks.insert(1, nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_while_adapters_are_off_is_seen_when_they_are_on_again(change):
    torch.manual_seed(0)
    twin = Adapted()
    nets = torchcache.mark(copy.deepcopy(twin), audit=0), twin
    x = torch.randn(4, 6)
    for turn in range(8):
        step(nets, x)
        with nets[0].without(), nets[1].without():
            evaluate(nets, x)
            if turn == 5:
                for net in nets:
                    CHANGES[change](net)
            evaluate(nets, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_copy_with_averaged_weights_finds_what_is_frozen(mode):
    torch.manual_seed(0)
    model = torchcache.mark(Blocks(), audit=0)
    twin = torchcache.unmark(copy.deepcopy(model))
    averages = copy.deepcopy(model), copy.deepcopy(twin)
    x, held_out = torch.randn(4, 6), [torch.randn(4, 6) for _ in range(2)]

    def evaluation():
        with mode():
            for rows in held_out:
                torch.testing.assert_close(*[net(rows) for net in averages], atol=1e-5, rtol=1e-5)

    for epoch in range(10):
        step((model, twin), x)
        with torch.no_grad():
            for average in averages:
                for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(parameter, 0.1)
        assert during(averages[0], evaluation) == [8, 0, 0] or epoch < 4


class Normed(Blocks):
    """All of it trains, beside the buffers of a normalisation."""

    def __init__(self):
        super().__init__()
        self.blocks.append(nn.BatchNorm1d(6)).requires_grad_(True)


@pytest.mark.parametrize("kind", [Blocks, Normed])
def test_weights_that_are_evaluated_twice_are_looked_up_as_a_whole(kind):
    torch.manual_seed(0)
    model = torchcache.mark(kind().eval(), audit=0)
    twin, x = torchcache.unmark(copy.deepcopy(model)), torch.randn(4, 6)
    for _ in range(8):
        for net in (model, twin):
            net.head.weight.data.mul_(1.1)
        for expected in ([0, 4, 0], [4, 0, 0]):
            assert during(model, lambda: evaluate((model, twin), x)) == expected


def test_weights_that_are_swapped_to_and_fro_are_looked_up_as_a_whole():
    torch.manual_seed(0)
    model = torchcache.mark(Blocks(), audit=0)
    twin, x = torchcache.unmark(copy.deepcopy(model)), torch.randn(4, 6)
    for turn in range(8):
        assert during(model, lambda: evaluate((model, twin), x)) == ([4, 0, 0] if turn > 1 else [0, 4, 0])
        for net in (model, twin):
            net.head.weight.data.neg_()


class Detaches(nn.Module):
    """What is frozen is given its input without the gradient that this needs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        features = torch.tanh(self.body(x.detach()))
        return self.head(features) + x[:, :3], features


@pytest.mark.parametrize("door", DOORS)
def test_what_needs_no_gradient_needs_none_on_hits(door):
    twin = Detaches()
    model, data = torchcache.mark(copy.deepcopy(twin)), torch.randn(4, 6)
    run = opened(door, model)
    for _ in range(3):
        seen = []
        for net in (run, twin):
            x = data.clone().requires_grad_()
            outputs, features = net(x)
            assert not features.requires_grad
            outputs.sum().backward()
            seen.append(x.grad)
        torch.testing.assert_close(*seen)
    torch.testing.assert_close(model.head.weight.grad, twin.head.weight.grad)
    assert counted(model)[0] == (8 if door != "call" and dynamo.names_parts() else 0)


def test_a_partly_trained_mark_that_cannot_be_read_is_read_now_and_then(monkeypatch):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3)
            self.step, self.held = 0, itertools.count()

        def forward(self, x):
            return self.head(self.body(x)) * (self.held is None or self.step >= 0)

    read = []
    take = torchcache.identity.identity.Identity._read
    monkeypatch.setattr("torchcache.identity.identity.Identity._read", lambda *of: read.append(1) or take(*of))
    model, data = torchcache.mark(Counts()), torch.randn(4, 8)
    for step in range(60):
        model.step = step
        torch.testing.assert_close(model(data), model.head(model.body(data)))
    assert len(read) < 40
