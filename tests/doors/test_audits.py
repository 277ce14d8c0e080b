"""What changes unseen is found: the first rows from disk, and a share of those served, are computed again."""

import copy
import random
import sqlite3

import pytest
import torch
from marked import counts, unmarked
from torch import nn

import torchcache

LIBRARY = torch.library.Library("torchcache_audits", "FRAGMENT")
LIBRARY.define("scale(Tensor x) -> Tensor")


@torch.library.impl(LIBRARY, "scale", "CompositeExplicitAutograd")
def scale(x):
    return x * 2.0


@torch.library.register_fake("torchcache_audits::scale", lib=LIBRARY)
def fake_scale(x):
    return torch.empty_like(x)


class Scaled(nn.Module):
    """Calls a kernel, which no analysis of Python can read."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return torch.ops.torchcache_audits.scale(self.linear(x))


CALLS = []


class Counted(nn.Linear):
    def forward(self, x):
        CALLS.append(len(x))
        return super().forward(x)


def build(tmp_path=None, **options):
    torch.manual_seed(0)
    if tmp_path is not None:
        options |= {"persistent": True, "persistent_cache_dir": tmp_path}
    return torchcache.mark(Scaled(), freeze=True, **options)


class OtherKernel:
    """Replaces the kernel of ``scale`` within a block, past the way that Python code goes by."""

    def __enter__(self):
        self.library = torch.library.Library("torchcache_audits", "IMPL")
        self.library.m.impl("scale", "CPU", lambda x: x * 3.0, False)

    def __exit__(self, *error):
        self.library._destroy()


def region(module):
    (found,) = torchcache.stats(module).regions
    return found


def stored(directory):
    """Rows in the databases of a directory."""
    count = 0
    for path in directory.rglob("cache.db"):
        connection = sqlite3.connect(path)
        count += connection.execute("SELECT COUNT(*) FROM Cache WHERE size > 0").fetchone()[0]
        connection.close()
    return count


def test_a_kernel_that_is_replaced_within_a_run_is_found(warnings):
    module = build(audit=0.5)
    x = torch.randn(8, 4)
    for _ in range(4):
        torch.testing.assert_close(module(x), 2 * module.linear(x))
    with OtherKernel():
        for _ in range(300):
            if region(module).alarms:
                break
            module(x)
        assert region(module).alarms == 1
        (text,) = [text for text in warnings if "cached wrongly" in text]
        assert "output 0 of a row differs by 0.33" in text
        hits = region(module).hits
        for _ in range(3):  # emptied, and computed anew
            torch.testing.assert_close(module(x), 3 * module.linear(x))
        assert region(module).hits > hits


def test_a_change_from_run_to_run_is_found_in_the_first_call(tmp_path, warnings):
    first, x = build(tmp_path, audit=0), torch.randn(8, 4)
    first(x)
    torchcache.flush()
    assert counts(build(tmp_path, audit=0)) == (0, 0)
    with OtherKernel():
        again = build(tmp_path, audit=0)  # the first rows from disk are compared whatever the share
        torch.testing.assert_close(again(x), 3 * again.linear(x))
        assert region(again).alarms == 1
        assert sum("cached wrongly" in text for text in warnings) == 1
        torch.testing.assert_close(again(x), 3 * again.linear(x))
        torchcache.flush()
        for disk_hits in (0, 8):  # what is wrong is gone from disk, and who found it put nothing there
            later = build(tmp_path, audit=0)
            torch.testing.assert_close(later(x), 3 * later.linear(x))
            assert (region(later).alarms, region(later).disk_hits) == (0, disk_hits)
            torchcache.flush()


def test_weights_that_change_unseen_from_run_to_run_are_found(tmp_path, monkeypatch):
    first, x = build(tmp_path, audit=0), torch.randn(8, 4)
    monkeypatch.setattr("torchcache.identity.identity.Identity.current", lambda self, tensors=None: b"the same always!")
    first(x)
    torchcache.flush()
    again = build(tmp_path, audit=0)
    again.linear.weight.data.mul_(1.5)
    for _ in range(3):
        torch.testing.assert_close(again(x), 2 * again.linear(x))
    assert region(again).alarms == 1


def test_rows_from_disk_that_are_right_are_believed(tmp_path, warnings):
    first, x = build(tmp_path), torch.randn(8, 4)
    expected = first(x)
    torchcache.flush()
    again = build(tmp_path)
    for _ in range(20):
        torch.testing.assert_close(again(x.flip(0)), expected.flip(0))
    assert (region(again).misses, region(again).disk_hits, region(again).alarms) == (0, 8, 0)
    assert warnings == []


def test_wrong_sample_ids_are_found(warnings):
    module, x = build(audit=0.5), torch.randn(8, 4)
    twin = unmarked(module)
    with torchcache.sample_keys(range(8)):
        module(x)
    for _ in range(300):
        with torchcache.sample_keys([1, 0, *range(2, 8)]):
            module(x)
        if region(module).alarms:
            break
    assert region(module).alarms >= 1
    torch.testing.assert_close(module(x), twin(x))


def test_a_region_that_is_wrong_time_and_again_is_given_up(warnings):
    module, x = build(audit=0.5), torch.randn(8, 4)
    twin = unmarked(module)
    for number in range(400):
        with torchcache.sample_keys([(row + number) % 8 for row in range(8)]):
            module(x)
    assert region(module).alarms == 3
    bypasses = region(module).bypasses
    for _ in range(3):
        torch.testing.assert_close(module(x), twin(x))
    assert region(module).bypasses == bypasses + 24
    assert sum("cached wrongly" in text for text in warnings) >= 1


@pytest.mark.parametrize("audit", [0, 0.01])
def test_audits_take_their_share_or_none(audit):
    CALLS.clear()
    module = torchcache.mark(Counted(4, 3), freeze=True, audit=audit, pure=True)
    x = torch.randn(8, 4)
    module(x)
    first = len(CALLS)
    for _ in range(50):
        module(x)
    assert counts(module) == (8, 400)
    assert (len(CALLS) > first) == bool(audit)
    # All rows of the first two calls that are served are computed.
    assert all(rows <= 2 for rows in CALLS[first + 2 :])
    assert (region(module).audit_seconds > 0) == bool(audit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_is_no_alarm(dtype, autocast):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    body = nn.Sequential(body, nn.Linear(64, 64), nn.Softmax(1)).to(dtype)
    module = torchcache.mark(body, freeze=True, audit=0.5)
    data = torch.randn(40, 3, 12, 12, dtype=dtype)
    for _ in range(60):
        rows = torch.randperm(40)[: int(torch.randint(1, 33, ()))]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            module(data[rows])
    assert region(module).alarms == 0
    assert region(module).hits > 500


class Cut(nn.Module):
    """Adds up as many elements of each row as ``lengths`` says at its place, in any number of rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.lengths = None

    def forward(self, x, lengths=None):
        lengths = self.lengths if lengths is None else lengths
        lengths = lengths.diff().tolist() if isinstance(lengths, torch.Tensor) else lengths
        ends = [len(length) if isinstance(length, str) else length for length in lengths]
        return torch.stack([row[:end].sum() for row, end in zip(self.linear(x), ends, strict=False)])


