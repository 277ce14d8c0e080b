"""A marked call in compiled code is computed under the autocast that it was traced under."""

import copy

import pytest
import torch
from torch import nn

import torchcache
from torchcache import torchcache_backend


class Residual(nn.Module):
    """Returns float32 under autocast too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.layer(x)


class Model(nn.Module):
    """A frozen body, the last layer of it trainable if asked to; autocast within the model if asked to."""

    def __init__(self, within):
        super().__init__()
        self.body = nn.Sequential(Residual(), nn.GELU(), nn.Linear(6, 6))
        self.within = within

    def forward(self, x):
        if self.within is None:
            return self.body(x)
        with torch.autocast("cpu", dtype=self.within):
            return self.body(x)


@pytest.fixture(params=["eager", "aot_eager", "ours"])
def compiled(request):
    ours = {"backend": torchcache_backend, "options": {"inner": "aot_eager"}}
    return lambda model: torch.compile(model, **(ours if request.param == "ours" else {"backend": request.param}))


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("within", [None, torch.bfloat16])
def test_autocast_changes_between_calls(compiled, partly, within):
    model = Model(within).requires_grad_(False).eval()
    model.body[2].requires_grad_(partly)
    twin = copy.deepcopy(model)
    torchcache.mark(model.body)
    run = compiled(model)
    x = torch.randn(5, 6)
    for dtype in (None, torch.float16, torch.bfloat16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            torch.testing.assert_close(run(x), twin(x), atol=1e-5, rtol=1e-5)
    if not partly:
        assert torchcache.stats(model).hits >= 10


def test_the_frozen_part_of_a_mark_when_autocast_goes_off():
    model = Model(None).requires_grad_(False).eval()
    model.body[2].requires_grad_(True)
    twin = copy.deepcopy(model)
    torchcache.mark(model.body)
    torchcache.transform(model)
    x = torch.randn(5, 6)
    for dtype in (None, torch.bfloat16, None, torch.bfloat16, None):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            torch.testing.assert_close(model(x), twin(x), atol=1e-5, rtol=1e-5)
    assert torchcache.stats(model).hits == 15


class Inside(nn.Module):
    """A frozen layer under autocast of its own, with a block in it that has none, and a trainable one."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.body(x)
            with torch.autocast("cpu", enabled=False):
                h = self.body(h.float()) + h
        return self.top(torch.tanh(h).float())


def test_autocast_inside_a_mark_that_trains(compiled):
    model = Inside()
    twin = copy.deepcopy(model)
    called, run = torchcache.mark(copy.deepcopy(model)), compiled(torchcache.mark(model))
    x = torch.randn(8, 6)
    for dtype in (None, torch.bfloat16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            expected = twin(x)
            for found in (run(x), called(x)):
                assert found.dtype == expected.dtype
                torch.testing.assert_close(found, expected)
    assert torchcache.stats(called).hits >= 8


class Both(nn.Module):
    """Calls its frozen body under autocast and without, in one graph."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            low = self.body(x)
        return low, self.top(low.float()) + self.top(self.body(x))


def test_one_graph_calls_a_mark_under_autocast_and_without(compiled):
    model = Both()
    twin = copy.deepcopy(model)
    torchcache.mark(model.body)
    run, x = compiled(model), torch.randn(8, 6)
    for _ in range(3):
        for found, expected in zip(run(x), twin(x), strict=True):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected)


class Elsewhere(nn.Module):
    """Asks for the autocast of a device that its arguments are not on."""

    def forward(self, x):
        return x.bfloat16().float() if torch.is_autocast_enabled("cuda") else x


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_autocast_of_another_device_is_part_of_the_key():
    module, x = torchcache.mark(Elsewhere()), torch.randn(8, 6)
    try:
        for on in (False, True, False, True):
            torch.set_autocast_enabled("cuda", on)
            for _ in range(2):
                assert torch.equal(module(x), Elsewhere()(x))
    finally:
        torch.set_autocast_enabled("cuda", False)
