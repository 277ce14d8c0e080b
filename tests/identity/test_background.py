"""The background check finds what nothing else tells; it survives forks and keeps nothing alive."""

from __future__ import annotations

import gc
import os
import time
import weakref

import pytest
import torch
from states import known
from torch import nn


def test_background_finds_what_nothing_else_tells() -> None:
    weights = [torch.zeros(3 << 19), torch.zeros(1000, 700).t()]
    for index in range(2):
        state = known(weights)
        weights[index].data.as_strided((1,), (1,), 77).add_(1)  # one element
        end = time.monotonic() + 60
        while state.unchanged(weights) and time.monotonic() < end:
            time.sleep(0.01)
        assert not state.unchanged(weights)


def test_background_raises_no_false_alarm() -> None:
    weights = [torch.randn(1 << 18), torch.randn(64, 70).t(), torch.randn(4000, dtype=torch.complex64).conj()]
    weights += [torch.ones(1, 5000).expand(3, 5000), torch.randn(100, 100)[:, ::3]]
    state = known(weights)
    record = state._known[0]  # type: ignore[index]
    for portion in record.portions():
        record.check(*portion)
    assert record._suspected == {}


def test_dropped_models_are_freed() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(300, 512), nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last))
    state = known(list(net.parameters()))
    gone = [weakref.ref(part) for tensor in net.parameters() for part in (tensor, tensor.untyped_storage())]
    del net
    gc.collect()
    end = time.monotonic() + 10  # the background check holds a storage while it hashes it
    while any(reference() is not None for reference in gone) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(reference() is not None for reference in gone)
    assert state.digest


def test_a_dropped_state_leaves_nothing_behind() -> None:
    from torchcache.identity import background, optimizers

    weight = torch.ones(3)
    for registry in (background._records, optimizers._records):
        state = known([weight])
        key = id(state._known[0])  # type: ignore[index]
        assert key in registry
        del state
        end = time.monotonic() + 10
        while key in registry and time.monotonic() < end:
            time.sleep(0.01)
        assert key not in registry


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_sees_changes_and_checks_in_the_background() -> None:
    weight = torch.zeros(3 << 18)
    state = known([weight])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            fine = state.unchanged([weight])
            weight.data[77] = 1
            end = time.monotonic() + 30
            while state.unchanged([weight]) and time.monotonic() < end:
                time.sleep(0.01)
            code = 0 if fine and not state.unchanged([weight]) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert state.unchanged([weight])
