"""Whatever data sets, samplers and collate functions do, batches and random numbers are those of PyTorch's loader."""

import collections
import functools
import itertools
import multiprocessing
import os
import random
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from image_files import SHAPE, Files, Model
from test_loader import WORKERS, equal
from torch.utils import data
from torch.utils.data._utils.collate import default_collate_fn_map

import torchcache
from torchcache.loading import remembered
from torchcache.loading.by_index import ByIndex
from torchcache.loading.samples import Sample, take_sample


def pixels(index):
    return torch.from_numpy(np.random.default_rng(int(index)).standard_normal(SHAPE).astype(np.float32))


class Plain(data.Dataset):
    def __init__(self, count=24):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return pixels(index), index % 5


def run(kind, dataset, epochs=3, **options):
    """All batches of some epochs, read after their epoch only, and the random state at the end."""
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    loader = kind(dataset, **{"batch_size": 5, **options})
    held = [[*loader] for _ in range(epochs)]
    return held, [torch.rand(1).item(), random.random(), np.random.rand()]


def assert_as_torchs(dataset, skips=True, **options):
    expected, got = run(data.DataLoader, dataset, **options), run(torchcache.DataLoader, dataset, **options)
    for epoch, (one, other) in enumerate(zip(expected[0], got[0], strict=True)):
        assert equal(other, one), f"epoch {epoch}"
    assert got[1] == expected[1]
    if skips:
        loader = torchcache.DataLoader(dataset, **{"batch_size": 5, **options})
        for _ in range(3):
            list(loader)
        assert torchcache.stats(loader).skipped


def mixed_up(samples):
    """A batch that draws from all three generators, as MixUp does."""
    share, order = float(np.random.beta(1, 1)), torch.randperm(len(samples))
    return torch.stack([x for x, _ in samples]), order, share, random.random()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_collate_function_that_draws(workers):
    assert_as_torchs(Plain(), collate_fn=mixed_up, num_workers=workers, shuffle=True)


MADE = {}


def make(number):
    MADE["tokenizer"] = number


def with_what_workers_have(samples):
    return torch.stack([x for x, _ in samples]), MADE["tokenizer"], data.get_worker_info().id


def padded(samples):
    return torch.nn.utils.rnn.pad_sequence([x.flatten() for x, _ in samples], batch_first=True)


@pytest.mark.parametrize("collate", [with_what_workers_have, padded])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_collate_function_runs_in_the_workers(collate, persistent):
    assert_as_torchs(
        Plain(), collate is not padded, collate_fn=collate, num_workers=2, worker_init_fn=make,
        persistent_workers=persistent,
    )  # fmt: skip


class Conjugated(Plain):
    def __getitem__(self, index):
        z = torch.complex(pixels(index), pixels(index + 1))
        return (z.conj() * pixels(index + 2)).imag.contiguous(), index


class Complex(Plain):
    def __getitem__(self, index):
        return torch.complex(pixels(index), pixels(index + 1)).conj(), index


class Gradients(Plain):
    def __getitem__(self, index):
        x = pixels(index).requires_grad_()
        (x**3).sum().backward()
        return torch.vmap(lambda row: row * 2)(x.grad), torch.func.grad(lambda y: (y**2).sum())(pixels(index))


