"""What cannot be cached is computed: the right answer, a reason, one warning; and nothing of ours ends a run."""

import argparse
import array
import collections
import contextvars
import copy
import functools
import gc
import io
import itertools
import logging
import queue
import random
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from marked import assert_same, counts, frozen, reasons, unmarked
from torch import nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

import torchcache
from torchcache import cached, dynamo
from torchcache.store import connect


def computed(module, *batches, why):
    """Calls that are right and stored nowhere, and the reason that is told."""
    twin = unmarked(module)
    for batch in batches:
        torch.manual_seed(0)
        got = module(*batch)
        torch.manual_seed(0)
        assert_same(got, twin(*batch))
    assert counts(module) == (0, 0)
    assert torchcache.stats(module).bypasses == sum(len(batch[0]) for batch in batches)
    assert why in reasons(module)


def test_nested_tensors_of_any_layout():
    """As an encoder's layers get them, where a mask leaves some of a batch out."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval().requires_grad_(False)
    module = copy.deepcopy(plain)
    torchcache.mark(module.layers[1])
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    x = torch.randn(3, 5, 8)
    for _ in range(2):
        assert_same(module(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask))
    assert "nested" in reasons(module)


RANDOM = {
    "rand_like": lambda self, x: x + torch.rand_like(x),
    "dropout": lambda self, x: nn.functional.dropout(x, 0.5, training=True),
    "rrelu": lambda self, x: nn.functional.rrelu(x, training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers(name, warnings):
    module = frozen(RANDOM[name], nn.Linear(2, 2))
    computed(module, *([torch.randn(6, 5)] for _ in range(3)), why="draws random numbers")
    assert len(warnings) == 1


def test_the_state_of_a_generator_is_not_read_on_hits():
    module, x = frozen(lambda self, x: x * float(torch.get_rng_state()[0])), torch.randn(4, 3)
    computed(module, (x,), (x,), why="reads the state of a random generator")


def test_a_call_that_draws_leaves_the_generator_as_the_original_does():
    module = frozen(RANDOM["rand_like"])
    x = torch.randn(6, 5)
    for run in (module, unmarked(module)):
        torch.manual_seed(3)
        run(x), run(x)
        drawn = torch.rand(4)
        if run is module:
            expected = drawn
    assert torch.equal(drawn, expected)


def test_probing_draws_nothing_from_the_users_generator():
    module = frozen(lambda self, x: x * 2)
    torch.manual_seed(3)
    expected = torch.rand(4)
    x = torch.randn(6, 5)
    torch.manual_seed(3)
    module(x), module(x)
    assert torch.equal(torch.rand(4), expected)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        self.average.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.average


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return x * 2


class Remembering(nn.Module):
    def forward(self, x):
        y = x + getattr(self, "last", torch.zeros(4))
        self.last = x[-1].clone()
        return y


@pytest.mark.parametrize(
    ("kind", "what"), [(Counting, "calls"), (Averaging, "average"), (Keeping, "seen"), (Remembering, "last")]
)
def test_a_module_that_writes_is_right_in_every_call(kind, what, warnings):
    torch.manual_seed(0)
    module, twin = torchcache.mark(kind(), audit=0), kind()
    data = [torch.randn(6, 4) for _ in range(3)]
    for x in data * 4:
        torch.testing.assert_close(module(x), twin(x))
    assert counts(module) == (0, 0)
    if kind in (Counting, Keeping):
        assert getattr(module, what) == getattr(twin, what)
    assert any(what in text and "pure=True" in text for text in warnings)


def batch_statistics(self, x):
    nn.functional.batch_norm(x, self.average, self.spread, training=True)


def write_to_data(self, x):
    self.average.data.mul_(0.9).add_(0.1 * x.mean(0))


def write_by_numpy(self, x):
    self.average.numpy()[:] += x.numpy().mean(0)


def write_to_an_array(self, x):
    self.counts += x.numpy().sum(0)


class WritingUnseen(nn.Module):
    """Writes where no version tells."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.counts = np.zeros(4)
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("spread", torch.ones(4))

    def forward(self, x):
        self.write(self, x)
        return x * 2


@pytest.mark.parametrize("write", [batch_statistics, write_to_data, write_by_numpy, write_to_an_array])
def test_first_calls_leave_no_writes_but_the_callers(write):
    module, twin = torchcache.mark(WritingUnseen(write), audit=0), WritingUnseen(write)
    for x in torch.randn(6, 5, 4):
        assert_same(module(x), twin(x))
        assert_same(module.state_dict(), twin.state_dict())
        np.testing.assert_array_equal(module.counts, twin.counts)
    assert counts(module) == (0, 0)


def test_statistics_that_a_cached_model_is_adapted_by_are_those_of_its_own_calls():
    module = torchcache.mark(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), freeze=True)
    twin = unmarked(module)
    for training in (False, True):
        for each in (module, twin):
            each[1].training = training
        for x in torch.randn(4, 5, 4):
            assert_same(module(x), twin(x))
            assert_same(module.state_dict(), twin.state_dict())


