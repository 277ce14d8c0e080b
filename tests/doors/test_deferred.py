"""``torchcache.deferred``: what is not built serves what another run stored, and nothing that building would refute."""

import collections
import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from marked import counts, reasons
from torch import nn

import torchcache
from torchcache import stand_in
from torchcache.checks import stored

WIDTH = 8


class Net(nn.Module):
    """Tokens of sequences of numbers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(WIDTH, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x, scale=None):
        found = self.last(torch.tanh(self.body(x)))
        return found if scale is None else found * scale

    def encode(self, x):
        return self.body(x), {"mean": self.body(x).mean(-1), "name": "a", "share": 0.25, "all": [True, None]}


def data(count=12, *shape):
    return torch.randn(count, *(shape or (3, WIDTH)), generator=torch.Generator().manual_seed(7))


class Runs:
    """Deferred modules over one directory, each as a process of its own would have it."""

    def __init__(self, directory):
        self._directory = str(directory)
        self.built = 0

    def __call__(self, build=Net, **options):
        def counted():
            self.built += 1
            return build()

        torchcache.flush()
        self.built = 0
        return torchcache.deferred(counted, **{"identity": "net@1", "persistent_cache_dir": self._directory, **options})


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def filled(runs, build=Net, batches=None, call=lambda module, batch: module(batch), **options):
    """A run that stores the rows of ``batches``."""
    module = runs(build, **options)
    for batch in data().split(4) if batches is None else batches:
        call(module, batch)
    torchcache.flush()
    return module


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(got, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    elif isinstance(got, (tuple, list)):
        assert len(got) == len(expected)
        [assert_same(*pair) for pair in zip(got, expected, strict=True)]
    elif isinstance(got, dict):
        assert [*got] == [*expected]
        assert_same([*got.values()], [*expected.values()])
    else:
        assert got == expected


def test_a_run_that_finds_all_rows_builds_nothing(runs):
    filled(runs)
    assert runs.built == 1
    module, twin = runs(), Net().eval()
    for batch in [*data().split(5), data().flip(0)]:
        assert_same(module(batch), twin(batch).detach())
    assert runs.built == 0
    assert counts(module) == (0, 24)
    assert "it is not there, since all rows were found" in str(torchcache.stats(module))
    assert "not built" in repr(module)


def test_another_process_need_not_have_the_code(tmp_path):
    code = """
        import sys, torch, torchcache

        def build():
            assert {first}, "this was not to be built"
            import wave  # stands for a large library
            torch.manual_seed(0)
            return torch.nn.Linear(4, 2)

        encoder = torchcache.deferred(build, identity="linear", persistent_cache_dir=sys.argv[1])
        rows = torch.arange(32.0).reshape(8, 4)
        print(torch.cat([encoder(part) for part in rows.split(4)]).tolist())
        assert ("wave" in sys.modules) == {first}
        """
    found = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code).format(first=first), str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for first in (True, False)
    ]
    assert found[0] == found[1] != ""


@pytest.mark.parametrize("output", [None, lambda found: found[:, 0], lambda found: (found.half(), [found.amax(1)])])
def test_what_is_made_of_the_output(runs, output):
    filled(runs, output=output)
    module, found = runs(output=output), Net()(data()).detach()
    assert_same(module(data()), found if output is None else output(found))
    assert runs.built == 0


def test_another_function_of_the_output_has_rows_of_its_own(runs):
    filled(runs, output=lambda found: found[:, 0])
    module = runs(output=lambda found: found[:, 1])
    assert_same(module(data()), Net()(data())[:, 1].detach())
    assert runs.built == 1


def test_a_method_and_a_structure(runs):
    filled(runs, lambda: Net().encode)
    module = runs(lambda: Net().encode)
    got, expected = module(data()), Net().eval().requires_grad_(False).encode(data())
    assert_same(got, expected)
    assert runs.built == 0


@pytest.mark.parametrize("how", ["named", "class"])
def test_a_structure_that_cannot_be_kept_is_built_and_this_is_said(runs, warnings, how):
    kind = collections.namedtuple("Outputs", "tokens")

    class Other(Net):
        def forward(self, x):
            found = super().forward(x)
            return kind(found) if how == "named" else collections.OrderedDict(tokens=found)

    filled(runs, Other)
    assert any("is built in every process, since its output holds a" in text for text in warnings)
    module = runs(Other)
    assert_same(module(data())[0] if how == "named" else module(data())["tokens"], Net()(data()).detach())
    assert runs.built == 1


def test_a_miss_builds_it_once_and_draws_nothing(runs):
    filled(runs)
    module, twin = runs(), Net().eval().requires_grad_(False)
    new = data(20)[12:]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for batch in (data()[:4], new[:4], new[4:], torch.cat([data()[:3], new[:2]])):
        assert_same(module(batch), twin(batch))
    assert torch.equal(torch.rand(3), expected)
    assert runs.built == 1
    assert counts(module) == (8, 9)


def test_threads_build_it_once(runs):
    module, results = runs(), []
    threads = [threading.Thread(target=lambda: results.append(module(data()))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert runs.built == 1
    for result in results:
        assert_same(result, Net()(data()).detach())


@pytest.mark.parametrize("audit", [0.01, 0])
def test_what_is_built_otherwise_than_its_rows_is_found_out(runs, warnings, audit):
    filled(runs)
    other = Net(1).eval().requires_grad_(False)
    module = runs(lambda: Net(1), audit=audit)
    module(data()[:4])  # nobody can know
    assert runs.built == 0
    mixed = torch.cat([data()[4:8], data(20)[12:16]])
    for batch in (mixed, mixed, data()):
        assert_same(module(batch), other(batch))
    assert any("what was built is not what its rows came from" in text for text in warnings)
    assert torchcache.stats(module).regions[0].alarms == 1
    again = runs(lambda: Net(1))
    assert_same(again(data()), other(data()))  # none of the old rows is left
    assert runs.built == 1


def test_what_is_built_with_another_shape_of_outputs_is_found_out(runs, warnings):
    filled(runs)
    module = runs(lambda: Net().encode)
    module(data()[:4])
    mixed = torch.cat([data()[4:8], data(20)[12:16]])
    expected = Net().requires_grad_(False).encode(mixed)
    assert_same(module(mixed), expected)
    assert_same(module(mixed), expected)
    assert any("what was built is not what its rows came from" in text for text in warnings)


def test_weights_that_change_once_it_is_built(runs):
    module = filled(runs)
    module.build().last.weight.add_(1.0)
    twin = Net().requires_grad_(False)
    twin.last.weight.add_(1.0)
    assert_same(module(data()), twin(data()))
    module.build().last.weight.sub_(1.0)
    assert_same(module(data()), Net()(data()).detach())
    fresh = runs()
    assert_same(fresh(data()), Net()(data()).detach())  # nothing was filed under the plain name
    assert runs.built == 0


def test_a_module_that_sets_itself_up_in_its_first_call(runs):
    class Lazy(Net):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.table = torch.arange(4.0)
            return super().forward(x) + self.table

    filled(runs, Lazy)
    module = runs(Lazy)
    assert_same(module(data()), Net()(data()).detach() + torch.arange(4.0))
    assert runs.built == 0


def test_casts_of_the_model_around_it_count_and_reach_it(runs):
    filled(runs)
    model = nn.Sequential(runs()).to(torch.bfloat16)
    got = model(data().bfloat16())
    assert runs.built == 1
    assert got.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model[0].build().parameters()} == {torch.bfloat16}
    again = nn.Sequential(runs()).bfloat16()
    assert torch.equal(again(data().bfloat16()), got)
    assert runs.built == 0
    module = runs()
    module.build()
    assert {parameter.dtype for parameter in nn.Sequential(module).double().parameters()} == set()
    assert {parameter.dtype for parameter in module.build().parameters()} == {torch.float64}


CHAINS = [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.bfloat16),
    (torch.float64, torch.bfloat16, torch.float32), (torch.bfloat16, torch.float64, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("when", ["before it is built", "while it is there", "and it is built again"])
def test_what_is_cast_several_times_is_rounded_each_time(runs, chain, when):
    filled(runs)
    model, twin = nn.Sequential(runs()), nn.Sequential(Net()).eval().requires_grad_(False)
    if when != "before it is built":
        model[0].build()
    for dtype in chain:
        model.to(dtype)
        twin.to(dtype)
        if when == "and it is built again":
            model[0].build()
    rows = data().to(chain[-1])
    assert_same(model(rows), twin(rows))
    for mine, its in zip(model[0].build().parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([torch.float32], [torch.float64, torch.float32]),
        ([torch.bfloat16, torch.float32], [torch.bfloat16, torch.float64, torch.bfloat16, torch.float32]),
    ],
)
def test_casts_that_lose_nothing_have_the_same_rows(runs, first, then):
    built, got = [], []
    for chain in ([], first, then):
        model = nn.Sequential(runs())
        for dtype in chain:
            model.to(dtype)
        got.append(model(data()))
        built.append(runs.built)
    assert built == [1, 1, 0]
    assert torch.equal(got[1], got[2])


def test_what_was_changed_is_cast_as_it_is(runs):
    module, twin = runs(), Net().eval().requires_grad_(False)
    for each in (module.build(), twin):
        each.last.weight.add_(1.0)
        each.body = nn.Linear(WIDTH, 16).requires_grad_(False)
    twin.body.load_state_dict(module.build().body.state_dict())
    for dtype in (torch.float16, torch.float32):
        nn.Sequential(module).to(dtype)
        assert_same(module(data().to(dtype)), twin.to(dtype)(data().to(dtype)))


def test_checkpoints_and_optimizers_see_nothing_of_it(runs):
    model = nn.Sequential(runs(), nn.Linear(4, 2))
    before = [*model.state_dict()]
    model.train()
    model(data())
    assert [*model.state_dict()] == before == ["1.weight", "1.bias"]
    assert not model[0].build().training
    assert len([*model.parameters()]) == 2
    model.load_state_dict(model.state_dict())


def test_gradients_reach_the_head_and_an_input_that_needs_one(runs):
    filled(runs)
    model = nn.Sequential(runs(), nn.Linear(4, 2))
    model(data()).sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    assert runs.built == 0
    images = data().requires_grad_()
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert runs.built == 1


def test_copies_and_pickles(runs, tmp_path):
    filled(runs)
    assert_same(copy.deepcopy(runs())(data()), Net()(data()).detach())
    assert runs.built == 0
    module = torchcache.deferred(Net, identity="net@1", persistent_cache_dir=str(tmp_path))
    copied = pickle.loads(pickle.dumps(module))
    assert_same(copied(data()), Net()(data()).detach())
    assert not copied.built
    copied = copy.deepcopy(filled(runs))
    assert_same(copied(data(20)), Net()(data(20)).detach())


def test_shared_arguments_count_with_their_shapes(runs):
    scales = [torch.full((4,), 2.0), torch.full((1, 4), 3.0), torch.full((3, 4), 0.5)]
    for scale in scales:
        filled(runs, batches=[data()], call=lambda module, batch, scale=scale: module(batch, scale=scale))
    module = runs()
    for scale in scales:
        assert_same(module(data(), scale=scale), Net()(data(), scale).detach())
    assert runs.built == 0
    assert_same(module(data(), scale=torch.full((4,), 5.0)), Net()(data(), torch.full((4,), 5.0)).detach())
    assert runs.built == 1


def test_rows_along_the_second_dimension_and_other_orders_in_memory(runs):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.GRU(WIDTH, 4)

        def forward(self, x):
            return self.body(x)

    series = data(5, 6, WIDTH)
    filled(runs, Recurrent, [series], batch_dim=1)
    module, twin = runs(Recurrent, batch_dim=1), Recurrent().eval().requires_grad_(False)
    some = series[:, :4].contiguous()  # with gaps in memory they are other rows
    assert_same(module(some), twin(some))
    assert runs.built == 0

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.body(x)

    images = data(6, 3, 8, 8).to(memory_format=torch.channels_last)
    filled(runs, Conv, [images], identity="conv")
    module, expected = runs(Conv, identity="conv"), Conv()(images).detach()
    got = module(images)
    assert_same(got, expected)
    assert got.stride() == expected.stride()
    assert runs.built == 0


def test_modes_have_rows_of_their_own(runs):
    def under_autocast(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return module(batch)

    filled(runs, call=under_autocast)
    module = runs()
    assert under_autocast(module, data()).dtype == torch.bfloat16
    assert runs.built == 0
    assert module(data()).dtype == torch.float32
    assert runs.built == 1


def test_under_inference_mode(runs):
    with torch.inference_mode():
        module = filled(runs)
    assert not any(parameter.is_inference() for parameter in module.build().parameters())
    with torch.inference_mode():
        assert_same(runs()(data()), Net()(data()).detach())
    assert runs.built == 0


@pytest.mark.parametrize("door", ["transform", "aot_eager", "torchcache"])
def test_other_ways_in(runs, door):
    filled(runs)
    model = nn.Sequential(runs(), nn.Linear(4, 2))
    if door == "transform":
        run = torchcache.transform(model)
    elif door == "torchcache":
        run = torch.compile(model, backend=torchcache.torchcache_backend)
    else:
        run = torch.compile(model, backend=door)
    for batch in data().split(4):
        assert_same(run(batch), model[1](Net()(batch).detach()))
    assert runs.built == 0
    new = data(20)[12:]
    assert_same(run(new), model[1](Net()(new).detach()))
    assert runs.built == 1


def test_samples_need_not_be_loaded(runs, tmp_path, warnings):
    rows, asked = data(64, 128, WIDTH), []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            asked.append(index)
            time.sleep(2e-4)  # faster ones are loaded
            return rows[index]

    def loader():
        return torchcache.DataLoader(
            Rows(), batch_size=8, dataset_id="rows", persistent=True, persistent_cache_dir=str(tmp_path)
        )

    module, first = runs(), loader()
    for _ in range(4):
        asked.clear()
        for batch in first:
            module(batch)
    assert len(asked) < 32
    assert not any("loaded in every epoch" in text for text in warnings)
    module, asked[:] = runs(), []
    for number, batch in enumerate(loader()):
        assert_same(module(batch), Net()(rows[8 * number : 8 * number + 8]).detach())
    assert runs.built == 0
    assert len(asked) < 32


def test_explain_and_summary(runs):
    filled(runs)
    module = runs()
    module(data())
    assert "net@1" in str(torchcache.summary(module))
    assert runs.built == 0
    assert "net@1" in str(torchcache.explain(module, data()))


def test_errors_of_building_are_the_users_own(runs):
    def fails():
        raise OSError("no such weights")

    module = runs(fails)
    for _ in range(2):
        with pytest.raises(OSError, match="no such weights"):
            module(data())
    with pytest.raises(torchcache.MarkError, match="what build returns is a int"):
        runs(lambda: 3)(data())
    with pytest.raises(AttributeError, match=r"no attribute 'config'.*build\(\) returns that"):
        _ = runs().config
    assert not hasattr(runs(), "config")


def test_wrong_options():
    for options, error in [
        ({"identity": ""}, TypeError),
        ({"identity": "a", "padding": "mask"}, ValueError),
        ({"identity": "a", "persistent_module_hash": "b"}, ValueError),
        ({"identity": "a", "output": 3}, TypeError),
    ]:
        with pytest.raises(error, match="torchcache"):
            torchcache.deferred(Net, **options)
    with pytest.raises(TypeError, match="build must be a function"):
        torchcache.deferred(3, identity="a")


def test_without_a_directory_it_is_built_in_each_process(runs):
    module = runs(persistent=False)
    module(data())
    assert_same(module(data()), Net()(data()).detach())
    assert (runs.built, counts(module)) == (1, (12, 12))


def test_switched_off(runs):
    module = runs(enabled=False)
    assert_same(module(data()), Net()(data()).detach())
    filled(runs)
    module = runs()
    with torchcache.bypass():
        assert_same(module(data()), Net()(data()).detach())
    assert runs.built == 1
    assert reasons(module)


def test_tracers_get_what_it_stands_for(runs):
    filled(runs)
    model = nn.Sequential(runs(), nn.Linear(4, 2)).eval()
    exported = torch.export.export(model, (data(),), strict=False).module()
    assert_same(exported(data()), model(data()))
    traced = torch.fx.experimental.proxy_tensor.make_fx(model)(data())
    assert_same(traced(data()), model(data()))
    assert_same(model[0].build()(data()), Net()(data()).detach())


def used(module, calls, batches=None):
    """Calls in which all rows are found; whether it is there after each."""
    batches, there = [*data().split(4)] if batches is None else batches, []
    for number in range(calls):
        module(batches[number % len(batches)])
        there.append(module.built)
    return there


@pytest.fixture
def quick(monkeypatch):
    """What is built takes no time."""
    monkeypatch.setattr(stand_in, "LONGER", 0)


def test_it_is_let_go_where_all_rows_are_found_and_built_again_for_a_miss(runs, quick):
    module, twin = filled(runs), Net().eval().requires_grad_(False)
    reference = weakref.ref(module.build())
    there = used(module, stand_in.FEWEST_CALLS)
    assert there == [True] * (stand_in.FEWEST_CALLS - 1) + [False]
    assert reference() is None
    for batch in data().split(4):
        assert_same(module(batch), twin(batch))
    assert runs.built == 1
    new = data(20)[12:]
    assert_same(module(new), twin(new))
    assert_same(module(torch.cat([new, data()])), twin(torch.cat([new, data()])))
    assert (runs.built, counts(module)[0]) == (2, 20)
    there = used(module, 2 * stand_in.FEWEST_CALLS)
    assert there[-2:] == [True, False]


def test_it_stays_as_long_as_building_is_dear(runs):
    module = filled(runs)
    vars(module)["_seconds"] = 3600.0
    assert all(used(module, 3 * stand_in.FEWEST_CALLS))
    vars(module)["_seconds"] = 0.0
    assert not used(module, 1)[0]


def test_it_stays_where_that_is_wished_or_it_was_changed(runs, quick):
    module = filled(runs, release=False)
    assert all(used(module, 3 * stand_in.FEWEST_CALLS))
    module = filled(runs, identity="other")
    module.build().last.weight.add_(1.0)
    module(data())
    assert all(used(module, 3 * stand_in.FEWEST_CALLS))
    twin = Net().requires_grad_(False)
    twin.last.weight.add_(1.0)
    assert_same(module(data(20)), twin(data(20)))


def test_what_is_built_otherwise_the_second_time(runs, quick, warnings):
    seeds = iter([0, 1])
    module = filled(runs, lambda: Net(next(seeds)))
    used(module, stand_in.FEWEST_CALLS)
    assert not module.built
    other, new = Net(1).eval().requires_grad_(False), data(20)[12:]
    for batch in (new, data(20), data()):
        assert_same(module(batch), other(batch))
    assert any("what is built is another one than before" in text for text in warnings)


def test_what_sets_itself_up_is_the_same_each_time(runs, quick, warnings):
    class Lazy(Net):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.table = torch.arange(4.0)
            return super().forward(x) + self.table

    module, expected = filled(runs, Lazy), Net().eval().requires_grad_(False)
    used(module, 2 * stand_in.FEWEST_CALLS)
    assert not module.built
    with torchcache.bypass():
        module(data())
    new = data(20)[12:]
    for batch in (new, data(20), data()):
        assert_same(module(batch), expected(batch) + torch.arange(4.0))
    assert not any("another one than before" in text for text in warnings)
    assert counts(module)[0] == 20


def test_it_is_let_go_while_threads_use_it(runs, quick, monkeypatch):
    monkeypatch.setattr(stand_in, "FEWEST_CALLS", 1)
    module, twin, errors = filled(runs), Net().eval().requires_grad_(False), []

    def use(seed):
        generator = torch.Generator().manual_seed(seed)
        for number in range(60):
            batch = data() if number % 3 else torch.randn(4, 3, WIDTH, generator=generator)
            try:
                assert_same(module(batch), twin(batch))
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors


def test_a_mark_around_it_is_an_error_or_computed(runs):
    encoder = runs()
    with pytest.raises(torchcache.MarkError, match="mark the modules beside it"):
        torchcache.mark(nn.Sequential(encoder, nn.Linear(4, 2)), freeze=True)

    @torchcache.cached
    def around(x):
        return encoder(x) * 2

    for _ in range(2):
        assert_same(around(data()), Net()(data()).detach() * 2)
    assert "is deferred, and cached for itself" in reasons(around)


def test_a_shape_that_depends_on_the_rows_is_no_change_of_what_is_built(runs, warnings):
    class Cropped(Net):
        def forward(self, x, length):
            return super().forward(x)[:, : int(length)]

    def call(module, length):
        return module(data(), torch.tensor(length))

    filled(runs, Cropped, [3], call)
    module = runs(Cropped)
    for length in (2, 3, 2):
        assert_same(call(module, length), Net()(data())[:, :length].detach())
    assert not any("cached wrongly" in text for text in warnings)
    assert_same(call(runs(Cropped), 3), Net()(data()).detach())


@pytest.mark.parametrize("audit", [0.01, 0])
def test_weights_that_change_before_it_runs(runs, warnings, audit):
    twin = Net().requires_grad_(False)
    twin.last.weight.add_(1.0)
    module = runs(audit=audit)
    module.build().last.weight.add_(1.0)
    assert_same(module(data()), twin(data()))
    assert_same(copy.deepcopy(module)(data()), twin(data()))
    filled(runs, audit=audit)
    module = runs(audit=audit)
    module(data())
    module.build().last.weight.add_(1.0)
    for _ in range(2):
        assert_same(module(data()), twin(data()))
    assert_same(copy.deepcopy(module)(data()), twin(data()))
    assert not any("cached wrongly" in text for text in warnings)
    assert_same(runs()(data()), Net()(data()).detach())
    assert runs.built == 0


@pytest.mark.parametrize("how", ["built", "missing", "in memory"])
def test_without_audits_the_first_rows_are_compared_once_it_is_built(runs, warnings, how):
    filled(runs)
    module, other = runs(lambda: Net(1), audit=0), Net(1).eval().requires_grad_(False)
    module(data()[:4])
    if how == "built":
        module.build()
    else:
        module(torch.cat([data(20)[12:], data()[:4]])[: 8 if how == "missing" else None])
    for batch in (data()[:4], data()[4:]) if how == "in memory" else (data()[4:], data()):
        assert_same(module(batch), other(batch))
    assert any("what was built is not what its rows came from" in text for text in warnings)


def test_an_output_that_trains(runs):
    head = nn.Linear(4, 2)
    filled(runs, output=lambda found: head(found), call=lambda module, batch: torch.no_grad()(module)(batch))
    module = runs(output=lambda found: head(found))
    assert module(data()).requires_grad
    assert_same(module(data()).detach(), head(Net()(data())).detach())


def test_what_asks_for_inference_mode(runs, warnings):
    class Asks(Net):
        def forward(self, x):
            return super().forward(x) * (2.0 if torch.is_inference_mode_enabled() else 1.0)

    with torch.no_grad():
        filled(runs, Asks)
    module = runs(Asks)
    with torch.inference_mode():
        assert_same(module(data()), Net()(data()) * 2)
    assert any("since it asks whether inference mode is on" in text for text in warnings)


def test_a_mark_that_is_made_anew_keeps_the_name(runs):
    filled(runs, identity="one")
    modules = [runs(identity="one"), runs(lambda: Net(1), identity="two")]
    for module, seed in zip(modules, (0, 1), strict=True):
        torchcache.mark(module, persistent=True, persistent_cache_dir=runs._directory, max_memory_cache_size=10_000)
        assert_same(module(data()), Net(seed)(data()).detach())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_is_forked_while_it_is_built(runs):
    begun, go_on = threading.Event(), threading.Event()

    def build():
        begun.set()
        assert go_on.wait(60)
        return Net()

    module = runs(build)
    thread = threading.Thread(target=module, args=(data(),))
    thread.start()
    begun.wait(60)
    with pytest.MonkeyPatch.context():
        child = os.fork()
        if not child:
            go_on.set()
            os._exit(int(not torch.allclose(module(data()), Net()(data()), atol=1e-5)))
    go_on.set()
    thread.join(60)
    assert os.waitpid(child, 0)[1] == 0


def test_what_calls_itself_while_it_is_built(runs):
    made = []
    module = runs(lambda: made[0].build())
    made.append(module)
    with pytest.raises(RuntimeError, match="calls what is to be built"):
        module(data())


def test_no_mode_of_the_call_reaches_what_is_built(runs, tmp_path):
    torch.save(Net().state_dict(), tmp_path / "weights")

    def build():
        net = Net(1)
        net.load_state_dict(torch.load(tmp_path / "weights"))
        net.last.weight.data = net.last.weight.data @ torch.eye(16)
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        return net

    with torch.autocast("cpu", torch.bfloat16):
        runs(build, identity="autocast")(data())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module = runs(build, identity="no_grad")
        module(data())
    assert_same(module(data()), Net()(data()).detach())
    model = nn.Sequential(runs(build, identity="export"))
    exported = torch.export.export(model, (data(),), strict=False).module()
    assert_same(exported(data()), Net()(data()).detach())
    mapped = torch.func.vmap(runs(build, identity="vmap"))(data())
    assert_same(mapped.detach(), Net()(data()).detach())


def test_outputs_of_many_parts_and_large_numbers(runs, warnings):
    class Many(Net):
        def forward(self, x):
            return [*[super().forward(x)] * 3, 10**5000]

    filled(runs, Many)
    assert any("is built in every process" in text for text in warnings)
    assert runs(Many)(data())[3] == 10**5000


def test_rows_on_disk_need_it_as_little(runs, quick):
    module = filled(runs, max_memory_cache_size=0)
    module(data())
    used(module, 2 * stand_in.FEWEST_CALLS)
    assert not module.built
    for batch in data().split(3):
        assert_same(module(batch), Net()(batch).detach())
    assert runs.built == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)


@pytest.mark.once
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(member=st.sampled_from("form roles dims leaves structure key allowed layouts".split()), value=JSON, where=JSON)
@example(member="dims", value=668_315_863, where=0)
@example(member="roles", value=668_315_863, where=0)
def test_a_note_that_somebody_wrote(tmp_path_factory, member, value, where):
    """Whatever it says, calls are answered right: from rows that fit it, or from what is built."""
    runs = Runs(tmp_path_factory.mktemp("notes"))
    real = stored._encoded

    def forged(plan):
        note = json.loads(json.dumps(real(plan)))
        if isinstance(where, int) and isinstance(note[member], list) and note[member]:
            note[member][where % len(note[member])] = value
        else:
            note[member] = value
        return note

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "_encoded", forged)
        filled(runs)
    module = runs()
    for batch in data().split(6):
        assert_same(module(batch), Net()(batch).detach())


@pytest.mark.parametrize("claim", [1 << 39, 1 << 20])
def test_a_note_that_claims_large_rows_takes_no_memory(runs, monkeypatch, claim):
    real = stored._encoded

    def forged(plan):
        return real(plan) | {"leaves": [["torch.float32", [claim, claim]]]}

    monkeypatch.setattr(stored, "_encoded", forged)
    filled(runs)
    assert_same(runs()(data()), Net()(data()).detach())
    assert runs.built == 1


def test_a_note_is_believed_for_no_more_rows_than_memory_has_room_for(runs, monkeypatch):
    filled(runs)
    monkeypatch.setattr(stored, "LARGEST", 4 * 48)  # bytes of four rows
    module = runs(max_memory_cache_size=0)
    module(data()[:4])
    assert runs.built == 0
    assert_same(module(data()), Net()(data()).detach())
    assert runs.built == 1


def test_a_note_of_many_parts_takes_no_time(runs, monkeypatch):
    real = stored._encoded

    def forged(plan):
        deep = ["leaf", 0]
        for _ in range(300):
            deep = ["list", [deep]]
        return real(plan) | {"structure": deep}

    monkeypatch.setattr(stored, "_encoded", forged)
    filled(runs)
    assert_same(runs()(data()), Net()(data()).detach())
    assert runs.built == 1


def test_an_interrupt_before_it_is_built_makes_nobody_wait(runs, monkeypatch):
    module = runs()

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module(data())
    assert_same(module(data()), Net()(data()).detach())
