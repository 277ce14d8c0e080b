"""The loader gives what PyTorch's gives, and loads what something other than a cached model looks at."""

from __future__ import annotations

import collections
import pickle
import random
import subprocess
import sys

import changing
import numpy as np
import pytest
import torch
from image_files import SHAPE, Files, Model, encoder, train
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils import data

import torchcache
from torchcache.identity.program import Program
from torchcache.identity.state import State
from torchcache.lazy.rows import Held
from torchcache.lazy.tensor import LazyTensor
from torchcache.loading.remembered import Remembered

WORKERS = [pytest.param(0, id="no_workers"), pytest.param(2, id="two_workers")]


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "files", 40)


def equal(one, other):
    """Whether batches are equal, value for value."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one + 0, other + 0)
    if isinstance(one, dict):
        return (
            type(one) is type(other) and list(one) == list(other) and all(equal(one[name], other[name]) for name in one)
        )
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("workers", WORKERS)
def test_training_is_that_with_torchs_loader_and_loads_nothing_later(files, workers):
    options = {"batch_size": 8, "shuffle": True, "num_workers": workers}
    torch.manual_seed(3)
    expected = train(data.DataLoader(files, **options), Model(), 5)
    files.loads()
    torch.manual_seed(3)
    loads = []
    loader, model = torchcache.DataLoader(files, check=0.0, **options), Model(audit=0.0)
    assert train(loader, model, 5, lambda _: loads.append(files.loads())) == pytest.approx(expected, abs=1e-5)
    assert set(loads[0]) == set(range(40))
    assert [*map(len, loads[2:])] == [0, 0, 0]
    assert torchcache.stats(model).regions[0].unloaded >= 3 * 40
    assert torchcache.stats(loader).samples == 40


@pytest.mark.parametrize("workers", WORKERS)
def test_order_and_random_state_are_those_of_torchs_loader(files, workers):
    def run(kind):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        loader = kind(files, batch_size=7, shuffle=True, num_workers=workers)
        labels = [[y.tolist() for _, y in loader] for _ in range(3)]
        return labels, torch.rand(1).item(), random.random(), np.random.rand()

    assert run(torchcache.DataLoader) == run(data.DataLoader)


def test_a_generator_is_drawn_from_as_by_torchs_loader(files):
    def run(kind):
        generator = torch.Generator().manual_seed(2)
        loader = kind(files, batch_size=16, shuffle=True, generator=generator)
        return [[y.tolist() for _, y in loader] for _ in range(3)], generator.get_state().tolist()

    assert run(torchcache.DataLoader) == run(data.DataLoader)


class Shaped(Files):
    """Samples in the structure that ``form`` gives them."""

    def __init__(self, folder, form):
        super().__init__(folder, 12)
        self.form = form

    def __getitem__(self, index):
        return FORMS[self.form](self.read(index), index)


Pair = collections.namedtuple("Pair", "image label")
FORMS = {
    "tuple": lambda x, i: (x, i),
    "named": lambda x, i: Pair(x, float(i)),
    "dict": lambda x, i: {"image": x, "name": f"sample {i}", "where": {"box": torch.tensor([i, i + 1]), "ok": i > 3}},
    "list": lambda x, i: [x, x * 2, np.int64(i)],
    "alone": lambda x, i: x,
    "array": lambda x, i: (x.numpy(), np.float32(i)),
    "nested": lambda x, i: ((x, {"y": i}), b"bytes", -0.0 if i % 2 else float("nan")),
    "slanted": lambda x, i: (x.permute(1, 2, 0), i),
    "half": lambda x, i: (x.half(), torch.tensor(i)),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_equal_value_for_value_in_every_epoch(tmp_path, form):
    files = Shaped(tmp_path / "files", form)
    expected = list(data.DataLoader(files, batch_size=5))
    loader = torchcache.DataLoader(files, batch_size=5, check=0.0)
    for _ in range(2):
        assert [*map(repr, loader)] == [*map(repr, expected)]
    assert any(isinstance(leaf, LazyTensor) for leaf in pytree.tree_leaves(next(iter(loader))))
    assert [*map(repr, loader)] == [*map(repr, expected)]


def collate_in_pairs(samples):
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": list(labels)}


def collate_by_default(samples):
    return data.default_collate(samples)


def collate_parts_by_default(samples):
    return {"images": data.default_collate([x for x, _ in samples]), "labels": [y for _, y in samples]}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("collate", [collate_by_default, collate_parts_by_default])
def test_default_collate_in_a_collate_function_of_ones_own_loads_nothing(files, workers, collate):
    body, expected = encoder(), list(data.DataLoader(files, batch_size=8, collate_fn=collate))
    loader = torchcache.DataLoader(files, batch_size=8, collate_fn=collate, num_workers=workers, check=0.0)
    for _ in range(5):
        for batch, wanted in zip(loader, expected, strict=True):
            (x, *_), (plain, *_) = (pytree.tree_leaves(one) for one in (batch, wanted))
            with torchcache.bypass():
                made = body(plain)
            assert torch.allclose(body(x), made, atol=1e-4)
    assert torchcache.stats(loader).skipped >= 2 * 40
    assert not torchcache.stats(loader).reason
    assert equal(list(loader), expected)


def test_a_function_of_ones_own_in_the_table_of_default_collate_gets_lazy_tensors_too(files, monkeypatch):
    table = data._utils.collate.default_collate_fn_map
    monkeypatch.setitem(table, torch.Tensor, lambda batch, *, collate_fn_map=None: torch.stack(batch) * 2)
    loader = torchcache.DataLoader(files, batch_size=8, collate_fn=collate_by_default, check=0.0)
    for _ in range(3):
        assert equal(list(loader), list(data.DataLoader(files, batch_size=8, collate_fn=collate_by_default)))


def collate_by_mean(samples):
    return torch.stack([x for x, _ in samples]), torch.tensor([x.mean().item() for x, _ in samples])


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("collate", [collate_in_pairs, collate_by_mean])
def test_a_collate_function_of_ones_own_gets_samples_that_may_be_lazy(files, workers, collate):
    expected = list(data.DataLoader(files, batch_size=8, collate_fn=collate))
    loader = torchcache.DataLoader(files, batch_size=8, collate_fn=collate, num_workers=workers)
    for _ in range(3):
        assert equal(list(loader), expected)


class Noisy(Files):
    def __getitem__(self, index):
        return self.read(index) + torch.randn(SHAPE), index % 5


class OwnNoise(Files):
    def __init__(self, folder, count):
        super().__init__(folder, count)
        self.random = np.random.default_rng(0)

    def __getitem__(self, index):
        return self.read(index) + float(self.random.random()), index % 5


@pytest.mark.parametrize("kind", [Noisy, OwnNoise])
@pytest.mark.parametrize("workers", WORKERS)
def test_augmented_samples_are_loaded_in_every_epoch_and_that_is_said(tmp_path, kind, workers, caplog):
    def run(loader):
        torch.manual_seed(0)
        return [[x + 0 for x, _ in loader] for _ in range(3)]

    loader = torchcache.DataLoader(kind(tmp_path / "a", 20), batch_size=4, num_workers=workers)
    if kind is Noisy:
        assert equal(run(loader), run(data.DataLoader(kind(tmp_path / "b", 20), batch_size=4, num_workers=workers)))
    else:
        run(loader)
    loader.dataset.loads()
    list(loader)
    assert sorted(set(loader.dataset.loads())) == [*range(20)]
    assert "loaded in every epoch" in caplog.text
    assert torchcache.stats(loader).reason


@pytest.mark.parametrize("workers", WORKERS)
def test_a_changed_file_shows_and_all_is_loaded_anew(files, workers, caplog):
    loader, model = torchcache.DataLoader(files, batch_size=8, num_workers=workers, check=1.0), Model()
    train(loader, model, 2)
    for index in range(40):
        files.write(index, np.ones(SHAPE, np.float32) * index)
    loader.remembered._checked_at -= 3600  # as if an hour had passed: a check may take its share of that
    got = [x + 0 for x, _ in loader]
    assert equal(got, [x for x, _ in data.DataLoader(files, batch_size=8)])
    assert "is not what it was" in caplog.text


def test_a_changed_attribute_of_the_data_set_shows_at_once(files):
    loader = torchcache.DataLoader(files, batch_size=8, check=0.0)
    for _ in range(2):
        list(loader)
    files.factor = 2.0
    assert equal([x + 0 for x, _ in loader], [x for x, _ in data.DataLoader(files, batch_size=8)])


def test_what_something_else_reads_is_loaded_and_in_the_end_ahead(files, caplog):
    loader, model, student = torchcache.DataLoader(files, batch_size=8, check=0.0), Model(), nn.Flatten()
    for _ in range(3):
        for x, _ in loader:
            model(x)
            student(x).sum().item()
    assert "read by other code" in caplog.text
    files.loads()
    assert all(type(x) is torch.Tensor for x, _ in loader)
    assert sorted(files.loads()) == [*range(40)]


@pytest.mark.parametrize("workers", WORKERS)
def test_rows_that_the_cache_lacks_are_loaded_ahead(files, workers):
    model = Model(max_memory_cache_size=20 * 16 * 4, audit=0.0)
    loader = torchcache.DataLoader(files, batch_size=8, num_workers=workers, check=0.0)
    counts = []
    train(loader, model, 5, lambda _: counts.append(len(files.loads())))
    assert 10 <= counts[-1] < 40
    with torchcache.bypass():
        assert all(
            torch.equal(x + 0, y) for (x, _), (y, _) in zip(loader, data.DataLoader(files, batch_size=8), strict=True)
        )


DOORS = {
    "call": lambda model: model,
    "transform": torchcache.transform,
    "eager": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "aot_eager": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "torchcache": lambda model: torch.compile(model, backend="torchcache", options={"inner": "aot_eager"}),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_lazy_tensors_whole(files, door):
    torch.manual_seed(1)
    expected = train(data.DataLoader(files, batch_size=8), Model(), 4)
    torch.manual_seed(1)
    model, counts = DOORS[door](Model(audit=0.0)), []
    loader = torchcache.DataLoader(files, batch_size=8, check=0.0)
    files.loads()
    losses = train(loader, model, 4, lambda _: counts.append(len(files.loads())))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert counts[-1] == 0


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torchcache.mark(nn.Sequential(encoder().requires_grad_(False), nn.Linear(16, 16)), audit=0.0)
        torchcache.unmark(self.body[0])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_partly_trainable_mark_takes_them_too(files):
    torch.manual_seed(1)
    expected = train(data.DataLoader(files, batch_size=8), Partly(), 4)
    torch.manual_seed(1)
    counts, loader = [], torchcache.DataLoader(files, batch_size=8, check=0.0)
    files.loads()
    model = torchcache.transform(Partly())
    losses = train(loader, model, 4, lambda _: counts.append(len(files.loads())))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert counts[-1] == 0
    assert torchcache.stats(model).misses == 40  # the graph for lazy tensors finds the rows of that for others


def test_under_autocast_and_with_ids(files):
    loader, body, counts = torchcache.DataLoader(files, batch_size=8, check=0.0), encoder(audit=0.0), []
    for _ in range(4):
        for number, (x, _) in enumerate(loader):
            with (
                torch.autocast("cpu", dtype=torch.bfloat16),
                torchcache.sample_keys(range(8 * number, 8 * number + len(x))),
            ):
                body(x)
        counts.append(len(files.loads()))
    assert counts[-1] == 0


SECOND = """
import sys
sys.path.insert(0, {tests!r})
import torch, torchcache
from image_files import Files, Model, train
files = Files({folder!r}, 40)
files.loads()
loader = torchcache.DataLoader(files, batch_size=8, persistent=True, persistent_cache_dir={cache!r})
model = Model(persistent=True, persistent_cache_dir={cache!r}, audit=0.0)
torch.manual_seed(0)
counts = []
losses = train(loader, model, 3, lambda _: counts.append(len(files.loads())))
torchcache.flush()
print(counts, [round(loss, 3) for loss in losses])
"""


def test_another_process_leaves_out_what_an_earlier_one_loaded(tmp_path):
    script = SECOND.format(
        tests=str(__import__("pathlib").Path(__file__).parent),
        folder=str(tmp_path / "files"),
        cache=str(tmp_path / "cache"),
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()[
            -1
        ]
        for _ in range(2)
    ]
    (first, losses), (second, again) = (run.split("] [") for run in runs)
    assert losses == again
    assert eval(first + "]")[0] >= 40
    assert eval(second + "]")[0] < 40
    assert all(count <= 8 for count in eval(second + "]")[1:])  # those that are checked
    verdict = subprocess.run(
        [sys.executable, "-m", "torchcache", "verify", str(tmp_path / "cache")], capture_output=True, text=True
    )
    assert "all sound" in verdict.stdout


def neighbour(patch):
    known = Remembered.known

    def turned(self, indices):
        return known(self, [*indices[1:], *indices[:1]])

    patch.setattr(Remembered, "known", turned)


def kept_when_changed(patch):
    patch.setattr(Remembered, "_changed", lambda self, index: None)
    patch.setattr(State, "unchanged", lambda self, tensors: True)
    patch.setattr(Program, "unchanged", lambda self: True)


def never_written(patch):
    held = Held.load
    patch.setattr(Held, "load", lambda self: torch.empty((len(self.rows), *SHAPE)) if self.data is None else held(self))


def digest_after_a_write(patch):
    span = LazyTensor.rows.fget
    patch.setattr(LazyTensor, "rows", property(lambda self: span(self) or list(self.held.rows)))


@pytest.mark.parametrize("bug", [None, neighbour, kept_when_changed, never_written, digest_after_a_write])
def test_planted_bugs_are_found(files, bug, monkeypatch):
    """A comparison with PyTorch's loader sees labels of another sample, stale samples, and memory nobody filled."""
    if bug is not None:
        bug(monkeypatch)
    loader, model = torchcache.DataLoader(files, batch_size=8, check=1.0), encoder(audit=0.0)
    wrong = 0
    for epoch in range(4):
        files.factor = 1.0 + epoch // 3
        loader.remembered._checked_at -= 3600
        pairs = zip(loader, data.DataLoader(files, batch_size=8), strict=True)
        for number, ((x, y), (plain, label)) in enumerate(pairs):
            wrong += not torch.equal(y, label)
            with torchcache.bypass():
                expected = model(plain), model(plain * 2)
            wrong += not torch.allclose(model(x), expected[0], atol=1e-4)
            if number % 2:  # what is read in every batch would be loaded from then on
                wrong += not torch.allclose(model(x.mul_(2)), expected[1], atol=1e-4)
    assert bool(wrong) == (bug is not None)