class Extractor:
    """What public code keeps features with."""

    shared = None

    def __init__(self, layer, where):
        layer.register_forward_hook(getattr(self, where))
        self.tensor, self.array = torch.zeros(4, 3), np.zeros((4, 3), np.float32)

    def attribute(self, module, args, output):
        self.kept = output

    def of_the_class(self, module, args, output):
        Extractor.shared = output

    def into_a_global(self, module, args, output):
        global KEPT
        KEPT = output

    def into_a_tensor(self, module, args, output):
        if output.shape == self.tensor.shape:
            self.tensor.copy_(output)

    def into_an_array(self, module, args, output):
        if output.shape == self.array.shape:
            self.array[:] = output.numpy()

    def found(self, where):
        kept = {
            "attribute": lambda: self.kept,
            "of_the_class": lambda: Extractor.shared,
            "into_a_global": lambda: KEPT,
            "into_a_tensor": lambda: self.tensor,
            "into_an_array": lambda: self.array,
        }
        return torch.as_tensor(kept[where]()).clone()


KEPT = None


@pytest.mark.parametrize("where", ["attribute", "of_the_class", "into_a_global", "into_a_tensor", "into_an_array"])
def test_what_a_hook_keeps_elsewhere_is_of_the_callers_batch(where, warnings):
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False).eval()
        return net, Extractor(net[1], where)

    (module, got), (twin, wanted) = build(), build()
    torchcache.mark(module, audit=0)
    data = [torch.randn(4, 3) for _ in range(3)]
    for x in data * 3:
        expected = twin(x)
        kept = wanted.found(where)
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(got.found(where), kept)
    assert any("pure=True" in text for text in warnings)


def test_a_marked_function_that_writes_a_global_is_computed():
    @cached(audit=0)
    def doubled(x):
        global KEPT
        KEPT = x * 2
        return KEPT + 1

    for x in [torch.randn(4, 3), torch.randn(4, 3)] * 3:
        torch.testing.assert_close(doubled(x), x * 2 + 1)
        torch.testing.assert_close(KEPT, x * 2)


class Meter:
    def __init__(self):
        self.count, self.total, self.values, self.groups = 0, torch.zeros(()), [], {"all": [{"calls": 0}]}


class Slotted:
    __slots__ = ("count", "values")

    def __init__(self):
        self.count, self.values = 0, collections.deque(maxlen=9)


class Named(dict):
    calls = 0

    def __setitem__(self, key, value):
        raise AssertionError("what puts items back runs no code of the user's")


def in_a_closure():
    count = 0

    def note(x):
        nonlocal count
        count += 1

    return note, lambda: count


def in_an_object(write, read):
    meter = Meter()
    return lambda x: write(meter, x), lambda: read(meter)


def count_up(meter, x):
    meter.count += 1
    meter.values.append(len(x))


def count_in_a_dict(meter, x):
    meter.groups["all"][0]["calls"] += 1


def add_up(meter, x):
    meter.total += x.detach().sum()


def look_at_data(meter, x):
    meter.values.append(float(x.sum()))


def in_slots():
    slotted = Slotted()

    def note(x):
        slotted.count += 1
        slotted.values.append(len(x))

    return note, lambda: (slotted.count, [*slotted.values])


def in_a_class():
    named = Named()

    def note(x):
        named.calls += 1
        named.setdefault(named.calls, []).append(len(x))

    return note, lambda: (named.calls, [*named.items()])


def in_a_container(kind, write):
    container = kind()
    return lambda x: write(container, x), lambda: kind(container)


def count_by_name(container, x):
    container["calls"] += 1


NOTES = {
    "object": lambda: in_an_object(count_up, lambda meter: (meter.count, meter.values)),
    "containers of an object": lambda: in_an_object(count_in_a_dict, lambda meter: meter.groups),
    "tensor of an object": lambda: in_an_object(add_up, lambda meter: meter.total.item()),
    "numbers out of tensors": lambda: in_an_object(look_at_data, lambda meter: meter.values),
    "slots": in_slots,
    "class that extends dict": in_a_class,
    "closure": in_a_closure,
    "Counter": lambda: in_a_container(collections.Counter, count_by_name),
    "OrderedDict": lambda: in_a_container(
        collections.OrderedDict, lambda container, x: container.setdefault(len(x), []).append(0)
    ),
    "lists in a defaultdict": lambda: in_a_container(
        lambda *given: collections.defaultdict(list, *given), lambda container, x: container["rows"].append(len(x))
    ),
    "set": lambda: in_a_container(set, lambda container, x: container.add(len(container))),
    "list in a tuple": lambda: in_a_container(lambda given=([],): given, lambda container, x: container[0].append(1)),
}


class Notes(nn.Module):
    """Writes down that it was called, and computes the same."""

    def __init__(self, note):
        super().__init__()
        self.linear, self.note = nn.Linear(4, 4), note

    def forward(self, x):
        self.note(x)
        return self.linear(x)


@pytest.mark.once
@pytest.mark.parametrize("kind", NOTES)
@pytest.mark.parametrize("door", ["call", "transform", "eager", "torchcache"])
def test_what_a_forward_notes_is_noted_once_a_call(door, kind, warnings):
    (note, noted), (twins, wanted) = NOTES[kind](), NOTES[kind]()
    module, twin = torchcache.mark(Notes(note), freeze=True, audit=0), Notes(twins)
    run = model = nn.Sequential(module)
    if door != "call":
        options = {"options": {"inner": "eager"}} if door == "torchcache" else {}
        run = torchcache.transform(model) if door == "transform" else torch.compile(model, backend=door, **options)
    twin.load_state_dict(unmarked(module).state_dict())
    for rows in (6, 6, 4, 6, 6):
        x = torch.arange(4.0 * rows).view(rows, 4)
        torch.testing.assert_close(run(x), twin(x))
        assert noted() == wanted()
    assert counts(module) == (0, 0)
    assert door != "call" or any("pure=True" in text for text in warnings)


