"""What a user writes between two epochs to what a data set holds shows in the next one."""

from __future__ import annotations

import multiprocessing
import multiprocessing.managers
import socket
import time

import numpy as np
import pytest
import torch
from torch.utils import data

import torchcache
from torchcache.lazy.tensor import LazyTensor

COUNT = 24


class Images(data.Dataset):
    """Images with labels; loading one takes long enough to be worth remembering."""

    def __init__(self, images=None, labels=None):
        random = np.random.default_rng(0)
        self.images = random.random((COUNT, 3, 32, 32), np.float32) if images is None else images
        self.labels = [0] * COUNT if labels is None else labels

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        time.sleep(1e-4)
        return torch.as_tensor(self.images[index]) * 2, int(self.labels[index])


def exposed():
    labels = torch.zeros(200_000, dtype=torch.int64)
    return labels, labels.numpy()


def shared():
    labels = torch.zeros(200_000, dtype=torch.int64).share_memory_()
    return labels, labels.data


def of_an_array():
    labels = np.zeros(200_000, np.int64)
    return torch.from_numpy(labels), labels


def alike():
    labels = np.zeros(200_000, np.int64)
    return labels, labels


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("made", [alike, of_an_array, exposed, shared])
def test_a_label_among_many_that_is_written_between_epochs_shows_at_once(made, workers):
    labels, written = made()
    loader = torchcache.DataLoader(Images(labels=labels), batch_size=8, num_workers=workers, check=0.0)
    expected = [0] * COUNT
    for epoch in range(5):
        if epoch > 1:
            expected[3 * epoch] = 1
            written[3 * epoch] = 1
        assert [label for _, batch in loader for label in batch.tolist()] == expected, f"epoch {epoch}"


def test_a_number_of_an_image_that_is_written_between_epochs_shows_at_once():
    files = Images(np.random.default_rng(0).random((COUNT, 3, 128, 128), np.float32))
    loader, lazy = torchcache.DataLoader(files, batch_size=8, check=0.0), 0
    body = torchcache.mark(torch.nn.Flatten().eval())
    for epoch in range(8):
        if epoch in (4, 6):
            files.images[epoch, 1, 77, 5] += 1
        for first, (x, _) in enumerate(loader):
            lazy += type(x) is LazyTensor
            assert torch.equal(body(x), torch.from_numpy(files.images[8 * first : 8 * first + 8]).flatten(1) * 2)
    assert lazy >= 6


class Own(multiprocessing.managers.NamespaceProxy):
    """A proxy whose class is the user's."""


def _in_another_process(manager):
    held = manager.Namespace(epoch=0)
    return {
        "dict": (manager.dict(epoch=0), lambda it: it["epoch"]),
        "list": (manager.list([0]), lambda it: it[0]),
        "value": (manager.Value("i", 0), lambda it: it.value),
        "namespace": (held, lambda it: it.epoch),
        "own class": (Own(held._token, held._serializer, authkey=held._authkey), lambda it: it.epoch),
        "queue": (multiprocessing.Queue(), lambda it: it.qsize()),
        "simple queue": (multiprocessing.SimpleQueue(), lambda it: int(it.empty())),
        "connection": (multiprocessing.Pipe()[0], lambda it: int(it.poll())),
        "socket": (socket.socket(), lambda it: it.fileno()),
    }


class Elsewhere(Images):
    """Images that depend on what another process holds."""

    def __init__(self, there, read):
        super().__init__()
        self.there, self.read = there, read

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + self.read(self.there), label


class Body(torch.nn.Module):
    def __init__(self, there, read):
        super().__init__()
        self.there, self.read = there, read

    def forward(self, x):
        return x.flatten(1) + self.read(self.there)


@pytest.fixture(scope="module")
def in_another_process():
    with multiprocessing.Manager() as manager:
        yield _in_another_process(manager)


@pytest.mark.parametrize(
    "kind", ["dict", "list", "value", "namespace", "own class", "queue", "simple queue", "connection", "socket"]
)
def test_what_another_process_holds_is_asked_for_every_time(kind, in_another_process):
    files = Elsewhere(*in_another_process[kind])
    loader, body = (
        torchcache.DataLoader(files, batch_size=8, check=0.0),
        torchcache.mark(Body(*in_another_process[kind])),
    )
    for _ in range(4):
        for x, _ in loader:
            body(x)
    assert torchcache.stats(loader).skipped == 0
    assert "there" in torchcache.stats(loader).reason
    assert torchcache.stats(body).hits == 0


def test_a_dict_of_a_manager_that_is_written_between_epochs_shows_at_once(in_another_process):
    there, read = in_another_process["dict"]
    files = Elsewhere(there, read)
    loader, body = torchcache.DataLoader(files, batch_size=COUNT, check=0.0), torchcache.mark(Body(there, read))
    for epoch in range(6):
        there["epoch"] = epoch
        for x, _ in loader:
            expected = torch.from_numpy(files.images) * 2 + epoch
            assert torch.equal(x + 0, expected)
            assert torch.equal(body(x), expected.flatten(1) + epoch)
