"""What every tier beneath memory does, and what a user's own one may do wrong."""

import copy

import pytest
import torch
from torch import nn

import torchcache
from torchcache.options import CacheOptions
from torchcache.store.catalogue import Region
from torchcache.store.disk import DiskTier
from torchcache.store.remote import remote_tier
from torchcache.store.tier import Guarded

MOST = 10_000


class Shelf(torchcache.Tier):
    """A tier of a user's own: a dict."""

    def __init__(self):
        self.blobs = {}

    def read(self, keys, region, most):
        return {key: self.blobs[region.tag, key] for key in keys if (region.tag, key) in self.blobs}

    def write(self, entries, region):
        self.blobs.update({(region.tag, key): blob for key, blob in entries})
        return len(entries), sum(len(blob) for _, blob in entries)

    def remove(self, region, found=None):
        for tag, key in list(self.blobs):
            if tag == region.tag and (found is None or key in found):
                del self.blobs[tag, key]
        return True


def record(letter):
    return Region.of(letter * 32, "a region", CacheOptions())


def key(number):
    return number.to_bytes(32, "little")


@pytest.fixture(params=["disk", "remote", "own"])
def tier(request, tmp_path):
    if request.param == "disk":
        return DiskTier(tmp_path / "cache")
    if request.param == "own":
        return Guarded(Shelf(), "a shelf")
    return remote_tier(request.getfixturevalue("server").url)


def test_a_tier_gives_back_what_was_written(tier):
    a, b = record("a"), record("b")
    blobs = {key(number): bytes([number]) * (number * 700) for number in range(10)}
    assert tier.read(list(blobs), a, MOST) == {}
    stored, size = tier.write(list(blobs.items()), a)
    assert (stored, size) == (10, sum(map(len, blobs.values())))
    assert tier.read([key(3), key(99), key(7)], a, MOST) == {key(3): blobs[key(3)], key(7): blobs[key(7)]}
    tier.write([(key(20), b"of b")], b)
    tier.note(a)
    assert tier.knows(a)
    assert tier.remove(a, {key(3): blobs[key(3)]})
    assert set(tier.read(list(blobs), a, MOST)) == set(blobs) - {key(3)}
    assert tier.remove(a)
    assert tier.read(list(blobs), a, MOST) == {}
    assert tier.read([key(20)], b, MOST) == {key(20): b"of b"}


def net():
    torch.manual_seed(0)
    return nn.Linear(4, 8).eval().requires_grad_(False)


def region(module):
    return torchcache.stats(module).regions[0]


def test_a_tier_of_ones_own_serves_another_run():
    shelf, x = Shelf(), torch.randn(6, 4)
    first, second = net(), net()
    torchcache.mark(first, tiers=[shelf])
    expected = first(x)
    torchcache.flush()
    assert len(shelf.blobs) == 6
    torchcache.mark(second, tiers=[shelf])
    assert torch.equal(second(x), expected)
    assert (region(second).misses, region(second).remote_hits) == (0, 6)


def test_rows_go_up_to_the_nearer_tiers_and_down_to_all(tmp_path):
    near, far, x = Shelf(), Shelf(), torch.randn(6, 4)
    first, second = net(), net()
    torchcache.mark(first, tiers=[far])
    first(x[:3])
    torchcache.flush()
    torchcache.mark(second, tiers=[near, far], persistent=True, persistent_cache_dir=tmp_path)
    second(x)
    torchcache.flush()
    assert (len(near.blobs), len(far.blobs)) == (6, 6)
    third = net()
    torchcache.mark(third, persistent=True, persistent_cache_dir=tmp_path)
    third(x)
    assert region(third).disk_hits == 6


def test_damaged_blobs_of_a_tier_are_removed_and_computed(warnings):
    shelf, x = Shelf(), torch.randn(6, 4)
    first, second = net(), net()
    torchcache.mark(first, tiers=[shelf])
    expected = first(x)
    torchcache.flush()
    for name in list(shelf.blobs)[:2]:
        shelf.blobs[name] = shelf.blobs[name][:-1] + b"?"
    torchcache.mark(second, tiers=[shelf])
    assert torch.equal(second(x), expected)
    assert (region(second).misses, region(second).remote_hits, region(second).remote_errors) == (2, 4, 2)
    assert "Shelf held damaged rows" in warnings[0]
    torchcache.flush()
    assert len(shelf.blobs) == 6


class Broken(Shelf):
    """It fails in one verb, in one way."""

    def __init__(self, verb, how):
        super().__init__()
        self.calls = 0

        def fail(*arguments):
            self.calls += 1
            return how(*arguments)

        setattr(self, verb, fail)


def _raise(*_):
    raise RuntimeError("no such shelf")


@pytest.mark.parametrize("verb", ["read", "write", "knows", "note"])
def test_a_tier_that_raises_costs_rows_and_is_left_alone(verb, warnings):
    broken, module, x = Broken(verb, _raise), net(), torch.randn(6, 4)
    expected = module(x)
    torchcache.mark(module, tiers=[broken], max_memory_cache_size=0)
    for _ in range(5):
        assert torch.equal(module(x), expected)
        torchcache.flush()
    assert broken.calls == 1
    assert region(module).remote_errors == 1
    (warning,) = warnings
    assert "Broken cannot be" in warning
    assert "no such shelf" in warning


@pytest.mark.parametrize(
    "lie",
    [
        lambda keys, *_: None,
        lambda keys, *_: dict.fromkeys(keys),
        lambda keys, *_: dict.fromkeys(keys, 3),
        lambda keys, *_: dict.fromkeys(keys, "text"),
        lambda keys, *_: dict.fromkeys(keys, b""),
        lambda keys, *_: {key: bytearray(100) for key in keys},
        lambda keys, *_: {b"others": b"blob"},
        lambda keys, *_: [b"blob"] * len(keys),
    ],
)
def test_what_a_tier_makes_up_is_no_row(lie):
    module, x = net(), torch.randn(6, 4)
    expected = module(x)
    torchcache.mark(module, tiers=[Broken("read", lie)])
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)
    assert region(module).remote_hits == 0


def test_copies_of_a_mark_use_tiers_of_their_own_copies():
    shelf, module, x = Shelf(), net(), torch.randn(6, 4)
    torchcache.mark(module, tiers=[shelf])
    expected = module(x)
    torchcache.flush()
    assert torch.equal(copy.deepcopy(module)(x), expected)


@pytest.mark.parametrize("tiers", [3, "abc", [object()], [None]])
def test_what_is_no_tier_is_told_at_the_mark(tiers):
    with pytest.raises(TypeError, match="tiers must be"):
        torchcache.mark(net(), tiers=tiers)