class Without(nn.Module):
    """Leaves out what is at one place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, place):
        y = self.linear(x).sum(1)
        if place < len(y):
            y[place] = 0
        return y


LENGTHS = [8] * 4 + [3] + [8] * 3 + [2] + [8] * 3 + [4] + [8] * 3
BY_PLACE = {
    "a list": (Cut, LENGTHS),
    "a list with one odd entry": (Cut, [8] * 9 + [3] + [8] * 6),
    "texts": (Cut, ["x" * length for length in LENGTHS]),
    "offsets that all rows share": (Cut, torch.tensor([0, *LENGTHS]).cumsum(0)),
    "a number": (Without, 11),
    "an attribute": (Cut, None),
}


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("name", BY_PLACE)
def test_rows_that_depend_on_their_place_are_served_to_nobody(name, shuffled, monkeypatch):
    monkeypatch.setattr("torchcache.checks.audit._random", random.Random(0))
    torch.manual_seed(0)
    kind, given = BY_PLACE[name]
    twin = kind().eval().requires_grad_(False)
    if given is None:
        twin.lengths = LENGTHS
    module = torchcache.mark(copy.deepcopy(twin))
    data = torch.randn(64, 8)
    for epoch in range(6):
        # Those in one order come to other places at the end.
        order = torch.randperm(64) if shuffled or epoch == 5 else torch.arange(64)
        for chosen in order.split(16):
            arguments = (data[chosen],) if given is None else (data[chosen], given)
            try:
                found = module(*arguments)
            except torchcache.RowwiseError:
                assert not torchcache.stats(module).hits
                return
            torch.testing.assert_close(found, twin(*arguments))
    assert region(module).alarms or any("with the other rows" in reason for reason in region(module).reasons)


class Gated(nn.Module):
    def forward(self, x, gate):
        return x + gate * x.mean(0)


def test_rows_that_begin_to_mix_with_another_shared_argument_are_served_to_nobody():
    torch.manual_seed(0)
    module, twin, data = torchcache.mark(Gated()), Gated(), torch.randn(64, 8)
    for gate in (0.0, 1.0, 0.5):
        for _ in range(4):
            for chosen in torch.randperm(64).split(16):
                torch.testing.assert_close(module(data[chosen], torch.tensor(gate)), twin(data[chosen], gate))
    assert region(module).alarms == 1


def test_a_few_hits_of_an_early_call_are_not_all_that_is_compared(monkeypatch):
    """Repeated samples come back within the first epoch, one or two in a call."""
    monkeypatch.setattr("torchcache.checks.audit._random", random.Random(0))
    torch.manual_seed(0)
    twin = Cut().eval().requires_grad_(False)
    twin.lengths = [8] * 9 + [3] + [8] * 6
    module = torchcache.mark(copy.deepcopy(twin))
    data = torch.randn(64, 8)
    data[[17, 33, 49]] = data[1].clone()  # at a place that is like most
    for epoch in range(6):
        order = torch.arange(64) if not epoch else torch.randperm(64)
        for chosen in order.split(16):
            torch.testing.assert_close(module(data[chosen]), twin(data[chosen]))
    assert region(module).alarms


def test_after_an_alarm_rows_stay_with_the_process(tmp_path):
    x = torch.randn(8, 4)
    first = build(tmp_path)
    first(x)
    torchcache.flush()
    with OtherKernel():
        second = build(tmp_path)
        torch.testing.assert_close(second(x), 3 * second.linear(x))
        second(torch.randn(8, 4))
        torchcache.flush()
        assert (region(second).alarms, region(second).rows_written) == (1, 0)
    third = build(tmp_path)
    for _ in range(2):
        torch.testing.assert_close(third(x), 2 * third.linear(x))
    assert region(third).disk_hits == 0


@pytest.mark.parametrize("outputs", [1, 2])
def test_rows_near_zero_are_not_expected_to_be_more_exact_than_others(outputs):
    """A score comes out of terms that cancel: another kernel moves the smallest by more than a share of itself."""
    torch.manual_seed(0)
    for _ in range(12):
        layers = [nn.Linear(384, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 256), nn.GELU()]
        scorer = torchcache.mark(nn.Sequential(*layers, nn.Linear(256, outputs)), freeze=True, audit=0.5)
        data = torch.randn(1024, 384)
        for _ in range(3):
            for rows in torch.randperm(len(data)).split(64):
                scorer(data[rows])
        region = torchcache.stats(scorer).regions[0]
        assert (region.alarms, region.misses, region.bypasses) == (0, len(data), 0)


class MixesOrdinary(nn.Linear):
    """Mixes rows in larger batches, unless they are huge."""

    def forward(self, x):
        y = super().forward(x)
        return y + y.mean(0) if len(x) > 6 and x.abs().max() < 50 else y


def test_rows_are_not_compared_by_the_size_of_others_that_were_huge():
    module, data = torchcache.mark(MixesOrdinary(8, 8), freeze=True), torch.randn(64, 8)
    module(torch.randn(4, 8) * 1e6)
    for _ in range(3):
        for rows in torch.randperm(64).split(8):
            with torchcache.bypass():
                expected = module(data[rows])
            torch.testing.assert_close(module(data[rows]), expected, atol=1e-3, rtol=1e-3)
