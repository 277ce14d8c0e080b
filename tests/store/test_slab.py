"""The memory tier."""

import threading

import torch

from torchcache.store.blob import RowSpec
from torchcache.store.slab import ABSENT, MemoryTier, Slab

SPEC = RowSpec(((torch.float32, (2,)), (torch.int64, ())))
CPU = torch.device("cpu")


def rows(numbers):
    values = torch.tensor(list(numbers))
    return [torch.stack([values, -values], 1).float(), values]


def digests(numbers):
    return [number.to_bytes(16, "big") for number in numbers]


def test_rows_are_found_gathered_and_not_shared():
    tier = MemoryTier(10**6)
    slab, slots = tier.admit(b"a", digests(range(5)), rows(range(5)), SPEC, CPU)
    assert list(slots) == [0, 1, 2, 3, 4]
    assert slab.find(digests([3, 9, 0])) == [3, ABSENT, 0]
    first = slab.gather([3, 0, 3])
    assert first[1].tolist() == [3, 0, 3]
    first[0].zero_()
    assert slab.gather([3])[0].tolist() == [[3, -3]]


def test_the_budget_is_hard_over_all_fingerprints_and_first_rows_win():
    tier = MemoryTier(7 * SPEC.size + 3)
    assert len(tier.admit(b"a", digests(range(4)), rows(range(4)), SPEC, CPU)[1]) == 4
    slab, slots = tier.admit(b"b", digests(range(10, 20)), rows(range(10, 20)), SPEC, CPU)
    assert len(slots) == 3
    assert slab.find(digests([10, 12, 13])) == [0, 2, ABSENT]
    assert tier.admit(b"c", digests([1]), rows([1]), SPEC, CPU) == (None, range(0))
    assert tier.used == 7 * SPEC.size <= tier.budget
    assert len(tier) == 7
    tier.clear()
    assert (len(tier), tier.used) == (0, 0)


def test_slabs_that_cannot_be_lazy_grow():
    slab = Slab(SPEC, CPU, capacity=5000, lazy=False)
    assert slab._leaves[0].shape[0] < 5000
    for start in range(0, 5000, 500):
        numbers = range(start, start + 500)
        slab.grow(start + 500)
        slab.write(start, digests(numbers), rows(numbers))
    assert slab.gather([0, 1500, 4999])[1].tolist() == [0, 1500, 4999]
    assert slab._leaves[0].shape[0] == 5000


def test_threads_that_read_and_write_at_once_see_only_right_rows():
    tier = MemoryTier(10**7)
    wrong = []

    def write(offset):
        for start in range(0, 2000, 20):
            numbers = range(offset + start, offset + start + 20)
            tier.admit(b"a", digests(numbers), rows(numbers), SPEC, CPU)

    def read():
        for _ in range(300):
            numbers = torch.randint(0, 8000, (64,)).tolist()
            slab = tier.slab(b"a")
            slots = slab.find(digests(numbers)) if slab is not None else []
            held = [(number, slot) for number, slot in zip(numbers, slots, strict=False) if slot != ABSENT]
            if held and slab.gather([slot for _, slot in held])[1].tolist() != [number for number, _ in held]:
                wrong.append(held)

    threads = [threading.Thread(target=write, args=(2000 * n,)) for n in range(4)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(tier) == 8000