class Tagged(torch.Tensor):
    """A class of tensors that sees what is done with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made + 1 if func is torch.Tensor.mul else made


class OfATaggedTensor(Plain):
    def __getitem__(self, index):
        return (pixels(index).as_subclass(Tagged) * 2).as_subclass(torch.Tensor), index


class Autocast(Plain):
    def __getitem__(self, index):
        return pixels(index)[0] @ pixels(index)[1], torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


class Pair(collections.namedtuple("Pair", "image label")):
    __slots__ = ()

    def __new__(cls, image, label):
        return super().__new__(cls, image, label + 1)


class Named(Plain):
    def __getitem__(self, index):
        return Pair(pixels(index), index)


class Broken(Plain):
    def __getitem__(self, index):
        return None if index % 3 == 0 else (pixels(index), index)


class Slanted(Plain):
    def __getitem__(self, index):
        return pixels(index).permute(1, 2, 0), index


def labels_alone(samples):
    return torch.stack([sample[0] for sample in samples]), [sample[1] for sample in samples]


def without_broken(samples):
    return labels_alone([sample for sample in samples if sample is not None])


DATA_SETS = {
    "conjugated": (Conjugated(), None),
    "complex": (Complex(), None),
    "gradients": (Gradients(), None),
    "tagged": (OfATaggedTensor(), None),
    "autocast": (Autocast(), None),
    "named": (Named(), labels_alone),
    "broken": (Broken(), without_broken),
    "slanted": (Slanted(), labels_alone),
}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", DATA_SETS)
def test_what_a_data_set_does_is_done_as_in_the_loop(name, workers):
    dataset, collate = DATA_SETS[name]
    if name in ("complex", "gradients") and workers:
        pytest.skip("PyTorch's loader raises there; for gradients once a backward pass had threads in this process")
    assert_as_torchs(dataset, collate_fn=collate, num_workers=workers)


def test_a_sample_that_is_loaded_under_autocast_and_without_gradients_is_the_same():
    loader = torchcache.DataLoader(Autocast(), batch_size=8)
    expected = [x for x, _, _ in data.DataLoader(Autocast(), batch_size=8)]
    for _ in range(2):
        held = [x for x, _, _ in loader]
    with torch.no_grad(), torch.autocast("cpu"):
        assert equal([x * 1 for x in held], expected)


def test_a_loop_that_loads_under_autocast_gets_what_that_gives():
    def batches(kind, epochs):
        with torch.autocast("cpu"):
            loader = kind(Autocast(), batch_size=8)
            for _ in range(epochs):
                held = [x for x, _, _ in loader]
        torch.set_default_dtype(torch.float64)
        try:
            return [x * 1 for x in held], [x for x, _, _ in loader]
        finally:
            torch.set_default_dtype(torch.float32)

    assert equal(batches(torchcache.DataLoader, 2), batches(data.DataLoader, 1))


class Together(Plain):
    """Loads a whole batch at once, as ``form`` says."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def __getitems__(self, indices):
        x, y = torch.stack([pixels(index) for index in indices]), torch.tensor(indices)
        longest = max(index % 7 for index in indices)
        return {
            "dict": {"x": x, "y": y},
            "tuple": (x, y),
            "tensor": x,
            "samples": [*zip(x, indices, strict=True)],
            "padded": [(one, torch.zeros(longest + 1)) for one in x],
            "padded much": [
                (torch.nn.functional.pad(one, (0, longest)), index) for one, index in zip(x, indices, strict=True)
            ],
            "centred": [(one - x.mean(), index) for one, index in zip(x, indices, strict=True)],
        }[self.form]


def as_it_is(made):
    return made


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("form", ["dict", "tuple", "tensor", "samples", "padded", "padded much", "centred"])
def test_batches_that_a_data_set_loads_at_once(form, workers):
    own = form in ("dict", "tuple", "tensor")
    dataset, collate = Together(form), as_it_is if own else None
    assert_as_torchs(dataset, form == "samples", collate_fn=collate, num_workers=workers, shuffle=True)


class ByAnything(Plain):
    def __getitem__(self, index):
        if isinstance(index, dict):
            index = index["index"]
        if isinstance(index, (list, tuple)):
            index = index[0]
        return pixels(index), int(index) % 5 + isinstance(index, bool)