class Noted(nn.Module):
    """Writes down what it does, in every way that is common, and reads none of it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.log = []
        self.attention = None

    def forward(self, x):
        self.calls += 1
        self.log.append(len(x))
        self.attention = x.softmax(1)
        return self.linear(x)


def test_pure_promises_that_writes_need_not_happen_on_hits(tmp_path):
    torch.manual_seed(0)
    state = Noted().state_dict()

    def run():
        module = Noted()
        module.load_state_dict(state)
        options = {"persistent": True, "persistent_cache_dir": tmp_path, "audit": 0, "pure": True}
        return torchcache.mark(module, freeze=True, **options)

    first, x = run(), torch.randn(6, 4)
    first(x)
    written = (first.calls, len(first.log), first.attention)
    for _ in range(3):
        torch.testing.assert_close(first(x), first.linear(x))
    assert counts(first) == (6, 18)
    assert (first.calls, len(first.log), first.attention) == written
    torchcache.flush()
    again = run()
    again.calls = 100  # a counter goes on from a checkpoint
    torch.testing.assert_close(again(x), again.linear(x))
    assert counts(again) == (0, 6)
    again.linear.weight.data.mul_(2)
    torch.testing.assert_close(again(x), again.linear(x))


def test_a_module_that_sets_itself_up_is_cached():
    def forward(self, x):
        if not hasattr(self, "table"):
            self.table = torch.ones(5)
        return x * self.table

    module = frozen(forward, nn.Linear(2, 2))
    x = torch.randn(6, 5)
    for _ in range(3):
        assert torch.equal(module(x), x)
    assert counts(module) == (6, 12)


def test_a_module_may_set_itself_up_after_every_change_from_outside():
    class Encoder(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    module, plain = torchcache.mark(Encoder(4, 4, batch_first=True), freeze=True), Encoder(4, 4, batch_first=True)
    x = torch.randn(3, 5, 4)
    for seed in range(5):  # the first call with other parameter objects rewrites the list of them
        torch.manual_seed(seed)
        state = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
        module.load_state_dict(state, assign=True)
        plain.load_state_dict(state)
        for _ in range(3):
            torch.testing.assert_close(module(x), plain(x))
    assert torchcache.stats(module).hits >= 15


def test_a_write_to_an_argument_happens_in_every_call(warnings):
    def forward(self, x, notes):
        notes.append(len(x))
        return x.mul_(2) + 1

    module = frozen(forward)
    for number in range(4):
        x, notes = torch.arange(15.0).reshape(5, 3), [torch.tensor(number)]
        expected = x * 2 + 1
        assert torch.equal(module(x, notes), expected)
        assert torch.equal(x, expected - 1)
        assert len(notes) == 2
    assert counts(module) == (0, 0)
    assert len(warnings) == 1


def _clamped(self, x, features):
    x.data.clamp_(min=0)
    return self.parts[0](x)


def _through_numpy(self, x, features):
    x.numpy()[:] *= 2
    return self.parts[0](x)


def _filled(self, x, features):
    features.data.copy_(self.parts[0](x))
    return self.parts[0](features)


def _replaced(self, x, features):
    x.data = x.data + 1
    return self.parts[0](x)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("forward", [_clamped, _through_numpy, _filled, _replaced])
def test_a_write_to_an_argument_that_moves_no_version_happens_in_every_call(forward, stored, tmp_path):
    def either(self, x, features=None):
        return self.parts[0](x) if features is None else forward(self, x, features)

    module = frozen(either, nn.Linear(4, 4), persistent=True, persistent_cache_dir=str(tmp_path))
    twin = unmarked(module)
    if stored:  # then a first call is not run as a whole
        module(torch.randn(6, 4))
        torchcache.flush()
    for _ in range(4):
        x, features = torch.randn(6, 4), torch.zeros(6, 4)
        mine, plain = [x.clone(), features.clone()], [x.clone(), features.clone()]
        assert_same(module(*mine), twin(*plain))
        assert_same(mine, plain)
    assert counts(module) == (6 * stored, 0)
    assert "it writes to its arguments" in reasons(module)


def test_an_argument_that_is_made_to_need_a_gradient_needs_one_after_every_call():
    module = frozen(lambda self, x: self.parts[0](x.requires_grad_()), nn.Linear(4, 4))
    for _ in range(4):
        x = torch.randn(6, 4)
        with torch.no_grad():
            module(x)
        assert x.requires_grad
    assert "it writes to its arguments" in reasons(module)


def test_an_original_that_needs_its_whole_batch(warnings):
    def forward(self, x):
        return x.view(4, 6) * 2

    computed(frozen(forward), *([torch.randn(4, 6)] for _ in range(3)), why="")
    assert len(warnings) == 1


def test_the_originals_own_exception_is_unchanged():
    def forward(self, x):
        if x.isnan().any():
            raise KeyError("no such word", 3)
        return self.parts[0](x)

    module = frozen(forward, nn.Linear(3, 3))
    x = torch.randn(4, 3)
    for bad in (x * float("nan"), torch.cat([x, x * float("nan")])):
        for _ in range(2):
            with pytest.raises(KeyError) as caught:
                module(bad)
            assert caught.value.args == ("no such word", 3)
            assert caught.value.__cause__ is None
        module(x)
    assert counts(module)[1] >= 4
    with torchcache.bypass(), pytest.raises(KeyError) as caught:
        module(x * float("nan"))
    assert caught.value.__context__ is None
    with pytest.raises(TypeError, match="missing 1 required"):
        torchcache.mark(nn.Linear(3, 3), freeze=True)()


@pytest.mark.parametrize("when", ["at once", "after a hit"])
@pytest.mark.lookups_fail
def test_an_exception_of_ours_does_not_end_the_run(when, warnings, monkeypatch):
    module = torchcache.mark(nn.Linear(3, 3), freeze=True, audit=0)
    x, twin = torch.randn(4, 3), unmarked(module)
    if when == "after a hit":
        module(x), module(x)

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a slip of ours")

    with monkeypatch.context() as patches:
        patches.setattr("torchcache.digest.rows.digest_rows", broken)
        for _ in range(2):
            assert torch.equal(module(x), twin(x))
        assert torchcache.stats(module).bypasses == 8
        assert "ZeroDivisionError: a slip of ours" in reasons(module)
        assert sum("please report it" in text for text in warnings) == 1
    hits = torchcache.stats(module).hits
    module(x), module(x)
    assert torchcache.stats(module).hits >= hits + 4


def test_bypass_computes_and_stores_nothing(warnings):
    module = torchcache.mark(nn.Linear(6, 6), freeze=True, audit=0)
    x = torch.randn(4, 6)
    with torchcache.bypass():
        module(x), module(x)
    stats = torchcache.stats(module)
    assert (stats.bypasses, stats.misses, stats.hits) == (8, 0, 0)
    module(x)
    assert counts(module) == (4, 0)
    assert warnings == []


NESTS = {
    "pairs": lambda kept: [(kept, torch.ones(4))],
    "tuples": lambda kept: ((kept,), "scale"),
    "tuples in a dict": lambda kept: {"first": (kept, 1)},
    "dicts in a list": lambda kept: [{"first": [kept]}],
}


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("nest", NESTS)
def test_tensors_in_containers_of_containers(nest, writes):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.kept = NESTS[nest](torch.zeros(4))

        def forward(self, x):
            (first,) = [leaf for leaf in pytree.tree_leaves(self.kept) if isinstance(leaf, torch.Tensor)][:1]
            if writes:
                first.data.add_(1)
            return self.linear(x) + first

    torch.manual_seed(0)
    plain = Keeping().requires_grad_(False)
    backbone, x = torchcache.mark(copy.deepcopy(plain), audit=0), torch.randn(5, 4)
    for _ in range(6):
        torch.testing.assert_close(backbone(x), plain(x))
    assert torchcache.stats(backbone).hits == (0 if writes else 25)


class Rope(nn.Module):
    """Writes its table in place in each call: what it held, unless an argument is large, as models of long contexts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        self.table.copy_(torch.where(x.max() > 10, torch.ones(4), torch.arange(4.0)))
        return self.linear(x) + self.table


