"""Weights that another thread swaps while a batch is computed, and puts back before anybody looks."""

from __future__ import annotations

import collections
import contextlib
import copy
import threading

import pytest
import torch
from torch import nn

import torchcache

# Semaphores are no part of a program, as events would be.
INSIDE, PROCEED = threading.Semaphore(0), threading.Semaphore(0)


class Waits(nn.Module):
    """Waits for another thread in front of each layer, and behind the last."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x):
        meet()
        x = self.first(x)
        meet()
        x = self.second(x) + self.shift
        meet()
        return x


def meet():
    INSIDE.release()
    PROCEED.acquire(timeout=60)


@contextlib.contextmanager
def meeting(*script):
    """Have another thread do what ``script`` says, a step at each meeting, then nothing."""
    steps, over = collections.deque(script), threading.Event()

    def work():
        while not over.is_set():
            if INSIDE.acquire(timeout=0.01):
                step = steps.popleft() if steps else None
                if step is not None:
                    step()
                PROCEED.release()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not steps, "the forward did not get that far"


def load(module):
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = {name: tensor * -2 for name, tensor in own.items()}
    return lambda: module.load_state_dict(other), lambda: module.load_state_dict(own)


def clone(module):
    own = module.second.weight.data
    other, same = own * -2, own.clone()
    return lambda: setattr(module.second.weight, "data", other), lambda: setattr(module.second.weight, "data", same)


def equal(module):
    own = module.second.weight
    other, same = (nn.Parameter(own.detach() * factor, requires_grad=False) for factor in (-2, 1))
    return lambda: setattr(module.second, "weight", other), lambda: setattr(module.second, "weight", same)


def parameter(module):
    own = module.second.weight
    other = nn.Parameter(own.detach() * -2, requires_grad=False)
    return lambda: setattr(module.second, "weight", other), lambda: setattr(module.second, "weight", own)


def layer(module):
    own, other = module.second, copy.deepcopy(module.second)
    with torch.no_grad():
        other.weight.mul_(-2)
    return lambda: setattr(module, "second", other), lambda: setattr(module, "second", own)


@pytest.mark.parametrize("how", [load, clone, equal, parameter, layer])
@pytest.mark.parametrize("learnt", [True, False])
def test_weights_put_back_within_a_call_leave_no_rows(how, learnt):
    torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)  # loads Dynamo, which sees what is replaced
    module = torchcache.mark(Waits(), freeze=True, audit=0.0)
    warm, x = torch.randn(4, 6), torch.randn(4, 6)
    with meeting(), torchcache.bypass():
        wanted = module(x)
    with meeting():
        for _ in range(3 if learnt else 0):
            module(warm)
        hits = torchcache.stats(module).hits
    swap, put_back = how(module)
    with meeting(None, swap, put_back):
        module(x)
    with meeting():
        for _ in range(4):
            assert torch.allclose(module(x), wanted, atol=1e-5)
    assert torchcache.stats(module).hits > hits


@pytest.mark.parametrize("how", [load, parameter])
@pytest.mark.parametrize("before", [0, 3], ids=["in the caller's run", "in a probe"])
def test_what_another_thread_does_to_weights_in_a_first_call_is_not_undone(before, how):
    """The forward seems to write to its weights, and what a probe writes is put back."""
    module = torchcache.mark(Waits(), freeze=True, audit=0.0)
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    swap, put_back = how(module)
    with meeting(*[None] * before, swap, None, None, None, put_back):
        for _ in range(2):
            module(torch.randn(4, 6))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, own[name]), name


def test_a_batch_that_another_thread_overwrites_leaves_no_rows():
    module = torchcache.mark(Waits(), freeze=True, audit=0.0)
    x = torch.randn(4, 6)
    own = x.clone()
    with meeting(), torchcache.bypass():
        wanted = module(x)
    with meeting():
        for _ in range(3):
            module(torch.randn(4, 6))
    with meeting(lambda: x.mul_(-3)):
        module(x)
    with meeting():
        for _ in range(3):
            assert torch.allclose(module(own), wanted, atol=1e-5)
