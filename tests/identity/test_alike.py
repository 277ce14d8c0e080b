"""Registries that are replaced by copies of themselves, as libraries do before they write to them."""

import copy

import pytest
import torch
from torch import nn

import torchcache
from torchcache.identity import identity


class State:
    """What a registry holds."""

    def __init__(self):
        self.scale, self.names, self.tables, self.used = 1.0, ["a", "b"], {"a": [1.0], "b": [2.0]}, {"x"}


class Registry:
    """Replaces its state in each call."""

    def __init__(self):
        self.state = State()

    def get(self):
        state = State()
        for name, value in vars(self.state).items():
            setattr(state, name, copy.deepcopy(value))
        self.state = state
        return state.scale * sum(state.tables[name][0] for name in state.names if state.used)


REGISTRY = Registry()


class Scaled(nn.Module):
    """Scales by what the registry says."""

    def forward(self, x):
        return x * REGISTRY.get()


CHANGES = {
    "an attribute": lambda state: setattr(state, "scale", state.scale + 1),
    "a list": lambda state: state.names.append("a"),
    "a list in a dict": lambda state: state.tables["a"].__setitem__(0, state.tables["a"][0] + 1),
    "a dict": lambda state: state.tables.__setitem__("b", [state.tables["b"][0] + 1]),
    "a set": lambda state: state.used.clear() if state.used else state.used.add("x"),
    "a type": lambda state: setattr(state, "scale", complex(state.scale + 1)),
}


@pytest.fixture
def readings(monkeypatch):
    made, program = [], identity.Program
    monkeypatch.setattr(identity, "Program", lambda *given: made.append(1) or program(*given))
    monkeypatch.setattr(REGISTRY, "state", State())
    return made


def test_what_is_replaced_by_what_is_alike_is_read_once(readings):
    module, data = torchcache.mark(Scaled(), audit=0), torch.randn(40, 3)
    for _ in range(2):
        for x in data.split(4):
            assert torch.equal(module(x), x * REGISTRY.get())
    assert torchcache.stats(module).hits >= 36
    assert len(readings) <= 2


class Counting(nn.Module):
    """Writes to its state before it replaces it, and reads that."""

    def __init__(self):
        super().__init__()
        self.registry = [Registry()]

    def forward(self, x):
        (registry,) = self.registry
        registry.state.scale += 1
        return x * registry.get()


def test_what_is_written_before_it_is_replaced_is_written_once_a_call():
    module, twin = torchcache.mark(Counting(), audit=0), Counting()
    for _ in range(6):
        x = torch.randn(4, 3)
        assert torch.equal(module(x), twin(x))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_to_the_last_of_them_is_seen(change, readings):
    module, x = torchcache.mark(Scaled(), audit=0), torch.randn(4, 3)
    for turn in range(12):
        if turn % 3 == 2:
            CHANGES[change](REGISTRY.state)
        assert torch.equal(module(x), x * REGISTRY.get())
