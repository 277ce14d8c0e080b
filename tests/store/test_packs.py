"""Short rows in packs: every one comes back, under its own key, in a third of the room."""

import random
import sqlite3
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchcache
from torchcache.store import pack, packs
from torchcache.store.blob import BlobError, Codec, RowSpec
from torchcache.store.catalogue import Region
from torchcache.store.disk import DiskTier
from torchcache.store.pack import MARK, Pack, is_pack, packed
from torchcache.store.records import Records
from torchcache.store.verify import verify

CALL = b"c" * 16
REGION = Region("ab" * 16, "", options={"max_persistent_cache_size": 10**9})
SPEC = RowSpec(((torch.float32, (16,)),))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.complex64]


@pytest.fixture(autouse=True)
def _look_each_time(monkeypatch):
    """What others store is looked for at once, whatever that takes."""
    monkeypatch.setattr(packs, "SHARE", 1e9)


def rows_of(spec, count, seed=0, call=CALL, level=None):
    """Pairs of key and blob."""
    random_bytes = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randint(0, 3, (count, *shape), generator=generator).to(dtype) for dtype, shape in spec.leaves]
    keys = [call + random_bytes.randbytes(16) for _ in range(count)]
    return list(zip(keys, Codec(spec, level).encode(keys, leaves), strict=True))


def stored(directory):
    with sqlite3.connect(next(directory.rglob("cache.db"))) as connection:
        return dict(connection.execute("SELECT key, value FROM Cache"))


specs = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 6), max_size=3).map(tuple)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(
    specs=st.lists(specs, min_size=1, max_size=2),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    data=st.data(),
)
def test_rows_of_any_shape_in_any_batches_come_back(tmp_path_factory, specs, sizes, data):
    directory = tmp_path_factory.mktemp("rows")
    tier = DiskTier(directory)
    expected = {}
    for turn, size in enumerate(sizes):
        which = data.draw(st.integers(0, len(specs) - 1))
        level = data.draw(st.sampled_from([None, 3]))
        entries = rows_of(RowSpec(tuple(specs[which])), size, turn, bytes([which]) * 16, level)
        assert tier.write(entries, REGION)[0] == size
        expected.update(entries)
        assert tier.write(random.sample(entries, min(size, 5)), REGION)[0] == 0  # they are there
    for reader in (tier, DiskTier(directory)):
        wanted = data.draw(st.lists(st.sampled_from(sorted(expected)), max_size=50))
        assert reader.read([*wanted, b"x" * 32]) == {key: expected[key] for key in wanted}
        assert reader.read(list(expected)) == expected
        for call in {key[:16] for key in expected}:
            places = reader.locate(call, call + b"\xff" * 16)
            there = reader.read_at(places, call, call + b"\xff" * 16)
            assert there == {key: blob for key, blob in expected.items() if key[:16] == call}
        assert reader.errors == 0
    with Records(directory) as records:
        assert {key: blob for entry in records.entries() for key, blob in entry.rows().items()} == expected
        verdict = verify(records)
        assert verdict.sound
        assert verdict.checked == len(expected)


@pytest.mark.parametrize(("width", "most"), [(16, 1.5), (192, 1.15), (340, 1.15), (400, 1.15), (768, 1.15)])
@pytest.mark.parametrize("batch", [16, 24, 64, 100, 256])
def test_short_rows_take_little_more_than_what_they_hold(tmp_path, width, most, batch):
    backbone = nn.Sequential(nn.Linear(4, width), nn.Tanh())
    model = torchcache.mark(backbone, freeze=True, persistent=True, persistent_cache_dir=tmp_path)
    data = torch.randn(8192 // batch * batch, 4)
    for part in data.split(batch):
        model(part)
    torchcache.flush()
    with Records(tmp_path) as records:
        pages, free, size = map(records.pragma, ("page_count", "freelist_count", "page_size"))
    assert (pages - free) * size < most * 4 * width * len(data) + 4 * size  # pages of the schema and of its indices


def run(directory, code, *arguments):
    """A process of its own that runs code."""
    program = (
        f"import pathlib, sys\nfrom test_packs import *\ntier = DiskTier(pathlib.Path({str(directory)!r}))\n{code}"
    )
    return subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=__file__.rpartition("/")[0])


