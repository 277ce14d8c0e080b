"""The memory tier while it has room."""

import multiprocessing
import os
import threading
import types

import pytest
import torch

from torchcache.store import memory
from torchcache.store.blob import _DTYPES, RowSpec
from torchcache.store.memory import MemoryTier
from torchcache.store.select import element_bytes
from torchcache.store.slab import ABSENT, Slab

SPEC = RowSpec(((torch.float32, (2,)), (torch.int64, ())))


def rows(numbers):
    values = torch.tensor(list(numbers))
    return [torch.stack([values, -values], 1).float(), values]


def digests(numbers):
    return [number.to_bytes(16, "big") for number in numbers]


def test_rows_are_found_gathered_and_not_shared():
    tier = MemoryTier(10**6)
    _, places = tier.admit(b"a", digests(range(5)), rows(range(5)), SPEC)
    assert list(places) == [0, 1, 2, 3, 4]
    slab = tier.slab(b"a")
    assert slab.find(digests([3, 9, 0])) == [3, ABSENT, 0]
    first = slab.gather([3, 0, 3])
    assert first[1].tolist() == [3, 0, 3]
    first[0].zero_()
    assert slab.gather([3])[0].tolist() == [[3, -3]]


def test_the_budget_is_hard_over_all_fingerprints_and_first_rows_win():
    tier = MemoryTier(7 * SPEC.size + 3)
    assert len(tier.admit(b"a", digests(range(4)), rows(range(4)), SPEC)[1]) == 4
    _, places = tier.admit(b"b", digests(range(10, 20)), rows(range(10, 20)), SPEC)
    assert list(places) == [0, 1, 2]
    assert tier.slab(b"b").find(digests([10, 12, 13])) == [0, 2, ABSENT]
    assert tier.admit(b"c", digests([1]), rows([1]), SPEC) == (None, [])
    assert tier.used == 7 * SPEC.size <= tier.budget
    assert len(tier) == 7
    tier.drop_state(b"")
    assert (len(tier), tier.used) == (0, 0)


def test_slabs_that_cannot_be_lazy_grow():
    slab = Slab(SPEC, capacity=5000, lazy=False)
    assert slab.leaves[0].shape[0] < 5000
    for start in range(0, 5000, 500):
        numbers = range(start, start + 500)
        slab.write(slab.lease(500), digests(numbers), rows(numbers))
    assert slab.gather([0, 1500, 4999])[1].tolist() == [0, 1500, 4999]
    assert slab.leaves[0].shape[0] == 5000


@pytest.mark.parametrize("system", ["posix", "another"])
def test_threads_that_read_and_write_at_once_see_only_right_rows(system, monkeypatch):
    tier = MemoryTier(10**7)
    wrong, failed = [], []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(memory, "os", types.SimpleNamespace(name=system))

    def write(offset):
        for start in range(0, 2000, 20):
            numbers = range(offset + start, offset + start + 20)
            tier.admit(b"a", digests(numbers), rows(numbers), SPEC)

    def read():
        for _ in range(300):
            numbers = torch.randint(0, 8000, (64,)).tolist()
            slab = tier.slab(b"a")
            if slab is None:
                continue
            slots, there = slab.take(digests(numbers))
            held = [number for number, slot in zip(numbers, slots, strict=True) if slot != ABSENT]
            if held and there[1].tolist() != held:
                wrong.append(held)

    threads = [threading.Thread(target=write, args=(2000 * n,)) for n in range(4)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not failed
    assert len(tier) == 8000


def test_rows_are_kept_in_the_slabs_dtype():
    tier = MemoryTier(10**6)
    spec = RowSpec(((torch.float16, (2,)), (torch.int64, ())))
    tier.admit(b"a", digests(range(3)), rows(range(3)), spec)
    halves, numbers = tier.slab(b"a").gather([2, 1])
    assert halves.dtype == torch.float16
    assert halves.tolist() == [[2, -2], [1, -1]]
    assert numbers.tolist() == [2, 1]
    assert tier.used == 3 * spec.size


def test_the_callers_rows_are_copied():
    tier, mine = MemoryTier(10**6), rows(range(3))
    tier.admit(b"a", digests(range(3)), mine, SPEC)
    for leaf in mine:
        leaf.zero_()
    assert tier.slab(b"a").gather([2])[0].tolist() == [[2, -2]]


def test_where_memory_is_not_lazy_the_tier_grows_within_its_budget(monkeypatch):
    monkeypatch.setattr(memory, "os", types.SimpleNamespace(name="another"))
    tier = MemoryTier(3000 * SPEC.size)
    for start in range(0, 4000, 700):
        numbers = range(start, start + 700)
        tier.admit(b"a", digests(numbers), rows(numbers), SPEC)
        slab = tier.slab(b"a")
        assert slab.leaves[0].shape[0] <= 3000
    assert len(tier) == 3000
    assert slab.gather(slab.find(digests([0, 1500, 2999])))[1].tolist() == [0, 1500, 2999]
    assert slab.find(digests([3000])) == [ABSENT]


def test_rows_of_old_weights_make_room_and_those_in_use_stay():
    tier = MemoryTier(100 * SPEC.size)
    tier.admit(b"a", digests(range(90)), rows(range(90)), SPEC, b"old")
    tier.admit(b"b", digests(range(40)), rows(range(40)), SPEC, b"new")
    _, places = tier.admit(b"c", digests(range(80)), rows(range(80)), SPEC, b"new")
    assert tier.slab(b"a") is None
    assert len(tier.slab(b"b")) == 40
    assert len(places) == 60
    assert tier.used == 100 * SPEC.size


def test_new_weights_get_all_the_room_that_old_rows_leave():
    tier = MemoryTier(100 * SPEC.size)
    tier.admit(b"a", digests(range(90)), rows(range(90)), SPEC, b"old")
    for start in range(0, 100, 10):
        numbers = range(start, start + 10)
        tier.admit(b"b", digests(numbers), rows(numbers), SPEC, b"new")
    assert len(tier.slab(b"b")) == 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_room_for_rows_of_many_shapes_does_not_keep_a_process_from_forking():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tier = MemoryTier(memory // 2)
    for length in range(1, 9):
        tier.admit(bytes([length]), digests([1]), [torch.ones(1, length)], RowSpec(((torch.float32, (length,)),)))
    process = multiprocessing.get_context("fork").Process(target=len, args=(tier,))
    process.start()  # a process that was promised more memory than there is cannot be copied
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in _DTYPES if hasattr(torch, name)], ids=str)
def test_rows_of_every_dtype_can_be_reserved(dtype):
    spec = RowSpec(((dtype, (4,)), (dtype, ()), (dtype, (0,))))
    codes = torch.arange(10 * dtype.itemsize, dtype=torch.uint8).clamp(max=1 if dtype is torch.bool else 255)
    whole = codes.view(dtype)
    given = [whole[:8].view(2, 4), whole[8:], torch.empty(2, 0, dtype=dtype)]
    lease, _ = MemoryTier(10**6).admit(b"a", digests([1, 2]), given, spec)
    slab = lease.slab
    assert slab.lazy
    for leaf, wanted in zip(slab.gather([0, 1]), given, strict=True):
        assert leaf.dtype is dtype
        assert element_bytes(leaf).tolist() == element_bytes(wanted).tolist()