class Means(Rope):
    """Writes what follows from the batch, which is the same where that is."""

    def forward(self, x):
        self.table.copy_(x.mean(0))
        return self.linear(x) + self.table


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("kind", [Rope, Means])
def test_what_is_written_with_what_it_held_is_written_by_nobody(kind, pure):
    if kind is Means and pure:
        pytest.skip("a promise that does not hold")
    module = torchcache.mark(kind().requires_grad_(False), pure=pure, audit=0)
    twin, data = unmarked(module), torch.randn(12, 4)
    data[7] *= 100
    for epoch in range(5):
        order = torch.randperm(12) if epoch < 3 else torch.arange(12)
        for rows in order.split(4):
            torch.testing.assert_close(module(data[rows]), twin(data[rows]))
            assert pure or torch.equal(module.table, twin.table)
        module.table.copy_(torch.arange(4.0))
        twin.table.copy_(torch.arange(4.0))
    assert bool(torchcache.stats(module).hits) == (kind is Rope)


STEP = 0


def test_what_changes_between_calls_is_named(warnings):
    global STEP

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x):
            return x * self.scale + STEP

    backbone = torchcache.mark(Counting(), audit=0)
    x = torch.randn(5, 4)
    for STEP in range(20):
        torch.testing.assert_close(backbone(x), x * backbone.scale + STEP)
    assert "program (the global STEP) change between calls" in reasons(backbone)
    assert len(warnings) == 1


def test_weights_that_keep_changing_fill_nothing_and_are_looked_at_again(warnings):
    """As of a teacher that is the moving average of its student."""
    teacher = torchcache.mark(nn.Linear(4, 4), freeze=True, audit=0)
    data = [torch.randn(5, 4) for _ in range(3)]
    for step in range(40):
        with torch.no_grad():
            teacher.weight.mul_(0.9).add_(torch.randn(4, 4), alpha=0.1)
        x = data[step % 3]
        torch.testing.assert_close(teacher(x), nn.functional.linear(x, teacher.weight, teacher.bias))
    (region,) = torchcache.stats(teacher).regions
    assert region.hits == 0
    assert region.bypasses > 100
    assert region.rows_stored <= 3 * 5
    assert "program (weight) change between calls" in reasons(teacher)
    assert len(warnings) == 1
    for _ in range(100):  # the average is done
        for x in data:
            torch.testing.assert_close(teacher(x), nn.functional.linear(x, teacher.weight, teacher.bias))
    assert torchcache.stats(teacher).hits > 100


def test_reasons_are_told_by_stats_and_once_in_the_log(caplog):
    @cached
    def features(x, thing):
        return x * 2

    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("torchcache").addHandler(handler)
    try:
        for _ in range(5):
            features(torch.randn(3, 2), object())
    finally:
        logging.getLogger("torchcache").removeHandler(handler)
    (reason, count), *others = torchcache.stats(features).regions[0].reasons.items()
    assert (count, others) == (15, [])
    assert [reason in record.getMessage() for record in records] == [True]


