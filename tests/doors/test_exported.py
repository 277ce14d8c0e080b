"""Marks on exported programs and on modules of graphs."""

import io

import pytest
import torch
from torch import fx, nn

import torchcache


class Net(nn.Module):
    """Rows ``(8,)`` to ``(4,)``, times a number that is a part of the code."""

    def __init__(self, times):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.times = times

    def forward(self, x):
        return self.body(x) * self.times


def net(times):
    torch.manual_seed(0)
    return Net(times).eval().requires_grad_(False)


def exported(times):
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},)
    return torch.export.export(net(times), (torch.randn(4, 8),), dynamic_shapes=shapes)


def loaded(times):
    file = io.BytesIO()
    torch.export.save(exported(times), file)
    file.seek(0)
    return torch.export.load(file).module()


MADE = {
    "exported": lambda times: exported(times).module(),
    "loaded": loaded,
    "traced": lambda times: fx.symbolic_trace(net(times)),
}


@pytest.fixture(params=MADE)
def make(request):
    return MADE[request.param]


def fill(module, x, **options):
    torchcache.mark(module, **options)
    for _ in range(2):
        for rows in torch.randperm(len(x)).split(4):
            module(x[rows])


def expected(module, x):
    with torchcache.bypass():
        return module(x)


def test_all_rows_are_served(make):
    module, x = make(2), torch.randn(16, 8)
    fill(module, x)
    torch.testing.assert_close(module(x), net(2)(x))
    stats = torchcache.stats(module)
    assert (stats.hits, stats.misses, stats.bypasses) == (32, 16, 0)


def test_weights_that_are_written_are_seen(make):
    module, x = make(2), torch.randn(16, 8)
    fill(module, x)
    with torch.no_grad():
        next(module.parameters()).mul_(3)
    torch.testing.assert_close(module(x), expected(module, x))


def test_numbers_in_the_code_tell_programs_apart(make, tmp_path):
    x = torch.randn(16, 8)
    for times in (2, 3, 2):
        module = make(times)
        fill(module, x, persistent=True, persistent_cache_dir=tmp_path)
        torchcache.flush()
        torch.testing.assert_close(module(x), expected(module, x))
        torch.testing.assert_close(module(x), net(times)(x))
    assert torchcache.stats(module).misses == 0


def test_a_graph_that_is_edited_is_another_program():
    module, x = fx.symbolic_trace(net(2)), torch.randn(16, 8)
    fill(module, x)
    (product,) = (node for node in module.graph.nodes if node.op == "call_function")
    product.args = (product.args[0], 5)
    torch.testing.assert_close(module(x), net(2)(x))  # until its code is made anew
    module.recompile()
    torch.testing.assert_close(module(x), net(2)(x) / 2 * 5)
