"""The library with models and data on a device; ``test_standin.py`` runs it, and ``tox -e cuda``.

The device is what ``$TORCHCACHE_TEST_DEVICE`` says: the stand-in, on which all that crosses is counted, or "cuda".
"""

import copy
import os

import harness
import pytest
import torch
from hypothesis import given
from standin import Counted, open_device
from test_cut import Blocks, trains
from test_programs import AS_DRAWN, programs, runs
from torch import nn

import torchcache

KIND = os.environ.get("TORCHCACHE_TEST_DEVICE", "standin")
DEVICE = open_device() if KIND == "standin" else torch.device(KIND, 0)
counted = pytest.mark.skipif(KIND != "standin", reason="only the stand-in counts")
WIDTH = 32
DIGEST, ANSWER = 16, 1  # bytes that cross: for a row, and for whether the state changed


class Body(nn.Sequential):
    def forward(self, *parts):
        return super().forward(sum(parts))


class Net(nn.Module):
    """A frozen body, and a head."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(6, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, WIDTH)
        self.body, self.head = Body(*layers).eval().requires_grad_(False), nn.Linear(WIDTH, 3)

    def forward(self, *parts):
        return self.head(self.body(*parts))


def nets(kind=Net, **options):
    torch.manual_seed(0)
    twin = kind().to(DEVICE)
    net = copy.deepcopy(twin)
    torchcache.mark(net.body, audit=0, **options)
    return net, twin


def compare(run, twin, *given):
    found, expected = run(*given), twin(*given)
    assert found.device == expected.device
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("memory", ["cpu", None])
@pytest.mark.parametrize("door", ["call", "transform", "eager", "aot_eager"])
def test_rows_are_found_and_come_back_where_they_belong(door, memory, tmp_path):
    net, twin = nets(memory_cache_device=memory, persistent=True, persistent_cache_dir=str(tmp_path))
    run = torchcache.transform(net) if door == "transform" else net
    if "eager" in door:
        run = torch.compile(net, backend="torchcache", options={"inner": door})
    x = torch.randn(12, 6).to(DEVICE)
    for rows in (range(6), [3, 7, 8], [*range(8), 11, 0], [9, 10, 11], [5], range(12)):
        compare(run, twin, x[[*rows]])
    stats = torchcache.stats(net)
    assert (stats.misses, stats.bypasses) == (12, 0)
    torchcache.flush()
    other, _ = nets(memory_cache_device=memory, persistent=True, persistent_cache_dir=str(tmp_path))
    compare(other, twin, x)
    assert sum(region.disk_hits for region in torchcache.stats(other).regions) == 12


@counted
@pytest.mark.parametrize(("memory", "to_device"), [("cpu", 12 * WIDTH * 4), (None, 12 * 8)])
@pytest.mark.parametrize("inputs", [1, 3])
def test_of_a_batch_that_hits_only_digests_cross(memory, to_device, inputs):
    net, twin = nets(memory_cache_device=memory)
    given = [torch.randn(12, 6).to(DEVICE) for _ in range(inputs)]
    for _ in range(3):
        compare(net, twin, *given)
    with Counted() as crossed:
        net(*given)
    assert crossed.to_host == 12 * DIGEST * inputs + ANSWER
    assert crossed.to_device == to_device  # the rows, or their places
    assert crossed.waits == 2


@pytest.mark.skipif(KIND == "cuda" and torch.cuda.device_count() < 2, reason="there is one device")
@pytest.mark.parametrize("memory", ["cpu", None])
@pytest.mark.parametrize("door", ["call", "aot_eager"])
def test_rows_come_back_on_the_device_that_is_asked(door, memory, tmp_path):
    net, twin = nets(memory_cache_device=memory, persistent=True, persistent_cache_dir=str(tmp_path))
    run = torch.compile(net, backend="torchcache", options={"inner": door}) if door != "call" else net
    x = torch.randn(12, 6)
    for place in (0, 1, 0, 1, 1):
        device = torch.device(KIND, place)
        compare(run.to(device), twin.to(device), x.to(device))
    assert torchcache.stats(net).misses + torchcache.stats(net).hits == 60


@counted
def test_where_ids_are_given_nothing_of_the_batch_crosses():
    net, _ = nets(memory_cache_device=None)
    x = torch.randn(12, 6).to(DEVICE)
    for _ in range(3):
        with Counted() as crossed, torchcache.sample_keys(range(12)):
            net(x)
    assert crossed.to_host == ANSWER


@pytest.mark.parametrize("strong", [False, True])
def test_the_strong_digest_is_the_hosts(strong):
    if strong:
        pytest.importorskip("blake3")
    net, twin = nets(digest="blake3" if strong else "xxh3_128")
    x = torch.randn(12, 6).to(DEVICE)
    for _ in range(2):
        compare(net, twin, x)
    assert torchcache.stats(net).hits == 12


@pytest.mark.parametrize("write", ["add_", "data"])
@pytest.mark.parametrize("layer", ["3.weight", "2.bias"])
def test_a_write_to_a_weight_is_seen(write, layer):
    net, twin = nets()
    x = torch.randn(12, 6).to(DEVICE)
    for _ in range(2):
        compare(net, twin, x)
    for each in (net, twin):
        weight = each.body.get_parameter(layer)
        with torch.no_grad():
            (weight.data if write == "data" else weight).add_(1)
    compare(net, twin, x)
    assert torchcache.stats(net).hits == 12


@pytest.mark.parametrize("kind", [Blocks, trains("value")])
@pytest.mark.parametrize("door", ["call", "aot_eager"])
def test_partly_trained_models(kind, door):
    torch.manual_seed(0)
    twin = kind().train().to(DEVICE)
    model = torchcache.mark(copy.deepcopy(twin), audit=0)
    run = model if door == "call" else torch.compile(model, backend="torchcache", options={"inner": door})
    ids, mask = torch.randint(1, 20, (8, 5)), torch.rand(8, 5) > 0.2
    mask[:, 0] = True
    ids, mask = ids.to(DEVICE), mask.long().to(DEVICE)
    labels = torch.arange(8) % 3
    for rows in (range(6), [7, 3], range(8), range(8)):
        found, expected = run(ids[[*rows]], mask[[*rows]]), twin(ids[[*rows]], mask[[*rows]])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for outputs in (found, expected):
            nn.functional.cross_entropy(outputs, labels[[*rows]].to(DEVICE)).backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    assert torchcache.stats(model).misses == 8


@pytest.mark.parametrize("options", [{"cache_dtype": torch.int8}, {"cache_dtype": torch.bfloat16}])
def test_rows_in_another_precision(options):
    net, twin = nets(**options)
    x = torch.randn(12, 6).to(DEVICE)
    for _ in range(3):
        found, expected = net(x), twin(x)
        assert found.device == expected.device
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert torchcache.stats(net).hits == 24


def test_samples_that_are_not_loaded():
    net, twin = nets()
    samples = torch.utils.data.TensorDataset(torch.randn(24, 6, 64).mean(2), torch.arange(24))
    wide = torch.utils.data.TensorDataset(torch.randn(24, 600), torch.arange(24))
    for data in (samples, wide):
        loader = torchcache.DataLoader(data, batch_size=8, shuffle=True)
        for _ in range(3):
            for x, _ in loader:
                compare(net, twin, x.to(DEVICE)[:, :6])


@runs(15, AS_DRAWN)
@given(programs("eager", 14))
def test_programs_of_marked_modules(program):
    harness.execute(program, device=DEVICE)


@runs(4, AS_DRAWN)
@given(programs("transform", 10))
def test_programs_of_transformed_models(program):
    harness.execute(program, device=DEVICE)


@runs(4, AS_DRAWN)
@given(programs("compile", 10))
def test_programs_of_compiled_models(program):
    harness.execute(program, device=DEVICE)