INDICES = {
    "dict": lambda i: {"index": i},
    "list": lambda i: [i],
    "array": lambda i: np.array(i),
    "tuple": lambda i: (i, "small"),
    "number": lambda i: np.int64(i),
    "tensor": lambda i: torch.tensor(i),
    "bool": lambda i: bool(i) if i < 2 else i - 2,
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_of_any_class(name):
    sampler = [INDICES[name](index) for index in range(20)]
    assert_as_torchs(ByAnything(), name in ("tuple", "number", "tensor", "bool"), sampler=sampler)


def test_what_is_remembered_stays_bounded_where_indices_are_always_new(monkeypatch):
    monkeypatch.setattr(remembered, "CHEAP", 0)  # on a fast machine these samples take no time worth saving
    numbers = itertools.count()
    loader = torchcache.DataLoader(ByAnything(), batch_size=50, sampler=[None] * 500)
    loader.sampler[:] = []
    for _ in range(6):
        loader.sampler[:] = [(index, next(numbers)) for index in range(24)] * 10
        loader.sampler[:] = [(index, next(numbers)) for index, _ in loader.sampler]
        list(loader)
    assert torchcache.stats(loader).samples == 0
    assert "other indices in every epoch" in torchcache.stats(loader).reason


class Drawing(Plain):
    """Flips now and then, by a generator of its own."""

    def __init__(self, kind):
        super().__init__()
        self.inner = {"generators": [kind()]}

    def __getitem__(self, index):
        generator = self.inner["generators"][0]
        drawn = (
            torch.rand(1, generator=generator).item() if isinstance(generator, torch.Generator) else generator.random()
        )
        return pixels(index).flip(-1) if drawn < 0.05 else pixels(index), index


GENERATORS = {
    "numpy": lambda: np.random.default_rng(1),
    "numpy's old": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
    "torch": lambda: torch.Generator().manual_seed(1),
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("named", [None, "images"])
def test_generators_of_a_data_sets_own(name, named):
    expected = run(data.DataLoader, Drawing(GENERATORS[name]))
    got = run(torchcache.DataLoader, Drawing(GENERATORS[name]), check=0.0, dataset_id=named)
    assert equal(got[0], expected[0])


class Augmented(Plain):
    def __getitem__(self, index):
        return pixels(index) + torch.rand(1), index


@pytest.mark.parametrize("dataset", [Augmented(40), data.TensorDataset(torch.zeros(600, 3, 20, 20), torch.arange(600))])
def test_persistent_workers_once_nothing_is_left_out(dataset):
    options = {"batch_size": 8, "shuffle": True, "num_workers": 2, "persistent_workers": True}
    assert_as_torchs(dataset, False, **options)
    loader = torchcache.DataLoader(dataset, **options)
    for _ in range(3):
        list(loader)
        assert len(multiprocessing.active_children()) == 2
    del loader
    assert not multiprocessing.active_children()


class Held(data.Dataset):
    def __init__(self):
        self.x = np.random.default_rng(0).normal(size=(12, 4096)).astype("f4")

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.from_numpy(self.x[index] * 1), index


def test_persistent_workers_keep_the_data_set_as_it_was(warnings):
    def epochs(kind):
        dataset, seen = Held(), []
        torch.manual_seed(1)
        model = torch.nn.Linear(4096, 2).requires_grad_(False)
        model = torchcache.mark(model, audit=0) if kind is torchcache.DataLoader else model
        loader = kind(dataset, batch_size=5, num_workers=2, persistent_workers=True)
        for epoch in range(6):
            if epoch == 3:
                dataset.x[5] += 1
            # what is left out as long as rows are cached is read in the end
            seen.append(torch.cat([model(x) if epoch < 5 else x.sum(1, keepdim=True) for x, _ in loader]))
        return seen

    for got, expected in zip(epochs(torchcache.DataLoader), epochs(data.DataLoader), strict=True):
        torch.testing.assert_close(got, expected)
    assert [text for text in warnings if "persistent workers have it as it was" in text]


@pytest.mark.parametrize("persistent", [False, True])
def test_several_passes_at_once(persistent):
    def nested(kind):
        torch.manual_seed(2)
        options = {"batch_size": 5, "shuffle": True, "num_workers": 2, "persistent_workers": persistent}
        loader = kind(Plain(), **options)
        pairs = [
            (a.tolist(), b.tolist()) for _, a in itertools.islice(loader, 3) for _, b in itertools.islice(loader, 2)
        ]
        return pairs, [y.tolist() for _, y in loader]

    assert nested(torchcache.DataLoader) == nested(data.DataLoader)


def test_passes_that_are_broken_off_leave_no_process():
    loader = torchcache.DataLoader(Plain(), batch_size=4, num_workers=2)
    for _ in range(4):
        next(iter(loader))
        assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_that_are_spawned():
    options = {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True}
    expected, got = (
        run(kind, Plain(), collate_fn=mixed_up, shuffle=True, **options)
        for kind in (data.DataLoader, torchcache.DataLoader)
    )
    assert equal(got, expected)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_share_of_the_samples(workers):
    def labels(kind):
        sampler = data.DistributedSampler(Plain(), 2, 1)
        loader = kind(Plain(), batch_size=5, sampler=sampler, num_workers=workers)
        got = []
        for epoch in range(4):
            sampler.set_epoch(epoch)
            got += [y.tolist() for _, y in loader]
        return got

    assert labels(torchcache.DataLoader) == labels(data.DataLoader)


def test_a_loader_that_nothing_was_taken_from_says_so():
    assert "a trainer" in torchcache.stats(torchcache.DataLoader(Plain(), batch_size=5)).reason


def _began(path, worker):
    with path.open("a") as file:
        file.write(f"{worker} ")


def write_to(path):
    return functools.partial(_began, path)


def test_what_is_set_on_the_loader_later_counts(tmp_path):
    loader = torchcache.DataLoader(Plain(), batch_size=4, num_workers=2)
    next(iter(loader))
    loader.worker_init_fn = write_to(tmp_path / "began")
    list(loader)
    assert set((tmp_path / "began").read_text().split()) == {"0", "1"}


def test_a_collate_function_for_tensors_of_ones_own():
    kept = default_collate_fn_map[torch.Tensor]
    try:
        default_collate_fn_map[torch.Tensor] = lambda batch, *, collate_fn_map=None: torch.stack(batch) + 1
        assert_as_torchs(Plain(), False)
    finally:
        default_collate_fn_map[torch.Tensor] = kept


def test_an_attribute_that_is_set_in_the_middle_of_an_epoch_counts_at_once(tmp_path):
    def labels(kind):
        files = Files(tmp_path / "files", 40)
        loader, got = kind(files, batch_size=8), []
        for epoch in range(3):
            for number, (x, _) in enumerate(loader):
                got.append((x.mean() + 0).item())
                if epoch == 2 and number == 1:
                    files.factor = 3.0
        return got

    assert labels(torchcache.DataLoader) == labels(data.DataLoader)


class Counting(Plain):
    calls = 0

    def __getitem__(self, index):
        self.calls += 1
        return pixels(index), index


def test_a_data_set_that_counts_its_calls_is_loaded_in_every_epoch_and_that_is_said():
    loader = torchcache.DataLoader(Counting(), batch_size=5)
    for _ in range(5):
        list(loader)
    assert "changed 3 times (__self__.calls)" in torchcache.stats(loader).reason


class Labelled(Files):
    def __getitem__(self, index):
        with open(f"{self.folder}/label") as file:
            return self.read(index), int(file.read()) + index


@pytest.mark.parametrize("workers", WORKERS)
def test_labels_that_change_while_part_of_the_samples_is_known(tmp_path, workers):
    files, half = Labelled(tmp_path / "files", 64), [*range(0, 64, 2)]
    label = tmp_path / "files" / "label"
    label.write_text("0")
    order = [*half]
    loader = torchcache.DataLoader(files, batch_size=8, sampler=order, num_workers=workers, check=0.0)
    list(loader)
    order[:] = range(64)
    label.write_text("1000")
    for index in range(64):
        files.write(index, np.full(SHAPE, index, np.float32))
    labels = []
    for number, (x, y) in enumerate(loader):
        if number == 0:
            assert x.mean(dim=(1, 2, 3)).tolist() == [*range(8)]
        labels += y.tolist() if number else []
    assert labels == [1000 + index for index in range(8, 64)]


def test_files_that_are_gone_and_samples_that_are_others_end_nothing(tmp_path):
    files = Files(tmp_path / "files", 40)
    order = [*range(40)]
    loader = torchcache.DataLoader(files, batch_size=8, sampler=order, check=1.0)
    list(loader)
    for index in range(10, 40):
        os.remove(f"{files.folder}/{index}.npy")
    order[:] = range(10)
    for _ in range(3):
        loader.remembered._checked_at -= 3600
        assert equal([x + 0 for x, _ in loader], [x for x, _ in data.DataLoader(files, batch_size=8, sampler=order)])
    files.write(3, np.zeros((2, 2), np.float32))
    with pytest.raises(RuntimeError):  # of torch: shapes differ
        list(data.DataLoader(files, batch_size=8, sampler=order))
    loader.remembered._checked_at -= 3600
    with pytest.raises(RuntimeError, match="equal size"):
        list(loader)


def test_a_model_that_is_thawed_later_has_its_samples_loaded_by_few_processes(tmp_path):
    files, model = Files(tmp_path / "files", 64), Model(audit=0.0)
    loader = torchcache.DataLoader(files, batch_size=4, num_workers=2, check=0.0)
    for _ in range(3):
        for x, _ in loader:
            model(x)
    model.body.requires_grad_(True)
    plain = data.DataLoader(files, batch_size=4)
    seen, there = set(), {child.pid for child in multiprocessing.active_children()}
    for (x, _), (expected, _) in zip(loader, plain, strict=True):
        assert torch.allclose(model(x), model(expected))
        seen |= {child.pid for child in multiprocessing.active_children()}
    assert len(seen - there) <= 4


def test_trainers_that_make_the_loader_anew_find_its_options(tmp_path):
    loader = torchcache.DataLoader(
        Plain(), batch_size=4, dataset_id="plain", check=0.25, digest="blake3", persistent=True,
        persistent_cache_dir=tmp_path,
    )  # fmt: skip
    names = ("dataset_id", "check", "digest", "persistent", "persistent_cache_dir")
    again = torchcache.DataLoader(loader.dataset, **{name: getattr(loader, name) for name in names})
    assert again.options == loader.options


def test_what_is_remembered_of_a_sample_takes_little_memory():
    known, structure = ByIndex(), take_sample((pixels(0), 0), "xxh3_128", True)[0].structure
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for index in range(20_000):
            known.keep(index, known.with_known_structure(Sample(structure, (index % 5,), index.to_bytes(16, "big"))))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    small_leaves = sys.getsizeof((0,)) + 16  # a tuple, with what collects garbage
    assert taken < 20_000 * (200 + small_leaves)


class Endless(data.Sampler):
    def __iter__(self):
        return itertools.cycle(range(12))


def test_a_batch_is_right_that_is_planned_when_a_change_is_found(tmp_path, caplog):
    files = Files(tmp_path / "files", 12)
    loader = torchcache.DataLoader(files, batch_size=4, sampler=Endless(), check=1.0)
    batches = iter(loader)
    for _ in range(12):
        next(batches)
    assert torchcache.stats(loader).skipped
    for index in range(12):
        files.write(index, np.full(SHAPE, index, np.float32))
    loader.remembered._checked_at -= 3600
    right = []
    for number in range(9):
        x, _ = next(batches)
        right.append(
            torch.equal(x + 0, torch.stack([files[index][0] for index in range(number % 3 * 4, number % 3 * 4 + 4)]))
        )
        if "is not what it was" in caplog.text:
            assert right[-1]
    assert all(right[-5:])


class Summed(Files):
    def __getitem__(self, index):
        x = self.read(index)
        return x, float(x.sum())


def test_what_another_process_remembered_is_compared_before_it_is_left_out(tmp_path):
    place = {"persistent": True, "persistent_cache_dir": tmp_path / "cache"}
    files = Summed(tmp_path / "files", 40)
    for _ in range(2):
        list(torchcache.DataLoader(files, batch_size=8, **place))
        torchcache.flush()
    files.write(39, np.zeros(SHAPE, np.float32))
    loader = torchcache.DataLoader(files, batch_size=8, check=1.0, **place)
    assert [y for _, y in loader][-1][-1] == 0