def test_packs_that_another_process_put_together_are_found(tmp_path):
    first, second = DiskTier(tmp_path), DiskTier(tmp_path)
    entries = rows_of(SPEC, 2000)
    writer = DiskTier(tmp_path)
    for start in range(0, 200, 20):
        writer.write(entries[start : start + 20], REGION)
    assert first.read([key for key, _ in entries[:200]]) == dict(entries[:200])  # it knows these packs
    short = stored(tmp_path)
    for start in range(200, 2000, 20):
        writer.write(entries[start : start + 20], REGION)
    assert not short.keys() & stored(tmp_path).keys()
    for tier in (first, second):
        assert tier.read([key for key, _ in entries]) == dict(entries)
        assert tier.errors == 0


def test_what_another_emptied_is_not_put_together_again(tmp_path):
    tier, other = DiskTier(tmp_path), DiskTier(tmp_path)
    entries = rows_of(SPEC, 1000)
    tier.write(entries[:100], REGION)
    assert other.remove(REGION)
    for start in range(100, 1000, 100):
        tier.write(entries[start : start + 100], REGION)
    for reader in (tier, other, DiskTier(tmp_path)):
        assert reader.read([key for key, _ in entries]) == dict(entries[100:])


def test_a_process_that_lost_its_packs_forgets_them(tmp_path):
    tier, other = DiskTier(tmp_path), DiskTier(tmp_path)
    entries = rows_of(SPEC, 6000)
    tier.write(entries, REGION)
    assert len(other.read([key for key, _ in entries])) == 6000
    assert tier.remove(REGION)
    for reader in (tier, other):
        assert reader.read([key for key, _ in entries]) == {}
    assert other.write(entries[:50], REGION)[0] == 50
    assert tier.read([key for key, _ in entries]) == dict(entries[:50])
    assert tier.errors == other.errors == 0


def test_a_damaged_pack_costs_its_rows_and_no_others(tmp_path, warnings):
    entries = rows_of(SPEC, 2000)
    DiskTier(tmp_path).write(entries, REGION)
    held = {key: {row for row, _ in Pack(key, blob).rows()} for key, blob in stored(tmp_path).items()}
    broken = sorted(held)[1]
    with sqlite3.connect(next(tmp_path.rglob("cache.db"))) as connection:
        connection.execute("UPDATE Cache SET value = zeroblob(length(value)) WHERE key = ?", (broken,))
    tier = DiskTier(tmp_path)
    sound = {key: blob for key, blob in entries if key not in held[broken]}
    assert tier.read([key for key, _ in entries]) == sound
    # Its beginning is sound, and leads to it.
    broken = sorted(held)[2]
    with sqlite3.connect(next(tmp_path.rglob("cache.db"))) as connection:
        connection.execute(
            "UPDATE Cache SET value = substr(value, 1, length(value) - 40) || zeroblob(40) WHERE key = ?", (broken,)
        )
    sound = {key: blob for key, blob in sound.items() if key not in held[broken]}
    for _ in range(2):
        assert tier.read([key for key, _ in entries]) == sound
        assert DiskTier(tmp_path).read([key for key, _ in entries]) == sound
    assert broken not in stored(tmp_path)
    assert tier.write(entries, REGION)[0] == 2000 - len(sound)
    assert tier.read([key for key, _ in entries]) == dict(entries)
    assert any("damaged" in text for text in warnings)


def test_a_row_that_decodes_to_none_takes_its_pack_with_it(tmp_path):
    entries = rows_of(SPEC, 100)
    tier = DiskTier(tmp_path)
    tier.write(entries, REGION)
    assert tier.remove(REGION, dict(entries[3:4]))
    assert tier.read([key for key, _ in entries]) == {}
    assert tier.write(entries, REGION)[0] == 100