def test_a_directory_of_a_newer_format_is_refused_and_left_alone(tmp_path):
    marker = tmp_path / "torchcache.json"
    marker.write_bytes(connect.marker(99))
    model = nn.Sequential(torchcache.mark(nn.Linear(2, 2), freeze=True, persistent=True, persistent_cache_dir=tmp_path))
    with pytest.raises(torchcache.StoreVersionError, match="99"):
        torchcache.transform(model)
    with pytest.raises(torchcache.StoreVersionError, match="99"):
        torchcache.transform(model)
    x = torch.randn(3, 2)
    for _ in range(2):  # called without it, the directory is not used
        torch.testing.assert_close(model(x), unmarked(model[0])(x))
    torchcache.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["torchcache.json"]
    assert marker.read_bytes() == connect.marker(99)


class Noisy(nn.Module):
    def forward(self, x, thing=None):
        return x + torch.rand_like(x)


@pytest.mark.parametrize("thing", [None, object()], ids=["random", "not understood"])
def test_a_bypass_keeps_nothing_of_its_calls(thing):
    module = torchcache.mark(Noisy())
    alive = []
    for _ in range(5):
        x = torch.randn(4, 3)
        alive.append(weakref.ref(x))
        module(x, thing)
    del x
    gc.collect()
    assert [reference() for reference in alive] == [None] * 5


def test_rows_of_calls_with_a_dict_are_counted():
    module = torchcache.mark(Noisy())
    module.forward = lambda batch: batch["x"] + torch.rand(())
    torchcache.mark(module)
    module({"x": torch.randn(7, 3)})
    assert torchcache.stats(module).bypasses == 7


class Unreadable(nn.Linear):
    """Reads something that has no identity."""

    def __init__(self):
        super().__init__(3, 3)
        self.source = iter([])

    def forward(self, x):
        return super().forward(x) if self.source is not None else x


def test_what_cannot_be_read_is_not_read_again_in_every_call(monkeypatch):
    from torchcache.identity import identity

    made, program = [], identity.Program
    monkeypatch.setattr(identity, "Program", lambda *given: made.append(1) or program(*given))
    module = torchcache.mark(Unreadable(), freeze=True)
    module.bag = [0]
    for turn in range(30):
        module.scale = turn
        module(torch.randn(4, 3))
    assert len(made) <= 10
    assert torchcache.stats(module).bypasses == 120


class Moving(nn.Module):
    """Moves a parameter in each call, its own or one that is not of its tree; sets a table up where it needs one."""

    def __init__(self, outside, write):
        super().__init__()
        self.outside, self.write = outside, write
        held = nn.Linear(3, 3).requires_grad_(False)
        self.held, self.tables = [held] if outside else held, {}

    def forward(self, x):
        held = self.held[0] if self.outside else self.held
        if x.shape[0] not in self.tables:
            self.tables[x.shape[0]] = torch.zeros(3)
        made = held(x) + self.tables[x.shape[0]]
        self.write(held.weight, held.weight.detach() * 0.9 + x.mean())
        return made


def _through_data(weight, value):
    weight.data.copy_(value)


@torch.no_grad()
def _in_place(weight, value):
    weight.copy_(value)


@pytest.mark.parametrize("write", [_through_data, _in_place])
@pytest.mark.parametrize("where", ["inside", "outside", "function"])
def test_parameters_are_written_as_often_as_the_caller_calls(where, write):
    twin = Moving(where != "inside", write)
    module = copy.deepcopy(twin)
    cached = torchcache.cached(lambda x: module(x)) if where == "function" else torchcache.mark(module)
    for rows in (4, 4, 4, 4, 5, 5, 4, 6):
        x = torch.randn(rows, 3)
        assert torch.equal(cached(x), twin(x))


def _set_data(net, x):
    net.weight.data = net.weight.data * 0.9


def _view_data(net, x):
    net.weight.data.view(-1).mul_(0.9)


def _average(net, x):
    net.bias.data.mul_(0.9).add_(x.mean(0), alpha=0.1)


def _set_gradient(net, x):
    net.weight.grad = torch.ones(3, 3)


@torch.enable_grad()
def _backward(net, x):
    net.weight.requires_grad_()
    (net.weight * x.mean(0)).sum().backward()
    net.weight.requires_grad_(False)


@torch.enable_grad()
def _backward_in_place(net, x):
    if net.weight.grad is None:
        net.weight.grad = torch.zeros(3, 3)
    net.weight.grad += 1


def _swap(net, x):
    net.weight, net.other = net.other, net.weight


def _through_numpy(net, x):
    net.kept.numpy()[0] += 1


def _slice(net, x):
    net.kept[:2] += 1


def _slice_data(net, x):
    net.kept.data[:2].add_(1)


class Written(nn.Linear):
    """Writes to its state in each call, and sets a table up in the first."""

    def __init__(self, write):
        super().__init__(3, 3)
        self.other = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("kept", torch.zeros(3))
        self.write, self.tables = write, {}
        self.requires_grad_(False)

    def forward(self, x):
        self.write(self, x)
        if 3 not in self.tables:
            self.tables[3] = torch.arange(3.0) * self.weight.data[0]
        return super().forward(x) + self.kept + self.tables[3]


