"""Releases of torch whose graphs hold less: the call is looked up between two graphs. Their lack is simulated."""

import pytest
import torch
from torch import nn

import torchcache
from torchcache import dynamo

BACKENDS = ["eager", "aot_eager", "torchcache"]


class Telling(nn.Module):
    """Returns more than tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return {"rows": self.linear(x), "none": None}


class Partly(nn.Module):
    """Its last layer trains."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)

    def forward(self, x):
        return {"rows": self.top(self.body(x).tanh())}


class Net(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.backbone(x)["rows"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["frozen", "partly"])
def test_outputs_gradients_and_hits_are_the_same(kind, backend, monkeypatch):
    monkeypatch.setattr(dynamo, "passes_structures", lambda: False)
    monkeypatch.setattr(dynamo, "names_parts", lambda: False)
    said = []
    monkeypatch.setattr(torchcache.logging.logger, "info", lambda text, *_: said.append(text))
    backbone = Telling().requires_grad_(False) if kind == "frozen" else Partly()
    plain = Net(backbone)
    x = torch.randn(8, 6)
    expected = plain(x).detach()
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(plain(x).sum(), trained)
    torchcache.mark(backbone)
    options = {"inner": "aot_eager"} if backend == "torchcache" else None
    run = torch.compile(plain, backend=backend, options=options)
    for _ in range(3):
        found = run(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), trained), gradients)
    assert torchcache.stats(plain).hits == 16
    assert sum("is looked up between two graphs" in text for text in said) == 1
