"""The library with models and data on a device; ``test_standin.py`` runs it, and ``tox -e cuda``.

The device is what ``$TORCHCACHE_TEST_DEVICE`` says: the stand-in, on which all that crosses is counted, or "cuda".
"""

import contextlib
import copy
import gc
import math
import os
import time
from typing import NamedTuple
from unittest import mock

import harness
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from standin import Counted, open_device, room
from test_cut import Blocks, trains
from test_programs import AS_DRAWN, programs, runs
from torch import nn

import torchcache
from torchcache import streams
from torchcache.digest.ahead import prepared
from torchcache.identity import content, record
from torchcache.loading import remembered
from torchcache.regions import regions_in
from torchcache.store import near, slab, tiers
from torchcache.store.tiers import Tiers

KIND = os.environ.get("TORCHCACHE_TEST_DEVICE", "standin")
DEVICE = open_device() if KIND == "standin" else torch.device(KIND, 0)
counted = pytest.mark.skipif(KIND != "standin", reason="only the stand-in counts")
WIDTH = 32
DIGEST, ANSWER = 16, 8  # bytes that cross: for a row, and for whether the state changed


@pytest.fixture(autouse=True)
def ordered():
    """Whatever runs: no two streams use the same memory at once."""
    near._devices.clear()  # which remembers that it was short of memory
    yield
    torchcache.flush()
    assert KIND != "standin" or not torch.ops.standin.races()


class Named(NamedTuple):
    tensor: torch.Tensor
    text: str


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


def opened(door, net):
    if door == "transform":
        return torchcache.transform(net)
    return torch.compile(net, backend="torchcache", options={"inner": door}) if "eager" in door else net


def compare(run, twin, *given):
    found, expected = run(*given), twin(*given)
    assert found.device == expected.device
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("memory", ["cpu", "auto"])
@pytest.mark.parametrize("door", ["call", "transform", "eager", "aot_eager"])
def test_rows_are_found_and_come_back_where_they_belong(door, memory, tmp_path):
    net, twin = nets(memory_cache_device=memory, persistent=True, persistent_cache_dir=str(tmp_path))
    run, x = opened(door, net), torch.randn(12, 6).to(DEVICE)
    for rows in (range(6), [3, 7, 8], [*range(8), 11, 0], [9, 10, 11], [5], range(12)):
        compare(run, twin, x[[*rows]])
    stats = torchcache.stats(net)
    assert (stats.misses, stats.bypasses) == (12, 0)
    torchcache.flush()
    other, _ = nets(memory_cache_device=memory, persistent=True, persistent_cache_dir=str(tmp_path))
    compare(other, twin, x)
    assert sum(region.disk_hits for region in torchcache.stats(other).regions) == 12


@counted
@pytest.mark.parametrize(("memory", "to_device"), [("cpu", 12 * WIDTH * 4), ("auto", 12 * 8)])
@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("door", ["call", "transform", "aot_eager"])
def test_of_a_batch_that_hits_only_digests_cross(door, memory, to_device, inputs, monkeypatch):
    net, twin = nets(memory_cache_device=memory)
    run = opened(door, net)
    given = [torch.randn(12, 6).to(DEVICE) for _ in range(inputs)]
    monkeypatch.setattr(record, "SHARE", 0.0)  # a look at a whole weight is 16 bytes more
    for _ in range(4):
        compare(run, twin, *given)
    with Counted() as crossed:
        run(*given)
    assert crossed.to_host == 12 * DIGEST * inputs + ANSWER
    assert crossed.to_device == to_device  # the rows, or their places
    assert crossed.waits == 1


@pytest.mark.skipif(KIND == "cuda" and torch.cuda.device_count() < 2, reason="there is one device")
@pytest.mark.parametrize("memory", ["cpu", "auto"])
@pytest.mark.parametrize("door", ["call", "aot_eager"])
def test_rows_come_back_on_the_device_that_is_asked(door, memory, tmp_path):
    net, twin = nets(memory_cache_device=memory, persistent=True, persistent_cache_dir=str(tmp_path))
    run = torch.compile(net, backend="torchcache", options={"inner": door}) if door != "call" else net
    x = torch.randn(12, 6)
    for place in (0, 1, 0, 1, 1):
        device = torch.device(KIND, place)
        compare(run.to(device), twin.to(device), x.to(device))
    assert torchcache.stats(net).misses + torchcache.stats(net).hits == 60


