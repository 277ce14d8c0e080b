"""Outputs that are views of each other: what is written to one shows in the others, on hits and in graphs, too."""

import copy

import pytest
import torch
from torch import nn

import torchcache

WRITTEN = ("tokens", "class", "flat", "patches", "steps")
ROWS = ([0, 1, 2, 3], [3, 1, 7], [7, 0], [5, 6], [8, 5, 4, 2, 6], [1, 0, 3])


class Views(nn.Module):
    """Tokens, and parts of them, as encoders return them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x):
        t = self.body(x)
        return {
            "class": t[:, 0],
            "tokens": t,
            "patches": t[:, 1:],
            "again": t,
            "steps": t.transpose(0, 1)[1:],
            "flat": t.flatten(1),
            "first": t[:, :1].expand(-1, 3, -1),
            "windows": t.unfold(1, 2, 1),
            "part": t[:, 2, 1],
            "own": t + 1,
        }


class Writes(nn.Module):
    """Triples one output; returns all."""

    def __init__(self, backbone, written):
        super().__init__()
        self.backbone = backbone
        self.written = written

    def forward(self, x):
        outputs = self.backbone(x)
        if self.written:
            outputs[self.written].mul_(3)
        return dict(outputs)


def check(run, twin, data, rows, **close):
    got, expected = run(data[rows]), twin(data[rows])
    assert list(got) == list(expected)
    for name, leaf in expected.items():
        torch.testing.assert_close(got[name], leaf, **close)


ROUNDED = {"cache_dtype": torch.bfloat16}
SCALED = {"cache_dtype": torch.int8}


@pytest.mark.parametrize("options", [{}, {"persistent": True}, ROUNDED, SCALED], ids=str)
def test_on_hits(options, tmp_path, warnings):
    torch.manual_seed(0)
    directory = {"persistent_cache_dir": str(tmp_path)} if options.get("persistent") else {}
    twin = Views().requires_grad_(False)
    module, data = torchcache.mark(copy.deepcopy(twin), **options, **directory), torch.randn(9, 3, 4)
    close = {"rtol": 0.02, "atol": 0.04} if "cache_dtype" in options else {}
    for rows in (*ROWS, [5]):
        for written in WRITTEN if options is not SCALED else ("",):
            check(Writes(module, written), Writes(twin, written), data, rows, **close)
    assert torchcache.stats(module).hits > 10
    assert not [text for text in warnings if "cached wrongly" in text]


@pytest.mark.parametrize("backend", ["eager", "torchcache"])
@pytest.mark.parametrize(("dynamic", "rounded"), [(None, {}), (True, {}), (None, ROUNDED)], ids=str)
@pytest.mark.parametrize("written", WRITTEN)
def test_in_graphs(backend, dynamic, rounded, written):
    torch.manual_seed(0)
    torch._dynamo.reset()
    twin = Writes(Views().requires_grad_(False), written)
    model, data = copy.deepcopy(twin), torch.randn(9, 3, 4)
    torchcache.mark(model.backbone, **rounded)
    options = {"options": {"inner": "aot_eager"}} if backend == "torchcache" else {}
    run = torch.compile(model, backend=backend, dynamic=dynamic, **options)
    for rows in ROWS:
        check(run, twin, data, rows, **({"rtol": 0.02, "atol": 0.04} if rounded else {}))
    assert torchcache.stats(model).hits >= 9
    assert not torchcache.stats(model).bypasses


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_with_sizes_that_vary(backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    twin = Writes(Tokens().requires_grad_(False), "class")
    model = copy.deepcopy(twin)
    torchcache.mark(model.backbone)
    run = torch.compile(model, backend=backend, dynamic=True)
    data = torch.randn(6, 5, 4)
    for length in (3, 5, 4, 3, 5):
        for rows in ([0, 1, 2], [2, 4, 3, 5]):
            check(run, twin, data[:, :length], rows)
    assert torchcache.stats(model).hits > 10


class Tokens(nn.Module):
    """Tokens, their first, and both again."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x):
        t = self.body(x)
        return {"tokens": t, "class": t[:, 0], "turned": t.transpose(1, 2), "all": t}
