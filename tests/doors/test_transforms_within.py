"""Forwards that transform functions themselves, or compile: they do so in compiled models as they do when called."""

import copy

import pytest
import torch
from torch import nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

import torchcache


def mapped(layer, x):
    return torch.vmap(lambda row: row - row.mean())(layer(x))


def mask(layer, x):
    """As transformers builds masks."""
    later = torch.vmap(torch.vmap(lambda a, b: a >= b, (None, 0)), (0, None))
    return layer(x) @ later(torch.arange(8), torch.arange(8)).float()


def forward_mode(layer, x):
    return torch.func.jvp(torch.sin, (layer(x),), (torch.ones_like(x),))[1]


def gradient(layer, x):
    with torch.enable_grad():
        y = layer(x).detach().requires_grad_()
        return torch.autograd.grad((y**3).sum(), y)[0]


def branches(layer, x):
    return layer(x) + torch.cond(layer.weight.sum() > 0, lambda a: a * 2, lambda a: a * 3, (layer.bias,))


def loops(layer, x):
    return while_loop(lambda i, a: i < 3, lambda i, a: (i + 1, a * 1.5), (torch.tensor(0), layer(x)))[1]


def attention(layer, x):
    q = layer(x).view(-1, 1, 2, 4)
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + i * 0.1).reshape(-1, 8)


class Backbone(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.compute = compute

    def forward(self, x):
        return self.compute(self.layer, x)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "torchcache"])
@pytest.mark.parametrize("compute", [mapped, mask, forward_mode, gradient, branches, loops, attention])
def test_in_a_compiled_model(compute, backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    twin = Backbone(compute).eval().requires_grad_(False)
    module, data = copy.deepcopy(twin), torch.randn(9, 8)
    torchcache.mark(module)
    options = {"options": {"inner": "aot_eager"}} if backend == "torchcache" else {}
    run = torch.compile(nn.Sequential(module, nn.ReLU()), backend=backend, **options)
    for rows in ([0, 1, 2, 3], [3, 1, 7], [7, 0, 2, 1], [8, 4, 5, 6], [1, 0, 3]):
        with torch.no_grad():
            torch.testing.assert_close(run(data[rows]), torch.relu(twin(data[rows])))
    if compute in (branches, loops, attention) and not hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        return  # this torch runs such operators under no mode, so what they compute is never found to be row-wise
    assert torchcache.stats(module).hits >= 8