WRITES = [
    _set_data,
    _view_data,
    _average,
    _set_gradient,
    _backward,
    _backward_in_place,
    _swap,
    _through_numpy,
    _slice,
    _slice_data,
]


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("write", WRITES)
def test_state_is_written_once_a_call(write, backend):
    twin = Written(write)
    module = torchcache.mark(copy.deepcopy(twin))
    run = torch.compile(module, backend=backend) if backend else module
    with torch.no_grad():
        for rows in (4, 4, 5, 4):
            x = torch.randn(rows, 3)
            torch.testing.assert_close(run(x), twin(x))
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))
    for given, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert type(given.grad) is type(expected.grad)
        torch.testing.assert_close(given.grad, expected.grad)


class Averaged:
    """An average that is kept in memory of one kind, and how it is read."""

    def __init__(self, kept, read):
        self.kept, self.read = kept, read


AVERAGES = {
    "array": lambda: Averaged(np.ones(3, np.float32), torch.from_numpy),
    "large array": lambda: Averaged(np.ones(30_000, np.float32), lambda kept: torch.from_numpy(kept)[:3]),
    "bytearray": lambda: Averaged(bytearray(np.ones(3, np.float32)), _floats),
    "array of Python": lambda: Averaged(array.array("f", [1, 1, 1]), _floats),
    "memoryview": lambda: Averaged(memoryview(bytearray(np.ones(3, np.float32))), _floats),
    "tensors": lambda: Averaged(collections.deque([(torch.ones(3),)]), lambda kept: kept[0][0]),
    "object in a cache": lambda: Averaged(_kept_in_a_cache(), lambda kept: kept().mean),
    "buffer": lambda: Averaged(nn.BatchNorm1d(3), lambda kept: kept.running_var),
    "parameter": lambda: Averaged(nn.Linear(1, 3).requires_grad_(False), lambda kept: kept.weight[:, 0]),
}


def _kept_in_a_cache():
    return functools.cache(lambda: types.SimpleNamespace(mean=torch.ones(3)))


def _floats(kept):
    return torch.frombuffer(kept, dtype=torch.float32)


class Scaling(nn.Module):
    """Scales by an average of what it saw, of which no attribute of a module is the memory."""

    def __init__(self, average):
        super().__init__()
        self.average = [average]

    @torch.no_grad()
    def forward(self, x):
        scale = self.average[0].read(self.average[0].kept)
        scaled = x * scale.clone()
        scale.detach().numpy()[:] += x.mean(0).numpy()
        return scaled


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("function", [False, True], ids=["module", "function"])
def test_what_is_written_beneath_objects_is_written_once_a_call(function, kind):
    torch.manual_seed(0)
    module = Scaling(AVERAGES[kind]())
    torch.manual_seed(0)
    twin = Scaling(AVERAGES[kind]())
    cached = torchcache.cached(lambda x: module(x)) if function else torchcache.mark(module, audit=0)
    for x in [torch.randn(4, 3) for _ in range(4)] * 2:
        assert torch.equal(cached(x), twin(x))


# A source, and how something is taken from it.
SOURCES = {
    "random.Random": (lambda: random.Random(0), random.Random.random),
    "Generator of NumPy": (lambda: np.random.default_rng(0), lambda source: source.random()),
    "RandomState of NumPy": (lambda: np.random.RandomState(0), lambda source: source.rand()),
    "Generator of torch": (torch.Generator, lambda source: torch.rand((), generator=source).item()),
    "count": (itertools.count, next),
    "iterator": (lambda: iter(range(100)), next),
    "queue": (lambda: _queue(range(100)), lambda source: source.get()),
    "bytes": (lambda: io.BytesIO(bytes(100)), lambda source: source.read(1) and source.tell()),
    "variable of contexts": (lambda: _with_context(), lambda source: source.set(source.get() + 1) and source.get()),
    "thread's own": (lambda: _counting(threading.local()), lambda source: _count(source)),
    "computed name": (lambda: _counting(types.SimpleNamespace()), lambda source: _count_by_name(source, "number")),
    "attribute beneath its class": (lambda: _counting(types.SimpleNamespace()), lambda source: _count_beneath(source)),
    "whole dict": (lambda: _counting(argparse.Namespace()), lambda source: _count_in_another_dict(source)),
    "default of a function": (lambda: _with_default(), lambda source: _count_default(source)),
    "buffers beside": (nn.Module, lambda source: _count_buffers(source)),
    "children beside": (nn.ModuleList, lambda source: len(source.append(nn.Identity()))),
    "hooks beside": (nn.Identity, lambda source: source.register_forward_hook(print) and len(source._forward_hooks)),
    "training beside": (lambda: nn.Linear(3, 3).requires_grad_(False), lambda source: _toggle(source)),
    "attribute of a function": (lambda: _counting(lambda: 0), lambda source: _count(source)),
    "attribute of a module": (lambda: _counting(types.ModuleType("counting")), lambda source: _count(source)),
    "attribute of a tensor": (lambda: _counting(torch.zeros(2)), lambda source: _count(source)),
    "array of objects": (lambda: np.array([0, None], dtype=object), lambda source: _count_item(source)),
    "masked array": (lambda: np.ma.array([0, 1], mask=[False, True]), lambda source: _count_item(source)),
}


def _counting(source):
    source.number = 0
    return source


def _count(source):
    source.number += 1
    return source.number


def _count_by_name(source, name):
    setattr(source, name, getattr(source, name) + 1)
    return source.number


def _count_beneath(source):
    object.__setattr__(source, "number", source.number + 1)
    return source.number


def _count_in_another_dict(source):
    source.__dict__ = {"number": source.number + 1}
    return source.number


