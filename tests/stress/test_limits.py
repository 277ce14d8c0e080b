"""Limits of memory and disk are hard, over models, processes and runs; what does not fit is computed."""

import gc
import multiprocessing
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from trained import Run

import torchcache

BATCH = 50
# A batch of small rows and one of large ones, as blobs and with what the database adds.
BATCH_BYTES = BATCH * (16 * 4 * 4 + 400) + 4 * 12_000 * 4 * 4


def used(directory):
    """Bytes of the database and of the files beside it."""
    with closing(sqlite3.connect(next(directory.rglob("cache.db")))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def fill(directory, start, limit):
    torch.set_num_threads(1)
    run = Run(directory, max_persistent_cache_size=limit)
    for batch in range(start, start + 12):
        run.step(range(batch * BATCH, (batch + 1) * BATCH))
        run.step(range(batch * 4, batch * 4 + 4), "large")
    torchcache.flush()


@pytest.mark.parametrize("limit", [300_000, 3_000_000])
def test_the_disk_limit_holds_over_processes_and_runs(tmp_path, limit):
    directory, processes = tmp_path / "cache", 4
    Run(directory)
    for run in range(2):
        children = [
            multiprocessing.get_context("fork").Process(target=fill, args=(directory, 100 * run + 20 * number, limit))
            for number in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
            assert child.exitcode == 0
        # A large row that does not fit in has all others wait.
        assert limit // 3 < used(directory) <= limit + processes * BATCH_BYTES


def test_when_the_disk_limit_is_reached_caching_stops_and_training_does_not(tmp_path, warnings):
    run = Run(tmp_path / "cache", max_persistent_cache_size=200_000)
    run.steps(2000, 0)
    run.steps(2000, 0)
    assert run.count("memory_hits") == 2000
    assert 0 < run.count("rows_written") < 2000
    assert run.count("disk_errors") == 0
    assert len(warnings) == 1
    assert "full" in warnings[0]
    again = Run(tmp_path / "cache", max_persistent_cache_size=200_000)
    again.steps(2000, 0)
    assert again.count("disk_hits") == run.count("rows_written")


def test_the_memory_limit_holds_over_shapes_weights_and_epochs(tmp_path):
    limit = 100 * 16 * 4 * 4
    model = torchcache.mark(torch.nn.Linear(4, 64), freeze=True, max_memory_cache_size=limit)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for length in (1, 2, 5):
            x = torch.randn(40, length, 4, generator=generator)
            plain = torchcache.unmark(torch.nn.Linear(4, 64))
            plain.load_state_dict(model.state_dict())
            for _ in range(2):
                torch.testing.assert_close(model(x), plain(x))
            (region,) = torchcache.stats(model).regions
            assert region.memory_bytes <= limit
        with torch.no_grad():
            model.weight.add_(1)
    assert region.memory_hits > 0
    assert region.memory_bytes > limit // 2


def test_what_is_learnt_of_outputs_of_every_length_holds_none_of_them():
    model = torchcache.mark(torch.nn.Embedding(10, 1024), freeze=True, max_memory_cache_size=100_000)
    for length in range(100, 130):
        model(torch.randint(10, (4, length)))
    gc.collect()
    held = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.shape[2:] == (1024,))
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in held}
    assert sum(storages.values()) < 1_000_000


def open_files(directory):
    links = [path for path in Path("/proc/self/fd").iterdir() if path.exists() or path.is_symlink()]
    return [name for name in (os.readlink(link) for link in links if link.is_symlink()) if name.startswith(directory)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts this process's open files")
@pytest.mark.parametrize("fate", ["kept", "deleted in mid run"])
def test_models_that_are_gone_leave_no_file_of_their_directories_open(tmp_path, fate):
    for number in range(5):
        directory = tmp_path / str(number)
        run = Run(directory)
        run.steps(100, 4)
        if fate == "deleted in mid run":
            shutil.rmtree(directory)
            run.steps(150, 8)
            assert run.count("rows_written") > 104
    assert open_files(str(tmp_path))
    del run
    gc.collect()
    assert open_files(str(tmp_path)) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts this process's open files")
def test_a_directory_that_is_deleted_time_and_again_leaves_no_file_open(tmp_path):
    run, counts = Run(tmp_path / "cache"), []
    for end in range(50, 400, 50):
        run.steps(end, 4)
        counts.append(len(open_files(str(tmp_path))))
        shutil.rmtree(tmp_path / "cache")
    assert counts[-1] <= counts[1]
