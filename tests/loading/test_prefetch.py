"""Look-ahead: the same batches and the same answers, with the work done before the step asks for it."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import torchcache


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 16)

    def forward(self, x):
        return self.linear(x)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torchcache.mark(Backbone(), freeze=True, **options)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


DATA = torch.randn(64, 8)


def batches(form=lambda x, y: (x, y)):
    return [form(DATA[start : start + 8].clone(), torch.arange(8)) for start in range(0, 64, 8)]


@pytest.mark.parametrize("door", ["transform", "eager"])
def test_a_warm_run_finds_its_rows_in_memory(tmp_path, door, monkeypatch):
    def model():
        found = Model(persistent=True, persistent_cache_dir=str(tmp_path))
        return torchcache.transform(found) if door == "transform" else found

    first = model()
    expected = [first(x) for x, _ in batches()]
    torchcache.flush()
    hashed = []
    digest_rows = torchcache.digest.rows.digest_rows
    monkeypatch.setattr(
        torchcache.digest.rows,
        "digest_rows",
        lambda rows, *others: hashed.append(rows[0].shape[0]) or digest_rows(rows, *others),
    )
    warm = model()
    loader = torchcache.prefetch(batches())
    for epoch in range(2):
        for (x, _), wanted in zip(loader, expected, strict=True):
            torch.testing.assert_close(warm(x), wanted)
        stats = torchcache.stats(warm)
        assert (stats.hits, stats.misses) == (64 * (epoch + 1), 0)
    assert len(hashed) >= 16  # in each step, whatever was read ahead
    (region,) = stats.regions
    # The first batch teaches where its rows come from, and by then the second was there already.
    assert region.disk_hits == 16


@pytest.mark.parametrize(
    "form", [lambda x, y: x, lambda x, y: [x, y], lambda x, y: {"y": y, "x": x}, lambda x, y: (y, ({"deep": x},))]
)
def test_batches_of_any_form_come_as_they_are(form):
    given = batches(form)
    loader = torchcache.prefetch(given)
    assert len(loader) == 8
    assert all(one is other for one, other in zip(loader, given, strict=True))


def test_rows_that_memory_has_no_room_for_are_read_once(tmp_path, monkeypatch):
    options = {"persistent": True, "persistent_cache_dir": str(tmp_path), "max_memory_cache_size": 16 * 4 * 4}
    first = Model(**options)
    expected = [first(x) for x, _ in batches()]
    torchcache.flush()
    warm = Model(**options)
    reads = []
    read = torchcache.store.disk.DiskTier.read
    monkeypatch.setattr(
        torchcache.store.disk.DiskTier, "read", lambda self, keys, *others: reads.append(len(keys)) or read(self, keys)
    )
    for (x, _), wanted in zip(torchcache.prefetch(batches()), expected, strict=True):
        torch.testing.assert_close(warm(x), wanted)
    assert torchcache.stats(warm).misses == 0
    assert sum(reads) == 64


@pytest.mark.parametrize(
    "double", [lambda x: x.mul_(2), lambda x: x.data.mul_(2), lambda x: np.multiply(x, 2, out=x.numpy())]
)
def test_a_batch_changed_in_the_loop_has_rows_of_its_own(double, tmp_path):
    model, loader = Model(persistent=True, persistent_cache_dir=str(tmp_path), audit=0), torchcache.prefetch(batches())
    for _ in range(3):
        for x, _ in loader:
            model(x)
            double(x)
            torch.testing.assert_close(model(x), model.head(model.backbone.linear(x)))
    for x, _ in loader:
        double(x)
        torch.testing.assert_close(model(x), model.head(model.backbone.linear(x)))


def test_changed_weights_do_not_get_rows_found_ahead(tmp_path):
    model = Model(persistent=True, persistent_cache_dir=str(tmp_path))
    for _ in range(2):
        for x, _ in torchcache.prefetch(batches()):
            with torch.no_grad():
                model.backbone.linear.weight.add_(1)
            torch.testing.assert_close(model(x), model.head(model.backbone.linear(x)))


def test_leaving_early_and_errors_of_the_loader_pass():
    def failing():
        yield DATA[:8].clone()
        yield DATA[8:16].clone()
        raise OSError("no more data")

    model = Model()
    for x in torchcache.prefetch(batches()):
        model(x[0])
        break
    loader = iter(torchcache.prefetch(failing()))
    assert torch.equal(next(loader), DATA[:8])
    assert torch.equal(next(loader), DATA[8:16])
    with pytest.raises(OSError, match="no more data"):
        next(loader)
    assert not torchcache.digest.ahead._active


def test_a_data_loader_keeps_its_attributes_and_workers():
    dataset = torch.utils.data.TensorDataset(DATA)
    loader = torchcache.prefetch(torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, num_workers=1))
    assert loader.dataset is dataset
    assert loader.batch_size == 8
    model = Model()
    for _ in range(2):
        for (x,) in loader:
            torch.testing.assert_close(model(x), model.head(model.backbone.linear(x)))
    assert (torchcache.stats(model).misses, torchcache.stats(model).hits) == (64, 64)


def test_two_loops_at_once_do_not_disturb_each_other():
    model = Model()
    for (x, _), (other, _) in zip(torchcache.prefetch(batches()), torchcache.prefetch(batches()[::-1]), strict=True):
        for rows in (x, other):
            torch.testing.assert_close(model(rows), model.head(model.backbone.linear(rows)))


def one_buffer(form):
    """Every batch in the memory of the one before."""
    memory = torch.empty(8, 8)
    for start in range(0, 64, 8):
        yield form(memory.copy_(DATA[start : start + 8]))


def ring_of_two(form):
    """Asked for a batch, it begins at once to fill the memory of the one before with the one behind."""
    ring = [DATA[:8].clone(), torch.empty(8, 8)]
    for turn, start in enumerate(range(0, 64, 8)):
        if start < 56:
            ring[(turn + 1) % 2].copy_(DATA[start + 8 : start + 16])
        yield form(ring[turn % 2])


def labelled(x):
    x.label = "x"
    return x


class Batch(collections.UserDict):
    pass


@dataclasses.dataclass
class Whole:
    x: torch.Tensor


IN_ONE_MEMORY = {
    "a tensor": (lambda x: x, lambda x: x),
    "a slice": (lambda x: (x[:, :4], x[:, 4:]), lambda batch: torch.cat(batch, 1)),
    "an array": (lambda x: x.numpy(), torch.from_numpy),
    "a tensor of an array": (lambda x: [torch.from_numpy(x.numpy())], lambda batch: batch[0]),
    "deep inside": (lambda x: {"a": [({"x": x},)]}, lambda batch: batch["a"][0][0]["x"]),
    "a mapping": (lambda x: Batch(x=x), lambda batch: batch["x"]),
    "a data class": (Whole, lambda batch: batch.x),
    "a tensor of zero strides": (lambda x: x[:, None].expand(8, 2, 8), lambda x: x[:, 1]),
    "a tensor with an attribute": (labelled, lambda x: x),
}


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("loader", [one_buffer, ring_of_two])
@pytest.mark.parametrize("form", IN_ONE_MEMORY)
def test_a_loader_that_writes_over_its_batches_gives_each_as_it_was(form, loader, device):
    made, taken = IN_ONE_MEMORY[form]
    model = Model()
    for batch, start in zip(torchcache.prefetch(loader(made), device), range(0, 64, 8), strict=True):
        assert torch.equal(taken(batch), DATA[start : start + 8])
        torch.testing.assert_close(model(taken(batch)), model.head(model.backbone.linear(DATA[start : start + 8])))


def test_a_torch_loader_with_a_collate_function_that_keeps_its_memory_gives_each_batch_as_it_was():
    memory = torch.empty(8, 8)
    options = {"batch_size": 8, "collate_fn": lambda rows: torch.stack([x for (x,) in rows], out=memory)}
    dataset = torch.utils.data.TensorDataset(DATA)
    for loader in (torch.utils.data.DataLoader(dataset, **options), torchcache.DataLoader(dataset, **options)):
        for _ in range(3):
            for batch, start in zip(torchcache.prefetch(loader), range(0, 64, 8), strict=True):
                assert torch.equal(batch, DATA[start : start + 8])


def test_what_cannot_be_copied_is_said_once(caplog):
    for _ in range(2):
        assert len(list(torchcache.prefetch(one_buffer(Whole)))) == 8
    (said,) = [record.getMessage() for record in caplog.records if "Whole" in record.getMessage()]
    assert "torch.utils.data.DataLoader with workers" in said


def test_a_copied_batch_lies_as_the_loaders_does():
    given = [DATA.reshape(8, 2, 4, 8).to(memory_format=torch.channels_last), DATA[:, 3], DATA.T, DATA[:0], DATA[0, 0]]
    for one, other in zip(torchcache.prefetch(x for x in given), given, strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