@pytest.mark.parametrize("seed", range(6))
def test_training_is_right_while_everything_changes(tmp_path, seed):
    assert changing.endure(tmp_path / "files", seed)["batches compared"]


def test_an_error_of_the_data_set_comes_as_with_torchs_loader(files):
    loader = torchcache.DataLoader(files, batch_size=8, sampler=[0, 1, 99])
    with pytest.raises(FileNotFoundError):
        list(loader)


@pytest.mark.parametrize("check", [2.0, -0.1, "some", True])
def test_a_check_that_is_no_share_is_refused(files, check):
    with pytest.raises(torchcache.ArgumentError, match="check="):
        torchcache.DataLoader(files, check=check)


def test_an_iterable_data_set_is_refused_with_advice():
    class Stream(data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(torchcache.ArgumentError, match="map-style"):
        torchcache.DataLoader(Stream())


def test_breaking_off_and_nesting_and_pickling(files):
    loader = torchcache.DataLoader(files, batch_size=8)
    for _ in range(3):
        next(iter(loader))
    outer = [y.tolist() for _, y in loader for _ in loader]
    assert len(outer) == 25
    again = pickle.loads(pickle.dumps(loader))
    assert equal([x + 0 for x, _ in again], [x for x, _ in data.DataLoader(files, batch_size=8)])


def test_it_explains_which_leaves_are_loaded_and_why(files):
    loader, model = torchcache.DataLoader(files, batch_size=8, check=0.0), Model(audit=0.0)
    assert "no sample was loaded yet" in str(torchcache.explain(loader))
    for epoch in range(3):
        for number, (x, _) in enumerate(loader):
            model(x)
            if epoch == 2 and number % 2:
                x.mean()
    (image, what, how), (label, small, kept) = torchcache.explain(loader).leaves
    assert (image, what, label, small) == ("[0]", "float32 (3, 20, 20)", "[1]", "a small value")
    assert how == "not loaded where Sequential finds its rows; other code read it in 2 of 18 batches"
    assert kept == "not loaded: remembered as it is"
    for x, _ in loader:
        x.mean()
    assert torchcache.explain(loader).leaves[0][2].startswith("loaded: what comes of them is read by other code")