def _with_default():
    return lambda number=0: number


def _count_default(source):
    source.__defaults__ = (source() + 1,)
    return source()


def _count_buffers(source):
    source.register_buffer(f"kept{len(source._buffers)}", torch.ones(1))
    return len(source._buffers)


def _toggle(source):
    return source.requires_grad_(not source.weight.requires_grad).weight.requires_grad


def _count_item(source):
    source[0] += 1
    return source[0]


def _with_context():
    variable = contextvars.ContextVar("counting")
    variable.set(0)
    return variable


def _queue(items):
    filled = queue.Queue()
    for item in items:
        filled.put(item)
    return filled


class Taking(nn.Linear):
    """Takes from a source in each call."""

    def __init__(self, source, take):
        super().__init__(3, 3)
        self.source, self.take = [source], take

    def forward(self, x):
        self.take(self.source[0])
        return super().forward(x)


@pytest.mark.parametrize("backend", [None, "eager", "torchcache"])
@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_taken_in_a_call_is_taken_once_a_call(kind, backend):
    made, take = SOURCES[kind]
    twin, module = Taking(made(), take), torchcache.mark(Taking(made(), take), freeze=True)
    options = {"options": {"inner": "eager"}} if backend == "torchcache" else {}
    run = torch.compile(module, backend=backend, **options) if backend else module
    for _ in range(6):
        x = torch.randn(4, 3)
        run(x), twin(x)
    assert take(module.source[0]) == take(twin.source[0])
    assert torchcache.stats(module).hits == 0
    assert reasons(module)


class Beside(nn.Module):
    """Reads what has no identity beside its frozen part."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 8).requires_grad_(False), nn.Linear(8, 2)
        self.source = iter([])

    def forward(self, x):
        return self.head(self.body(x).tanh()) if self.source is not None else x


@pytest.mark.skipif(not dynamo.names_parts(), reason="this torch does not say of nodes whose they are")
def test_a_frozen_part_is_cached_in_compiled_models_beside_what_cannot_be_read():
    model = torchcache.mark(Beside(), audit=0)
    compiled, x = torch.compile(model, backend="torchcache", options={"inner": "eager"}), torch.randn(4, 3)
    for _ in range(4):
        compiled(x).sum().backward()
    assert counts(model) == (4, 12)


COUNTED = contextvars.ContextVar("COUNTED", default=0)
LOCAL = threading.local()


class Anything:
    """Has attributes."""


def _counted_by_a_function():
    _counted_by_a_function.calls += 1
    return _counted_by_a_function.calls


def _count_in_a_function():
    _counted_by_a_function.calls = 0
    return _counted_by_a_function


def _count_in_a_context():
    COUNTED.set(0)
    return lambda: COUNTED.set(COUNTED.get() + 1) and COUNTED.get()


def _count_in_a_thread():
    LOCAL.calls = 0

    def count():
        LOCAL.calls += 1
        return LOCAL.calls

    return count


def _count_by_a_name():
    held, name = Anything(), "calls"

    def count():
        setattr(held, name, getattr(held, name, 0) + 1)
        return held.calls

    return count


def _count_in_an_array():
    held = np.array([0, None])

    def count():
        held[0] += 1
        return held[0]

    return count


def _draw():
    generator = random.Random(0)
    return lambda: generator.random()


class Counts(nn.Module):
    """Scales by what a function gives, which is another number in each call, or calls it for nothing."""

    def __init__(self, count, scales):
        super().__init__()
        self.count, self.scales = count, scales

    def forward(self, x):
        number = self.count()
        return x * number if self.scales else x * 2


@pytest.mark.parametrize("scales", [False, True], ids=["for nothing", "scales"])
@pytest.mark.parametrize(
    "begin",
    [_count_in_a_function, _count_in_a_context, _count_in_a_thread, _count_by_a_name, _count_in_an_array, _draw],
)
def test_what_no_probe_could_put_back_is_written_once_a_call(begin, scales):
    plain = Counts(begin(), scales)
    batches = [torch.randn(3, 2) for _ in range(4)] * 2
    expected = [plain(x) for x in batches], plain.count()
    module = torchcache.mark(Counts(begin(), scales), audit=0)
    assert_same(([module(x) for x in batches], module.count()), expected)
    assert counts(module) == (0, 0)


class Reader(nn.Module):
    """A model behind what turns texts into its inputs, as libraries pair them."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(nn.Linear(4, 4))
        self.words = iter(["a", "b"])

    def forward(self, features):
        return self.stage(features["x"] if self.words else features["y"])


def test_the_part_that_has_the_weights_is_named_where_it_is_another_that_cannot_be_read(warnings):
    reader = torchcache.mark(Reader(), freeze=True)
    x = torch.randn(3, 4)
    assert torch.equal(reader({"x": x}), reader.stage(x))
    assert "mark its part stage.0 (Linear) alone" in warnings[0]
    outer = torchcache.mark(nn.Sequential(Unreadable()), freeze=True)
    outer(torch.randn(2, 3))
    assert "0.source is" in warnings[1]
    assert "mark its part" not in warnings[1]


