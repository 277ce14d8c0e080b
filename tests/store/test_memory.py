"""The memory tier when it is full: which rows give way, and that none is ever taken for another."""

import math
import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchcache
from torchcache.store.blob import RowSpec
from torchcache.store.memory import MemoryTier
from torchcache.store.slab import ABSENT, Slab

SPEC = RowSpec(((torch.float32, (3,)), (torch.int64, ())))
WIDE = RowSpec(((torch.float32, (4000,)), (torch.int64, ())))


def digests(numbers):
    return [number.to_bytes(16, "big") for number in numbers]


def rows(numbers, spec=SPEC):
    values = torch.tensor(list(numbers))
    return [values[:, None].float().expand(-1, *spec.leaves[0][1]), values]


class Looking:
    """Looks rows up as a call does: takes those that are there, checks them, and admits the others."""

    def __init__(self, tier, spec=SPEC, fingerprint=b"a"):
        self.tier, self.spec, self.fingerprint = tier, spec, fingerprint

    def step(self, numbers):
        """How many of the rows were there."""
        slab = self.tier.slab(self.fingerprint)
        slots, there = slab.take(digests(numbers)) if slab is not None else ([ABSENT] * len(numbers), [])
        held = [number for number, slot in zip(numbers, slots, strict=True) if slot != ABSENT]
        if held:
            for leaf, wanted in zip(there, rows(held, self.spec), strict=True):
                assert torch.equal(leaf, wanted)
        missing = list(dict.fromkeys(number for number, slot in zip(numbers, slots, strict=True) if slot == ABSENT))
        if missing:
            self.tier.admit(self.fingerprint, digests(missing), rows(missing, self.spec), self.spec)
        assert self.tier.used <= self.tier.budget
        return len(held)

    def steps(self, numbers, size=10):
        numbers = list(numbers)
        return sum(self.step(numbers[start : start + size]) for start in range(0, len(numbers), size))


@pytest.fixture(params=["lazy", "growing"])
def lazy(request, monkeypatch):
    if request.param == "growing":
        new = Slab.__init__
        monkeypatch.setattr(
            Slab,
            "__init__",
            lambda self, spec, capacity, lazy, *others: new(self, spec, capacity, False, *others),
        )
    return request.param


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 12),
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 30), min_size=1, max_size=6)), max_size=80),
    st.booleans(),
)
def test_whatever_is_looked_up_in_whatever_order_is_right(capacity, steps, held):
    tier = MemoryTier(capacity * SPEC.size)
    both = [Looking(tier), Looking(tier, RowSpec(((torch.float32, (1,)), (torch.int64, ()))), b"b")]
    leases = []
    for second, numbers in steps:
        both[second].step(numbers)
        slab = tier.slab(both[second].fingerprint)
        if held and slab is not None and slab.used:
            lease, _ = tier.admit(b"a", digests([99]), rows([99]), SPEC)
            leases = [*leases[-2:], lease] if lease is not None else leases
        for lease in leases:  # what is held is not written over
            assert lease.rows()[1].tolist() == [99]
    for slab in tier._slabs.values():
        assert sorted(slab.slots.values()) == sorted(set(slab.slots.values()))
        assert all(slot < slab.used for slot in slab.slots.values())


def hammer(tier, steps=1500, threads=4):
    """Threads that look up, check and admit at once; what they found to be wrong."""
    failed = []

    def work(number):
        chance = random.Random(number)
        lookings = [Looking(tier, WIDE), Looking(tier, SPEC, b"b")]
        try:
            for step in range(steps):
                base = step // 20  # a window that moves on, so that rows give way all the time
                lookings[step % 8 == 0].step([base + chance.randrange(24) for _ in range(12)])
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return failed


def test_threads_on_a_tiny_budget_never_get_a_wrong_row(lazy):
    tier = MemoryTier(24 * WIDE.size)
    assert hammer(tier) == []
    assert max(slab.version for slab in tier._slabs.values()) > 50, "no row gave way"


def taken_while_rows_give_way(monkeypatch):
    """What a lookup of rows 0 to 19 got when half of them were replaced between finding and reading: said, and read."""
    slab = Slab(SPEC, 20, True)
    slab.write(slab.lease(20), digests(range(20)), rows(range(20)))
    gather, moves = Slab.gather, iter([10])

    def late(self, slots, to_send):
        for count in moves:
            assert slab.give_way(math.inf, count) == count
            slab.write(slab.lease(count), digests(range(100, 100 + count)), rows(range(100, 100 + count)))
        return gather(self, slots, to_send)

    monkeypatch.setattr(Slab, "gather", late)
    slots, there = slab.take(digests(range(20)))
    return [number for number, slot in enumerate(slots) if slot != ABSENT], there[1].tolist()


