"""Encoders within the workers of a loader and other children: what they store outlives them."""

import multiprocessing

import pytest
import torch
from encoded import ROWS, Encoded, child, encoder
from torch.utils.data import DataLoader

import torchcache


def load(directory, start):
    loader = DataLoader(Encoded(directory), batch_size=4, num_workers=2, multiprocessing_context=start)
    return torch.cat(list(loader))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_write_what_they_hold_before_they_end(start, tmp_path):
    rows = load(tmp_path, start)
    net = encoder(tmp_path)
    torch.testing.assert_close(net(Encoded(tmp_path).data), rows)
    region = torchcache.stats(net).regions[0]
    assert (region.misses, region.disk_hits) == (0, ROWS)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_children_write_what_they_hold_before_they_end(start, tmp_path):
    process = multiprocessing.get_context(start).Process(target=child, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    net = encoder(tmp_path)
    net(Encoded(tmp_path).data)
    assert torchcache.stats(net).misses == 0


def test_memory_within_a_worker_is_told(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("TORCHCACHE_LOG_FILE", str(log))
    load(None, "spawn")
    assert log.read_text().count("set persistent=True") == 2  # once a worker