def train_on_streams(door, memory, directory):
    """Steps on streams that do not wait for each other, whose tensors are used again; then another process's."""
    net, twin = nets(memory_cache_device=memory, persistent=True, persistent_cache_dir=str(directory))
    body, x, found = opened(door, net.body), torch.randn(40, 6), []
    places = [torch.Stream(DEVICE), torch.accelerator.current_stream(DEVICE), torch.Stream(DEVICE)]
    torch.accelerator.synchronize(DEVICE)
    for step in range(24):
        rows = torch.randperm(40)[:10].tolist()
        with places[step % 3]:
            given = x[rows].pin_memory().to(DEVICE, non_blocking=True)
            own = body(given)
            found.append((rows, own.clone()))
            given.zero_()
            own.zero_()
    torch.accelerator.synchronize(DEVICE)
    for rows, outputs in found:
        torch.testing.assert_close(outputs, twin.body(x[rows].to(DEVICE)), atol=1e-5, rtol=1e-5)
    torchcache.flush()
    other, _ = nets(memory_cache_device=memory, persistent=True, persistent_cache_dir=str(directory))
    compare(other, twin, x.to(DEVICE))
    assert torchcache.stats(other).misses == 40 - torchcache.stats(net).misses


@pytest.mark.parametrize("memory", ["cpu", "auto"])
@pytest.mark.parametrize("door", ["call", "aot_eager"])
def test_steps_on_streams_of_their_own(door, memory, tmp_path):
    train_on_streams(door, memory, tmp_path)


def rows_used_before_another_stream_is_done(patch):
    patch.setattr(near, "follow", lambda tensors, stream: torch.accelerator.current_stream(stream.device))


def rows_brought_before_they_are_computed(patch):
    @contextlib.contextmanager
    def at_once(device):
        with streams._side(device) as side:
            yield side

    patch.setattr(streams, "beside", at_once)


def rows_used_before_they_are_brought(patch):
    class Hasty(torch.Event):
        def synchronize(self):
            pass

    patch.setattr(torch, "Event", Hasty)


def rows_brought_from_where_they_are_used(patch):
    bring = streams.bring_behind

    def shared(tensors):
        with mock.patch.object(torch.Tensor, "clone", lambda self, **how: self):
            wait = bring(tensors)
        return lambda: (time.sleep(0.05), wait())[1]

    patch.setattr(tiers, "bring_behind", shared)


def rows_sent_from_where_others_are_gathered(patch):
    made, pinned = {}, streams.pinned

    def again(shape, dtype):
        if (shape, dtype) not in made:
            made[shape, dtype] = pinned(shape, dtype)
        return made[shape, dtype]

    patch.setattr(slab, "pinned", again)


SLIPS = (
    rows_used_before_another_stream_is_done,
    rows_brought_before_they_are_computed,
    rows_used_before_they_are_brought,
    rows_brought_from_where_they_are_used,
    rows_sent_from_where_others_are_gathered,
)


@counted
@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.__name__)
def test_a_planted_slip_is_found(slip, tmp_path, monkeypatch):
    slip(monkeypatch)
    wrong = None
    try:
        train_on_streams("call", "auto" if slip is SLIPS[0] else "cpu", tmp_path)
    except AssertionError as error:
        wrong = error
    torchcache.flush()
    assert wrong or torch.ops.standin.races()
    torch.ops.standin.races()


@pytest.mark.parametrize("memory", ["cpu", "auto"])
@pytest.mark.parametrize("own_stream", [False, True])
def test_batches_that_are_moved_ahead(own_stream, memory, tmp_path, monkeypatch):
    options = {"memory_cache_device": memory, "persistent": True, "persistent_cache_dir": str(tmp_path)}
    (net, twin), x = nets(**options), torch.randn(48, 6)
    data = [{"x": [rows], "named": Named(rows[:, :1].clone(), "text")} for rows in x.split(8)]
    compare(net, twin, x.to(DEVICE))
    torchcache.flush()
    before = torch.accelerator.current_stream(DEVICE)
    stream = torch.Stream(DEVICE) if own_stream else before
    net, _ = nets(**options)
    stream.wait_stream(before)
    loader = torchcache.prefetch(data, DEVICE if own_stream else DEVICE.type)
    for epoch in range(3):
        found = []
        with stream:
            for batch in loader:
                assert batch["named"].tensor.device == batch["x"][0].device == DEVICE
                found.append(net(batch["x"][0]))
                if epoch == 2:
                    assert prepared(*regions_in(net)) is not None
                batch["x"][0].zero_()
        before.wait_stream(stream)
        torch.testing.assert_close(torch.cat(found), twin(x.to(DEVICE)), atol=1e-5, rtol=1e-5)
    assert (torchcache.stats(net).hits, torchcache.stats(net).misses) == (144, 0)
    assert torch.equal(torch.cat([batch["x"][0] for batch in data]), x)