def test_rows_that_give_way_between_finding_and_reading_are_not_taken(monkeypatch):
    said, read = taken_while_rows_give_way(monkeypatch)
    assert said == read == list(range(10, 20))


def test_without_versions_wrong_rows_would_be_taken(monkeypatch):
    monkeypatch.setattr(Slab, "version", property(lambda self: 0, lambda self, value: None), raising=False)
    said, read = taken_while_rows_give_way(monkeypatch)
    assert said != read


def test_rows_that_come_after_a_full_tier_are_kept_when_they_return(lazy):
    looking, train = Looking(MemoryTier(100 * SPEC.size)), iter(range(10**6, 10**7))
    hits = []
    for _ in range(5):
        looking.steps([next(train) for _ in range(500)])
        hits.append(looking.steps(range(50)))
    assert hits[:2] == [0, 0]
    assert min(hits[2:]) >= 45


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("share", [1.1, 2, 5])
def test_a_scan_larger_than_the_tier_keeps_a_stable_share(share, shuffled):
    looking, order = Looking(MemoryTier(1000 * SPEC.size)), list(range(int(1000 * share)))
    hits, chance = [], random.Random(0)
    for _ in range(6):
        if shuffled:
            chance.shuffle(order)
        hits.append(looking.steps(order, 20))
    assert sum(hits[1:]) >= 0.9 * 5000


def test_a_window_that_moves_on_is_followed():
    looking, chance = Looking(MemoryTier(1000 * SPEC.size)), random.Random(0)
    hits = [looking.step([n + chance.randrange(500) for _ in range(20)]) for n in range(0, 16_000, 4)]
    assert sum(hits[2000:]) >= 0.6 * 20 * 2000


def test_rows_of_another_shape_get_room_and_memory_is_given_back(lazy):
    tier = MemoryTier(100 * WIDE.size)
    crops, whole = Looking(tier, WIDE, b"crops"), Looking(tier, SPEC, b"whole")
    crop = iter(range(10**6, 10**7))
    hits = []
    for _ in range(5):
        crops.steps([next(crop) for _ in range(300)])
        hits.append(whole.steps(range(200)))
    assert hits[-1] >= 180
    slab = tier.slab(b"crops")
    written = slab.leaves[0][slab.used + 1 :]
    assert not slab.lazy or not written.any()


def test_a_row_that_is_held_stays_where_it_is():
    tier = MemoryTier(40 * SPEC.size)
    looking = Looking(tier)
    looking.steps(range(30))
    lease, _ = tier.admit(b"a", digests(range(30, 40)), rows(range(30, 40)), SPEC)
    shared = lease.rows()[1]
    for _ in range(20):
        looking.steps(range(100, 140))
    assert shared.tolist() == list(range(30, 40))
    del lease, shared
    for _ in range(20):
        looking.steps(range(100, 140))
    assert looking.steps(range(100, 140)) >= 36  # two rows may share a place in the table of those that were refused


def passes(model, data, size=20):
    for x in data.split(size):
        torch.testing.assert_close(model(x), model.plain(x))


def counts(model):
    region = torchcache.stats(model).regions[0]
    assert region.memory_bytes <= model.limit
    return region


def limited(limit_rows, **options):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 16)
    model = torchcache.mark(module, freeze=True, max_memory_cache_size=limit_rows * 64, **options)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    object.__setattr__(model, "plain", lambda x: torch.nn.functional.linear(x, weight, bias))
    object.__setattr__(model, "limit", limit_rows * 64)
    return model


def test_validation_after_augmented_training_is_served():
    model, validation = limited(100), torch.randn(60, 4)
    hits = []
    for _ in range(5):
        passes(model, torch.randn(300, 4))
        before = counts(model).hits
        passes(model, validation)
        hits.append(counts(model).hits - before)
    assert min(hits[2:]) >= 55
    region = counts(model)
    assert region.misses + region.hits == 5 * 360


def test_half_of_a_scan_twice_the_tier_is_served():
    model, data = limited(200), torch.randn(400, 4)
    for _ in range(6):
        passes(model, data[torch.randperm(400)])
    region = counts(model)
    assert region.hits >= 0.42 * 5 * 400
    assert region.misses + region.hits == 6 * 400


def test_a_directory_under_a_tiny_memory_gives_right_rows(tmp_path):
    data = torch.randn(200, 4)
    for missing in (200, 0):
        model = limited(20, persistent=True, persistent_cache_dir=tmp_path)
        for _ in range(4):
            passes(model, data[torch.randperm(200)])
            torchcache.flush()
            passes(model, data[:15], 5)
            torchcache.flush()
        region = counts(model)
        assert region.misses + region.hits == 4 * 215
        assert region.misses == missing
        assert region.disk_hits > 0
