"""A full directory: what gives way to new rows, and what stays because a living process uses it."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import torchcache
from torchcache.cli.main import main
from torchcache.store import disk, in_use, pause, room
from torchcache.store.catalogue import Region
from torchcache.store.disk import DiskTier

posix = pytest.mark.skipif(os.name != "posix", reason="locks and signals of POSIX")

ROWS, WIDTH = 400, 512
LIMIT = 1_200_000  # some 500 rows


class Net(nn.Module):
    """Random features of another identity for each seed."""

    def __init__(self, seed, width=WIDTH):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, width, generator=generator))

    def forward(self, x):
        return x @ self.weight


def data(start=0, stop=ROWS):
    return torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in range(start, stop)])


def run(directory, seed, rows=ROWS, limit=LIMIT, width=WIDTH, **options):
    """A model on the directory, as in a process of its own; its outputs are right. It lives as long as it is held."""
    disk._tiers.pop(Path(directory), None)
    net = torchcache.mark(
        Net(seed, width),
        freeze=True,
        persistent=True,
        persistent_cache_dir=directory,
        max_persistent_cache_size=limit,
        zstd_compression_level=None,
        audit=0,
        **options,
    )
    step(net, seed, rows, width)
    return net


def step(net, seed, rows=ROWS, width=WIDTH):
    twin = Net(seed, width)
    with torch.no_grad():
        for start in range(0, rows, 50):
            x = data(start, min(start + 50, rows))
            torch.testing.assert_close(net(x), twin(x))
    torchcache.flush()


def there(directory, seed, rows=ROWS, **options):
    """How many rows of a model are on disk."""
    hits = torchcache.stats(run(directory, seed, rows, limit=0, **options)).regions[0].disk_hits
    gc.collect()
    return hits


def used(directory):
    with contextlib.closing(sqlite3.connect(directory / "rows-1" / "cache.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def told(directory):
    return sorted(path.name for path in (directory / "in-use").iterdir())


@pytest.mark.parametrize("width", [WIDTH, 40_000], ids=["rows in the database", "rows in files"])
def test_rows_that_nothing_uses_give_way_to_new_ones(tmp_path, warnings, width):
    rows = ROWS if width == WIDTH else 60
    limit = int(1.25 * rows * (4 * width + 300))
    run(tmp_path, 1, rows, limit, width)
    gc.collect()
    run(tmp_path, 2, rows, limit, width)
    gc.collect()
    assert there(tmp_path, 2, rows, width=width) == rows
    assert there(tmp_path, 1, rows, width=width) < rows
    assert used(tmp_path) <= limit + 100_000
    assert not [text for text in warnings if "in use" in text]
    assert main(["verify", str(tmp_path)]) == 0


def test_what_was_used_longest_ago_goes_first(tmp_path):
    limit = 2 * LIMIT
    for seed in (1, 2, 1, 3):  # the second use of 1 makes 2 the oldest
        run(tmp_path, seed, limit=limit)
        gc.collect()
        time.sleep(0.02)
    held = {seed: there(tmp_path, seed) for seed in (1, 2, 3)}
    assert held[1] == held[3] == ROWS
    assert 0 < held[2] < ROWS


@pytest.mark.parametrize("company", [False, True], ids=["its tier ends too", "its tier lives on"])
def test_it_is_the_end_of_its_use_that_counts(tmp_path, company):
    limit = 2 * LIMIT
    first = run(tmp_path, 1, limit=limit)
    tier = disk.disk_tier(tmp_path)
    run(tmp_path, 2, limit=limit)
    gc.collect()
    time.sleep(0.02)
    if company:
        disk._tiers[tmp_path] = tier
        other = torchcache.mark(Net(9), freeze=True, persistent=True, persistent_cache_dir=tmp_path, audit=0)
        step(other, 9, 10)
    del tier, first
    gc.collect()
    if company:
        with torch.no_grad():
            other.weight.copy_(Net(8).weight)
        step(other, 8, 10)
    run(tmp_path, 3, limit=limit)
    gc.collect()
    assert there(tmp_path, 1) == ROWS
    assert there(tmp_path, 2) < ROWS


def test_the_first_rows_of_a_region_go_first_and_a_few_at_a_time(tmp_path):
    run(tmp_path, 1)
    gc.collect()
    run(tmp_path, 2, rows=150)
    gc.collect()
    assert there(tmp_path, 2, 150) == 150
    net = run(tmp_path, 1, limit=0)
    left = torchcache.stats(net).regions[0].disk_hits
    assert ROWS // 2 < left < ROWS
    assert there(tmp_path, 1, 50) == 0


@pytest.mark.parametrize("limit", [0, 1000, LIMIT // 10])
def test_a_run_that_allows_much_less_does_not_empty_the_directory(tmp_path, monkeypatch, warnings, limit):
    monkeypatch.setattr(room, "OTHERS_BYTES", LIMIT // 10)
    run(tmp_path, 1)
    gc.collect()
    run(tmp_path, 2, limit=limit)
    gc.collect()
    assert there(tmp_path, 1) == ROWS
    assert there(tmp_path, 2) == 0
    assert "no more rows are stored" in warnings[0]


def test_rows_without_a_region_give_way(tmp_path):
    run(tmp_path, 1)
    gc.collect()
    with contextlib.closing(sqlite3.connect(tmp_path / "rows-1" / "cache.db", isolation_level=None)) as connection:
        connection.execute("UPDATE Cache SET tag = CASE rowid % 3 WHEN 0 THEN NULL WHEN 1 THEN 7 ELSE 'x' END")
    run(tmp_path, 2)
    assert there(tmp_path, 2) == ROWS


def test_rows_in_use_stay_and_new_ones_are_refused(tmp_path, warnings):
    first = run(tmp_path, 1)
    second = run(tmp_path, 2)
    assert there(tmp_path, 1) == ROWS
    kept = there(tmp_path, 2)
    assert kept < ROWS // 2
    assert len([text for text in warnings if "in use" in text]) == 1
    assert used(tmp_path) <= LIMIT + 100_000
    for net, seed in ((first, 1), (second, 2)):  # a scan keeps its share
        step(net, seed)
    assert there(tmp_path, 2) == kept


def test_a_model_that_is_gone_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pause, "FIRST_SECONDS", 0.0)
    first, second = run(tmp_path, 1), run(tmp_path, 2)
    assert there(tmp_path, 2) < ROWS
    del first
    gc.collect()
    torchcache.unmark(second)
    run(tmp_path, 2)
    assert there(tmp_path, 2) == ROWS


def test_weights_that_change_leave_the_last_few_identities_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(in_use, "KEPT", 2)
    net = run(tmp_path, 0, rows=100)
    for seed in range(1, 12):
        with torch.no_grad():
            net.weight.copy_(Net(seed).weight)
        for _ in range(2):  # what never serves is given up
            step(net, seed, 100)
    held = [there(tmp_path, seed, 100) for seed in range(12)]
    assert held[10:] == [100, 100]
    assert held[0] == 0


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_room import *
net = run(Path(sys.argv[1]), int(sys.argv[2]))
print("holds", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def holder(directory, seed):
    arguments = [sys.executable, "-c", textwrap.dedent(HOLDER), str(directory), str(seed), os.path.dirname(__file__)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"holds\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@posix
@pytest.mark.parametrize("state", ["running", "stopped"])
def test_another_process_holds_its_rows_as_long_as_it_lives(tmp_path, state):
    with holder(tmp_path, 1) as process:
        if state == "stopped":
            process.send_signal(signal.SIGSTOP)
        for path in (tmp_path / "regions").iterdir():  # it is not the time that tells
            path.write_text(path.read_text().replace('"last_used": 1', '"last_used": 0'))
        run(tmp_path, 2)
        assert there(tmp_path, 1) == ROWS
        assert there(tmp_path, 2) < ROWS // 2
        process.kill()
        process.wait()
    run(tmp_path, 2)
    assert there(tmp_path, 2) == ROWS
    gc.collect()
    assert told(tmp_path) == []


@posix
def test_a_fork_that_outlives_its_parent_holds_nothing_that_it_does_not_use(tmp_path):
    code = """
    import os, sys, time
    sys.path.insert(0, sys.argv[2])
    from test_room import *
    net = run(Path(sys.argv[1]), 1)
    if not os.fork():
        print(os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), os.path.dirname(__file__)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        parent.wait()
        try:
            run(tmp_path, 2)
            assert there(tmp_path, 2) == ROWS
        finally:
            os.kill(child, signal.SIGKILL)


