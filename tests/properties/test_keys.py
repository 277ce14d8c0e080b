"""What decides whether a row hits: its content, and nothing about its batch."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import torchcache

POOL = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
fast = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

batches = st.lists(st.lists(st.integers(0, 11), min_size=0, max_size=9), min_size=1, max_size=8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = 2
        self.names = ["a"]
        self.requires_grad_(False).eval()

    def forward(self, x, shift=0):
        return torch.tanh(self.norm(self.linear(x))) * self.scale + shift


@fast
@given(batches)
def test_any_composition_of_batches_computes_each_row_once(batches):
    plain = Net()
    module = torchcache.mark(copy.deepcopy(plain))
    seen = set()
    for rows in batches:
        x = POOL[rows]
        torch.testing.assert_close(module(x), plain(x))
        seen |= set(rows)
        assert torchcache.stats(module).misses == len(seen)


TRANSFORMED = None


@fast
@given(batches)
def test_the_same_through_transform(batches):
    # One traced model for all examples: its rows are told apart by a column that the example sets.
    global TRANSFORMED
    if TRANSFORMED is None:
        plain = Net()
        model = nn.Sequential(torchcache.mark(copy.deepcopy(plain)), nn.Identity())
        TRANSFORMED = plain, torchcache.transform(model), [0]
    plain, model, example = TRANSFORMED
    example[0] += 1
    seen = set()
    before = 0
    if torchcache.stats(model).regions:
        before = torchcache.stats(model).misses
    for rows in batches:
        x = POOL[rows] + example[0]
        torch.testing.assert_close(model(x), plain(x))
        seen |= set(rows)
    assert torchcache.stats(model).misses - before == len(seen) if seen else True


def changes():
    """Every way to change what a call computes, each with a call of its own."""

    def weight(module):
        with torch.no_grad():
            module.linear.weight[0, 0] += 1e-6

    def buffer(module):
        module.norm.running_var.mul_(1.001)

    def attribute(module):
        module.scale = 3

    def nested(module):
        module.names.append("b")

    def submodule_attribute(module):
        module.norm.eps = 1e-3

    def mode(module):
        module.half().float()

    yield from (weight, buffer, attribute, nested, submodule_attribute, mode)


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("door", ["eager", "transform"])
def test_any_change_of_the_program_is_a_miss(change, door):
    module = torchcache.mark(Net())
    run = torchcache.transform(nn.Sequential(module, nn.Identity())) if door == "transform" else module
    plain = torchcache.unmark(copy.deepcopy(module))
    run(POOL)
    change(module)
    change(plain)
    torch.testing.assert_close(run(POOL), plain(POOL), rtol=0, atol=1e-7)
    # What forward does not read is no part of the key.
    assert (torchcache.stats(module).hits > 0) == (change.__name__ == "nested")


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_any_change_of_the_call_is_a_miss(door):
    module = torchcache.mark(Net())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x, shift=0):
            return self.module(x, shift)

    run = torchcache.transform(Outer()) if door == "transform" else module
    calls = [
        lambda: run(POOL),
        lambda: run(POOL, 1),
        lambda: run(POOL, 1.0),
        lambda: run(POOL, True),
        lambda: run(POOL.clone(), torch.tensor(1)),
        lambda: run(POOL + 0.0, torch.tensor([1.0])),
    ]
    for call in calls:
        call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(POOL)
    with torch.autocast("cpu", dtype=torch.float16):
        run(POOL)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision  # not what "highest" sets, which is part of the key as well
    torch.set_float32_matmul_precision("high")
    try:
        run(POOL)
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    assert torchcache.stats(module).hits == 0
    assert torchcache.stats(module).misses == 12 * (len(calls) + 3)


leaves = st.sampled_from(["x", "double", "ints", None, 3, "text", True])
structures = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["b", "a", "c d", 1]), inner, max_size=3)
    ),
    max_leaves=8,
)


def build(structure, x):
    if isinstance(structure, list):
        return [build(item, x) for item in structure]
    if isinstance(structure, tuple):
        return tuple(build(item, x) for item in structure)
    if isinstance(structure, dict):
        return {key: build(item, x) for key, item in structure.items()}
    made = {"x": lambda: x * 1, "double": lambda: x[:, 0].double(), "ints": lambda: x.long()}
    return made[structure]() if isinstance(structure, str) and structure in made else structure


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            assert_same(*pair)
    else:
        assert got == expected


@fast
@given(structures)
def test_any_structure_of_outputs_comes_back(structure):
    def forward(x):
        return {"features": x + 1, "rest": build(structure, x)}

    features = torchcache.torchcache(forward)
    for rows in ([0, 1, 2], [2, 2, 0], [1, 5]):
        assert_same(features(POOL[rows]), forward(POOL[rows]))
    assert torchcache.stats(features).misses == 4


@fast
@given(structures)
def test_any_structure_of_inputs_is_told_apart(structure):
    @torchcache.torchcache
    def features(x, rest):
        return x * 2

    x = POOL[:4]
    features(x, build(structure, x))
    features(x, build(structure, x))
    assert torchcache.stats(features).hits == 4
    features(x, [build(structure, x)])
    features(x, {"k": build(structure, x)})
    assert torchcache.stats(features).hits == 4