@pytest.mark.parametrize("memory", ["cpu", "auto"])
def test_rows_that_are_on_their_way_to_memory_are_found(memory, monkeypatch):
    net, twin = nets(memory_cache_device=memory)
    keep = Tiers._keep
    monkeypatch.setattr(Tiers, "_keep", lambda self, *given: (time.sleep(0.2), keep(self, *given)))
    x = torch.randn(12, 6).to(DEVICE)
    for rows in (range(6), range(6), [4, 7, 8], [8, 7]):
        compare(net, twin, x[[*rows]])
    assert torchcache.stats(net).misses == 8


def test_rows_that_arrive_while_memory_is_asked_are_found(monkeypatch):
    net, twin = nets()
    keep, take = Tiers._keep, Tiers._take
    monkeypatch.setattr(Tiers, "_keep", lambda self, *given: (time.sleep(0.2), keep(self, *given)))
    monkeypatch.setattr(Tiers, "_take", lambda self, *given: (take(self, *given), torchcache.flush()))
    x = torch.randn(12, 6).to(DEVICE)
    for _ in range(2):
        compare(net, twin, x)
    assert torchcache.stats(net).misses == 12


@pytest.mark.parametrize("enough", [False, True])
def test_filling_ahead_says_when_memory_is_full(enough, caplog):
    net, _ = nets(Wide, max_memory_cache_size=4096 * (64 if enough else 20))
    x = torch.randn(64, 6).to(DEVICE)
    torchcache.warm(net, x.split(8))
    assert ("is full" in caplog.text) is not enough
    assert torchcache.stats(net).regions[0].memory_bytes == 4096 * (64 if enough else 20)


def test_a_device_without_room_for_what_is_to_be_stored(monkeypatch):
    net, twin = nets()
    x = torch.randn(12, 6).to(DEVICE)

    def full(tensors):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tiers, "bring_behind", full)
        compare(net, twin, x)
    for _ in range(2):
        compare(net, twin, x)
    assert (torchcache.stats(net).misses, torchcache.stats(net).bypasses) == (24, 0)


class Wide(Net):
    """Rows of 4 KB."""

    def __init__(self):
        super().__init__()
        self.body.append(nn.Linear(WIDTH, 1024).requires_grad_(False))
        self.head = nn.Linear(1024, 3)


@counted
def test_rows_on_the_device_take_their_share_of_what_is_free_and_no_more():
    net, twin = nets(Wide, memory_cache_device="auto", memory_device_share=0.25)
    x = torch.randn(4096, 6).to(DEVICE)
    for rows in x.split(64):
        compare(net, twin, rows)
    with room(24 << 20):
        before = torch.ops.standin.count("held")
        for rows in x.split(64):
            compare(net, twin, rows)
        taken = torch.ops.standin.count("held") - before
        assert 2 << 20 <= taken <= 6 << 20  # 16 MB do not fit into a quarter of 24
        for rows in x.split(64):
            compare(net, twin, rows)
        assert torch.ops.standin.count("held") - before == taken
    assert torchcache.stats(net).misses == 4096


@counted
@pytest.mark.parametrize("models", [1, 2])
def test_rows_leave_the_device_when_its_memory_is_needed(models, monkeypatch):
    monkeypatch.setattr(near, "LOOK_SECONDS", 0.0)
    both = [nets(Wide, memory_cache_device="auto") for _ in range(models)]
    x = torch.randn(2048, 6).to(DEVICE)
    for net, twin in both:
        for _ in range(2):
            for rows in x.split(64):
                compare(net, twin, rows)
    with Counted() as crossed:
        both[0][0](x[:64])
    assert crossed.to_device == 64 * 8
    with room(4 << 20):
        before = torch.ops.standin.count("held")
        compare(*both[0], x[:64])
        assert torch.ops.standin.count("held") <= before - models * (7 << 20)
        wanted = torch.zeros(4 << 20, dtype=torch.uint8).to(DEVICE)
        for net, twin in both:
            compare(net, twin, x[64:128])
        del wanted
    for net, twin in both:
        for _ in range(2):
            for rows in x.split(64):
                compare(net, twin, rows)
        assert torchcache.stats(net).misses == 2048


@counted
def test_a_step_that_ran_out_of_memory_can_be_tried_again(monkeypatch):
    monkeypatch.setattr(near, "LOOK_SECONDS", 0.0)
    net, twin = nets(Wide, memory_cache_device="auto")
    x = torch.randn(2048, 6).to(DEVICE)
    for _ in range(2):
        for rows in x.split(64):
            compare(net, twin, rows)
    with room(20 << 20):

        def step():
            found = net(x[:64])
            large = torch.empty(24 << 20, dtype=torch.uint8, device=DEVICE)
            return found, large

        with pytest.raises(torch.OutOfMemoryError):
            step()
        torch.testing.assert_close(step()[0], twin(x[:64]), atol=1e-5, rtol=1e-5)
    assert torchcache.stats(net).misses == 2048