def test_where_locks_do_not_work_what_was_used_in_the_last_hour_stays(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(in_use, "fcntl", None)
    run(tmp_path, 1)
    gc.collect()
    run(tmp_path, 2)
    assert there(tmp_path, 1) == ROWS
    assert there(tmp_path, 2) < ROWS // 2
    assert len([text for text in warnings if "in use" in text]) == 1
    gc.collect()
    with contextlib.closing(sqlite3.connect(tmp_path / "rows-1" / "cache.db", isolation_level=None)) as connection:
        connection.execute("UPDATE Cache SET store_time = store_time - 7200")
    for path in (tmp_path / "regions").iterdir():
        path.write_text(path.read_text().replace('"last_used": 1', '"last_used": 0'))
    run(tmp_path, 3)
    assert there(tmp_path, 3) == ROWS


@posix
@pytest.mark.parametrize("strange", ["pipe", "link", "folder", "endless", "many", "noise", "forbidden"])
def test_strange_files_among_those_in_use_cost_room_at_most(tmp_path, strange, warnings):
    run(tmp_path, 1)
    gc.collect()
    folder, path = tmp_path / "in-use", tmp_path / "in-use" / "0123456789abcdef.txt"
    if strange == "pipe":
        os.mkfifo(path)
    elif strange == "link":
        path.symlink_to("/dev/zero")
    elif strange == "folder":
        folder.rmdir()
        folder.symlink_to(tmp_path.parent)
    elif strange == "endless":
        with open(path, "wb") as file:
            file.truncate(2**40)
    elif strange == "many":
        for number in range(5000):
            (folder / f"{number:016x}.txt").write_bytes(b"x")
    else:
        path.write_bytes(os.urandom(5000))
        path.chmod(0)
    run(tmp_path, 2)
    run(tmp_path, 3)
    assert not [text for text in warnings if "full" not in text]
    assert os.path.islink(path) or strange != "link"


@posix
def test_a_lock_that_somebody_holds_for_ever_costs_room_and_nothing_else(tmp_path):
    import fcntl

    run(tmp_path, 1)
    gc.collect()
    tags = [path.stem for path in (tmp_path / "regions").iterdir()]
    with open(tmp_path / "in-use" / f"{7:016x}.txt", "w") as file:
        file.write("\n".join(tags))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        run(tmp_path, 2)
        assert there(tmp_path, 1) == ROWS
        gc.collect()
    run(tmp_path, 2)
    assert there(tmp_path, 2) == ROWS


def test_a_row_that_goes_while_it_is_read_is_a_miss_and_no_damage(tmp_path, warnings, monkeypatch):
    width, limit = 40_000, 30 * 4 * 40_000
    run(tmp_path, 1, 24, limit, width)
    gc.collect()
    reader = DiskTier(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "rows-1" / "cache.db")) as connection:
        keys = [key for (key,) in connection.execute("SELECT key FROM Cache")]
    found = reader.read(keys)
    run(tmp_path, 2, 24, limit, width)
    assert len(found) == 24
    gone = {key: blob for key, blob in found.items() if not os.path.exists(blob.path)}
    assert gone
    assert reader.remove(Region("", ""), gone)
    assert reader.errors == 0
    assert warnings == []


def fill(directory, seed, endless):
    torch.set_num_threads(1)
    net = run(directory, seed)
    while endless:
        step(net, seed)
        run(directory, seed)


@posix
def test_processes_that_fill_one_small_directory_at_once_keep_its_limit_and_right_rows(tmp_path):
    run(tmp_path, 99)
    torchcache.flush()
    gc.collect()
    context = multiprocessing.get_context("fork")
    for turn in range(3):
        children = [
            context.Process(target=fill, args=(tmp_path, 10 * turn + number, number < 2)) for number in range(4)
        ]
        for child in children:
            child.start()
        for child in children[2:]:
            child.join(120)
            assert child.exitcode == 0
        for child in children[:2]:
            child.kill()
            child.join(60)
        assert used(tmp_path) <= LIMIT + 4 * 50 * (4 * WIDTH + 400)
    assert there(tmp_path, 99) == 0
    run(tmp_path, 50)
    assert there(tmp_path, 50) == ROWS
    assert main(["verify", str(tmp_path), "--no-repair"]) == 0
