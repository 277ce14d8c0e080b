"""Encoders within the workers of a loader and other children: what they store outlives them."""

import multiprocessing

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torchcache

ROWS = 48


def encoder(directory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16)).eval()
    return torchcache.mark(net, freeze=True, persistent=directory is not None, persistent_cache_dir=directory)


class Encoded(Dataset):
    """Samples that are encoded where they are loaded."""

    def __init__(self, directory):
        self.directory = directory
        self.data = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))
        self.net = None

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.net = self.net or encoder(self.directory)
        return self.net(self.data[index : index + 1])[0].clone()


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


def child(directory):
    encoder(directory)(Encoded(directory).data)


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