class Pictured(torch.Tensor):
    """A tensor that knows more, as libraries of images have them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_of_another_class_is_computed_and_what_to_pass_is_said(warnings):
    linear, x = torchcache.mark(nn.Linear(4, 4), freeze=True), torch.randn(3, 4)
    assert type(linear(x.as_subclass(Pictured))) is Pictured
    assert "as_subclass(torch.Tensor)" in warnings[0]
    for _ in range(2):
        linear(x.as_subclass(Pictured).as_subclass(torch.Tensor))
    assert torchcache.stats(linear).hits == 3


def test_a_captured_cuda_graph_holds_no_lookup(monkeypatch):
    """What is looked up while it is captured would be what every replay gives."""
    net, x = torchcache.mark(nn.Linear(4, 4).requires_grad_(False)), torch.randn(3, 4)
    net(x)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    net(x)
    monkeypatch.undo()
    net(x)
    stats = torchcache.stats(net)
    assert (stats.hits, stats.misses, stats.bypasses) == (3, 3, 3)
    assert stats.regions[0].reasons == {"a CUDA graph is being captured": 3}


class Spelled(nn.Module):
    def forward(self, x, names):
        return x * torch.tensor([float(len(name)) for name in names])[:, None]


def test_reasons_that_differ_in_numbers_are_said_a_few_times_and_counted_together(warnings):
    module = torchcache.mark(Spelled())
    for count in range(2, 40):
        module(torch.randn(count, 4), ["a"] * count)
    assert len(warnings) <= 3
    assert "pass 'names' as tensors with a row a sample" in warnings[0]
    assert len(torchcache.stats(module).regions[0].reasons) <= 3
    assert sum(torchcache.stats(module).regions[0].reasons.values()) == sum(range(2, 40))


class Packed(nn.Module):
    """Its output is as long as the longest row of the batch."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)[0]


def test_a_list_of_a_tensor_for_each_sample_is_told_of(warnings):
    class Detects(nn.Linear):
        def forward(self, x):
            return [super(Detects, self).forward(row)[: 1 + place % 3] for place, row in enumerate(x)]

    module = torchcache.mark(Detects(4, 4), freeze=True)
    for _ in range(4):
        assert len(module(torch.randn(5, 3, 4))) == 5
    assert reasons(module) == "its output holds 5 tensors for 5 rows, none of them with one row a sample"
    assert any("stack them" in text for text in warnings)


def test_rows_that_are_as_long_as_the_longest_of_their_batch_are_computed(warnings):
    module = torchcache.mark(Packed(), freeze=True)
    plain = unmarked(module)
    for _ in range(6):
        batch = torch.randn(4, 30, 4), torch.randint(9, 31, (4,))
        torch.testing.assert_close(module(*batch), plain(*batch))
    assert reasons(module) == "the size of a row of output depends on the other rows of the batch"
    assert len(warnings) == 1


HOOKS = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_set_a_weight_in_each_call_are_told_of(kind, warnings):
    layer = nn.Linear(4, 4)
    HOOKS[kind](layer)
    module = torchcache.mark(nn.Sequential(layer), freeze=True)
    for _ in range(6):
        x = torch.randn(4, 4)
        torch.testing.assert_close(module(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert any("writes to 0.weight" in text and "parametrizations" in text for text in warnings)


KEYS = {
    "sum": lambda seen, x: x.sum().item(),
    "first": lambda seen, x: x[0, 0].item(),
    "bytes": lambda seen, x: x.numpy().tobytes(),
    "call": lambda seen, x: len(seen),
}


class Keeping(nn.Linear):
    """Notes something of each batch in a dict, which only grows."""

    def __init__(self, key):
        super().__init__(3, 3)
        self.key, self.seen = key, {}

    def forward(self, x):
        self.seen[self.key(self.seen, x)] = len(x)
        return super().forward(x)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("kind", KEYS)
def test_what_is_noted_of_each_batch_in_a_growing_dict_is_written(kind, backend):
    twin = Keeping(KEYS[kind]).requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(twin))
    run, x = torch.compile(module, backend=backend) if backend else module, torch.randn(12, 3)
    for epoch in range(4):
        for rows in torch.randperm(12, generator=torch.Generator().manual_seed(epoch)).split(6):
            torch.testing.assert_close(run(x[rows]), twin(x[rows]))
    assert [*module.seen.items()] == [*twin.seen.items()]
    assert torchcache.stats(module).hits == 0


class Unsized(tuple):
    """As the irreducible representations of a model of molecules: what has no length."""

    __slots__ = ()

    def __len__(self):
        raise TypeError("it has no length")


def test_a_container_that_may_not_be_asked_for_its_length_is_left_alone():
    model = nn.Linear(4, 4)
    model.sizes = Unsized((1, 2))
    torchcache.mark(model, freeze=True)
    for _ in range(2):
        model(torch.ones(4, 4).cumsum(0))
    assert counts(model) == (4, 4)


class Table:
    """A container that pytree knows, with a function that it keeps beside its tensors."""

    def __init__(self, data, make=lambda data: data):
        self.data, self.make = data, make


pytree.register_pytree_node(
    Table, lambda table: ([table.data], {"make": table.make}), lambda data, context: Table(*data, context["make"])
)


class Tabled(nn.Linear):
    def forward(self, table):
        return Table(super().forward(table.data))


def test_what_is_not_taken_apart_is_named_as_its_user_knows_it():
    model = torchcache.mark(Tabled(4, 4), freeze=True)
    for _ in range(3):
        model(Table(torch.randn(4, 4)))
    assert reasons(model) == "argument 'table' is a Table, which torchcache cannot take apart"


def test_statistics_of_batches_are_told_of_with_advice(warnings):
    model = torchcache.mark(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), freeze=True)
    model(torch.randn(8, 4))
    model[1].train()
    for _ in range(4):
        model(torch.randn(8, 4))
    assert any("call .eval() on 1, which takes statistics of its batches" in text for text in warnings)
