"""A run that finds rows on disk has the others read while its steps run."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import torchcache
from torchcache.store.disk import DiskTier

ROWS, BATCH = 2048, 256


def model(directory, **options):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
    return torchcache.mark(backbone, freeze=True, persistent=True, persistent_cache_dir=directory, **options)


@pytest.fixture
def filled(tmp_path):
    """A directory with the rows of ``x``, and ``x``."""
    torch.manual_seed(1)
    x = torch.randn(ROWS, 8)
    for part in x.split(BATCH):
        model(tmp_path)(part)
    torchcache.flush()
    return tmp_path, x


def wait_for_scans():
    for thread in threading.enumerate():
        if thread.name == "torchcache-scan":
            thread.join()


def test_rows_are_in_memory_before_they_are_asked_for(filled, monkeypatch):
    directory, x = filled
    asked = []
    read = DiskTier.read
    monkeypatch.setattr(DiskTier, "read", lambda self, keys, *others: asked.append(len(keys)) or read(self, keys))
    warm, plain = model(directory), torchcache.unmark(model(directory))
    for part in x.split(BATCH):
        torch.testing.assert_close(warm(part), plain(part))
        wait_for_scans()
    stats = torchcache.stats(warm)
    assert (stats.misses, stats.regions[0].disk_hits, stats.regions[0].rows_stored) == (0, ROWS, ROWS)
    assert sum(asked) < ROWS // 2
    warm(x)
    assert torchcache.stats(warm).regions[0].memory_hits == ROWS


def test_small_batches_have_rows_read_ahead_as_well(filled):
    directory, x = filled
    warm = model(directory)
    for part in x[: ROWS // 2].split(8):
        warm(part)
    wait_for_scans()
    assert torchcache.stats(warm).regions[0].rows_stored > ROWS * 3 // 4


def test_a_run_on_few_rows_reads_few_more(filled):
    directory, x = filled
    warm = model(directory)
    warm(x[:64])
    wait_for_scans()
    warm(x[:64])
    wait_for_scans()
    assert torchcache.stats(warm).regions[0].rows_stored <= 64 + 8 * 64


def test_at_most_half_of_the_memory_is_filled_ahead(filled):
    directory, x = filled
    size = 32 * 4
    warm = model(directory, max_memory_cache_size=ROWS * size)
    for _ in range(16):
        warm(x[:BATCH])
        wait_for_scans()
    assert torchcache.stats(warm).regions[0].memory_bytes <= ROWS * size // 2


def test_damage_met_ahead_is_dropped_and_computed_anew(filled, monkeypatch):
    directory, x = filled
    read_at = DiskTier.read_at

    def damaged(self, *arguments):
        return {key: bytes(len(blob)) for key, blob in read_at(self, *arguments).items()}

    monkeypatch.setattr(DiskTier, "read_at", damaged)
    warm, plain = model(directory), torchcache.unmark(model(directory))
    for part in x.split(BATCH):
        torch.testing.assert_close(warm(part), plain(part))
        wait_for_scans()
    stats = torchcache.stats(warm)
    assert stats.regions[0].disk_errors
    assert stats.misses
    assert stats.hits + stats.misses == ROWS


EXITING = """
import sys, threading
from pathlib import Path
import torch
import torchcache
sys.path.insert(0, sys.argv[1])
from test_read_ahead import BATCH, ROWS, model
torch.manual_seed(1)
x = torch.randn(ROWS, 8)
warm = model(Path(sys.argv[2]))
warm(x[:BATCH]), warm(x[BATCH : 2 * BATCH])
print("reading" if any(thread.name == "torchcache-scan" for thread in threading.enumerate()) else "done")
"""


def test_a_process_ends_well_while_rows_are_read_ahead(filled, monkeypatch):
    directory, _ = filled
    here = os.path.dirname(__file__)
    # Slow to read, so that the thread is still at it in the end.
    slow = (
        "from torchcache.store import scan; scan.IN_DATABASE = 0  # a thread reads, whatever is quicker\n"
        "from torchcache.store.disk import DiskTier; import torch; read = DiskTier.read_at\n"
        "def slowly(*arguments):\n"
        "    for _ in range(500): torch.ones(1000, 1000).sum()\n"
        "    return read(*arguments)\n"
        "DiskTier.read_at = slowly\n"
    )
    said = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", slow + EXITING, here, str(directory)], capture_output=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert b"reading\n" in said
