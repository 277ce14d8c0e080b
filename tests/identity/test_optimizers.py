"""Every step of an optimizer makes what it may have written suspect, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from states import known
from torch import Tensor, nn

from torchcache.identity.state import State

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.5, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.5, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.5, foreach=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.5, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.5),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5),
}


class OneElement(torch.optim.Optimizer):
    """An optimizer of a library, that needs no gradients."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.view(-1)[77] += 1


class Nothing(torch.optim.Optimizer):
    """An optimizer of a library, whose steps write nothing."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: object = None) -> None:
        pass


def step_on_one_element(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """A step that changes one element, which no sample is likely to find."""
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad.view(-1)[77] = 1.0
    optimizer.step(lambda: torch.tensor(1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_an_optimizer_is_seen(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(1 << 20))
    state = known([parameter])
    step_on_one_element(OPTIMIZERS[name]([parameter]), parameter)
    assert not state.unchanged([parameter])


def test_a_step_on_the_flat_buffer_that_tensors_lie_in_is_seen() -> None:
    flat = nn.Parameter(torch.zeros(1 << 20))
    view = flat.detach()[64:]
    state = known([view])
    step_on_one_element(torch.optim.SGD([flat], lr=0.5, fused=True), flat)
    assert not state.unchanged([view])


def test_a_step_of_an_optimizer_outside_of_torch_is_seen() -> None:
    parameter = nn.Parameter(torch.zeros(1 << 20))
    state = known([parameter])
    OneElement([parameter]).step()
    assert not state.unchanged([parameter])


def test_a_step_that_changes_nothing_is_no_change() -> None:
    parameter = nn.Parameter(torch.ones(1 << 20))
    state = known([parameter])
    parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([parameter], lr=0.0, fused=True).step()
    assert state.unchanged([parameter])
    parameter.data[77] = 5  # a change that the step's suspicion, cleared by now, cannot tell
    assert state.unchanged([parameter])


@pytest.mark.parametrize("kind", [torch.optim.SGD, Nothing])
def test_frozen_weights_in_an_optimizer_are_not_hashed_after_each_step(
    kind: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> None:
    frozen, head = nn.Parameter(torch.ones(1 << 20), requires_grad=False), nn.Parameter(torch.ones(3))
    state = known([frozen])
    head.grad = torch.ones(3)
    kind([frozen, head]).step()
    frozen.data[77] = 5  # which a hash would find
    assert state.unchanged([frozen])


def test_threads_at_once_see_a_change_each() -> None:
    parameter = nn.Parameter(torch.zeros(1 << 20))
    optimizer = torch.optim.SGD([parameter], lr=0.5, fused=True)
    state = State()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            state.update([parameter])
            step_on_one_element(optimizer, parameter)
            assert list(pool.map(lambda _: state.unchanged([parameter]), range(4))) == [False] * 4


def test_a_step_while_the_state_is_hashed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchcache.identity import state as module

    parameter = nn.Parameter(torch.zeros(1 << 20))
    optimizer = torch.optim.SGD([parameter], lr=0.5, fused=True)
    state, hashed = State(), module.contents_of

    def hash_then_step(tensors: list[Tensor]) -> object:
        contents = hashed(tensors)
        step_on_one_element(optimizer, parameter)
        return contents

    monkeypatch.setattr(module, "contents_of", hash_then_step)
    state.update([parameter])
    assert not state.unchanged([parameter])