@counted
def test_rows_leave_the_device_with_their_model():
    x = torch.randn(2048, 6).to(DEVICE)
    held = []
    for _ in range(3):
        net, twin = nets(Wide, memory_cache_device="auto")
        for _ in range(2):
            for rows in x.split(64):
                compare(net, twin, rows)
        del net, twin
        gc.collect()
        held.append(torch.ops.standin.count("held"))
    assert len(set(held)) == 1
    assert all(device.held == 0 for device in near._devices.values())


@runs(30, AS_DRAWN)
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), max_size=20), st.floats(0, 0.3))
def test_any_batches_in_any_room(batches, share):
    net, twin = nets(Wide, memory_cache_device="auto", memory_device_share=share)
    x = torch.randn(41, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with mock.patch.object(near, "FIRST_SLOTS", 4):
        for rows in batches:
            with room(1 << 20) if KIND == "standin" and len(rows) % 3 == 0 else contextlib.nullcontext():
                found = net.body(x[rows])
            torch.testing.assert_close(found, twin.body(x[rows]), atol=1e-5, rtol=1e-5)


@counted
def test_where_ids_are_given_nothing_of_the_batch_crosses(monkeypatch):
    monkeypatch.setattr(record, "SHARE", 0.0)
    net, _ = nets(memory_cache_device="auto")
    x = torch.randn(12, 6).to(DEVICE)
    for _ in range(3):
        with Counted() as crossed, torchcache.sample_keys(range(12)):
            net(x)
    assert (crossed.to_host, crossed.waits) == (ANSWER, 1)


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


def test_a_write_to_one_element_is_found_in_time(monkeypatch):
    monkeypatch.setattr(record, "SHARE", math.inf)
    net, twin = nets(Wide)
    x = torch.randn(12, 6).to(DEVICE)
    compare(net, twin, x)
    for each in (net, twin):
        each.body[-1].weight.data[500, 7] += 1
    for _ in range(len(list(net.body.parameters()))):
        net(x)
    compare(net, twin, x)


@pytest.mark.skipif(KIND != "cuda", reason="only CUDA has graphs")
@pytest.mark.parametrize("backend", ["inductor", "torchcache"])
def test_what_follows_a_mark_runs_as_a_graph_of_cuda(backend):
    net, twin = nets()
    run = torch.compile(net, backend=backend, mode="reduce-overhead")
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(12, 6).to(DEVICE)
        compare(run, twin, x)
        compare(run, twin, x)
    assert torchcache.stats(net).hits >= 12


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64, torch.int64]
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (40, 33), (2, 0)])
def test_tensors_that_are_hashed_together_have_the_contents_that_each_has(dtype, shape, monkeypatch):
    monkeypatch.setattr(content, "TOGETHER", 3 * 40 * 33 * 4)
    tensors = [torch.randint(0, 2, shape).to(dtype).to(DEVICE) for _ in range(8)]
    tensors += [tensors[0], tensors[1].clone(), torch.ones(4, dtype=dtype).to(DEVICE)]
    if len(shape) == 2:
        tensors += [tensor.T for tensor in tensors[:2]] + [torch.ones(shape[::-1], dtype=dtype).to(DEVICE)]
    if dtype.is_complex and KIND != "standin":  # which cannot do that
        tensors += [tensor.conj() for tensor in tensors[:2]]
    assert content.contents_of(tensors) == [content.start_content(tensor)() for tensor in tensors]


@counted
def test_the_state_does_not_cross():
    net, _ = nets(Wide)
    x = torch.randn(12, 6).to(DEVICE)
    with Counted() as crossed:
        net.body(x)
    assert crossed.to_host < net.body[-1].weight.nbytes // 2


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


def test_rows_of_the_first_epoch_are_found_by_what_the_loader_remembers(monkeypatch):
    monkeypatch.setattr(remembered, "CHEAP", 0.0)
    torch.manual_seed(0)
    twin = nn.Linear(600, WIDTH).requires_grad_(False).to(DEVICE)
    net = torchcache.mark(copy.deepcopy(twin), audit=0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 600), torch.arange(64))
    loader = torchcache.DataLoader(data, batch_size=8, shuffle=True)
    for _ in range(4):
        for x, places in loader:
            found = net(x.to(DEVICE))
            torch.testing.assert_close(found, twin(data.tensors[0][places].to(DEVICE)), atol=1e-5, rtol=1e-5)
    assert torchcache.stats(net).misses <= 64 + 8  # the first batch is looked at as a whole


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