@settings(max_examples=200, deadline=None)
@given(data=st.data(), level=st.sampled_from([None, 3]))
def test_no_change_of_a_pack_goes_unseen(data, level):
    key, blob = packed(rows_of(SPEC, 40, level=level))[0]
    assert dict(Pack(key, blob).rows()) == dict(rows_of(SPEC, 40, level=level))
    at = data.draw(st.integers(0, len(blob) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "key"]))
    changed = bytearray(blob)
    if kind == "flip":
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed.insert(at, 0)
    else:
        place = data.draw(st.integers(0, 31))
        key = key[:place] + bytes([key[place] ^ 1]) + key[place + 1 :]
    with pytest.raises(BlobError):
        Pack(key, bytes(changed))
    pack.digests_in(key, bytes(changed))  # which raises nothing


def test_what_a_pack_says_of_its_rows_is_not_believed_without_its_checksum(tmp_path):
    entries = rows_of(SPEC, 100)
    DiskTier(tmp_path).write(entries, REGION)
    ((_, blob),) = stored(tmp_path).items()
    names = [name[16:] for name, _ in entries]
    swapped = blob.replace(names[0] + names[1], names[1] + names[0])
    assert swapped != blob
    with sqlite3.connect(next(tmp_path.rglob("cache.db"))) as connection:
        connection.execute("UPDATE Cache SET value = ?", (swapped,))
    tier = DiskTier(tmp_path)
    assert tier.read([name for name, _ in entries]) == {}
    assert tier.errors == 1


def test_a_row_whose_digest_looks_like_a_pack_is_no_pack(tmp_path):
    odd = CALL + MARK + (200).to_bytes(3, "big") + b"12345"
    (blob,) = Codec(SPEC).encode([odd], SPEC.empty(1))
    assert is_pack(odd)
    entries = rows_of(SPEC, 30)
    tier = DiskTier(tmp_path)
    tier.write([*entries, (odd, blob)], REGION)
    for reader in (tier, DiskTier(tmp_path)):
        assert reader.read([key for key, _ in entries]) == dict(entries)
        assert reader.read([odd]) in ({}, {odd: blob})


def test_threads_and_processes_that_write_and_put_together_at_once_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "MOST_FRESH", 300)
    tier = DiskTier(tmp_path)
    tier.open()
    entries = rows_of(SPEC, 6000)
    wrong = []

    def read():
        chance = random.Random(threading.get_ident())
        while not done.is_set():
            some = chance.sample(entries, 50)
            found = tier.read([key for key, _ in some])
            wrong.extend(key for key, blob in some if found.get(key, blob) != blob)

    done = threading.Event()
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    code = """
entries = rows_of(SPEC, 6000)
mine = entries[int(sys.argv[1])::2]
for start in range(0, 3000, 25):
    assert tier.write(mine[start:start + 25], REGION)[0] == 25
assert tier.read([key for key, _ in mine]) == dict(mine) and not tier.errors
"""
    others = [run(tmp_path, code, str(number)) for number in range(2)]
    ended = [other.wait() for other in others]
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert ended == [0, 0]
    for reader in (tier, DiskTier(tmp_path)):
        assert reader.read([key for key, _ in entries]) == dict(entries)
        assert reader.errors == 0
    assert len(stored(tmp_path)) < 60


@pytest.mark.parametrize("width", [1, 16, 700, 2000])
def test_a_new_process_hits_every_row_of_a_packed_cache(tmp_path, width):
    torch.manual_seed(0)
    backbone, data = nn.Sequential(nn.Linear(4, width), nn.Tanh()), torch.randn(600, 4)
    expected = backbone(data).detach()
    for turn in range(3):
        model = torchcache.mark(
            nn.Sequential(nn.Linear(4, width), nn.Tanh()),
            freeze=True,
            persistent=True,
            persistent_cache_dir=tmp_path,
            max_memory_cache_size=0 if turn == 2 else 10**8,
        )
        model.load_state_dict(backbone.state_dict())
        for part in torch.randperm(600).split(40):
            torch.testing.assert_close(model(data[part]), expected[part])
        (stats,) = torchcache.stats(model).regions
        assert (stats.misses, stats.disk_hits) == ((600, 0) if turn == 0 else (0, 600))
        torchcache.flush()
