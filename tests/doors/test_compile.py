"""Door 2: torch.compile with our backend."""

import copy
import dataclasses
import functools
import subprocess
import sys
import warnings
from typing import ClassVar, NamedTuple

import pytest
import torch
from marked import process_group
from torch import nn

import torchcache
from torchcache import dynamo

in_one_graph = pytest.mark.skipif(not dynamo.passes_structures(), reason="this torch ends a graph at such a call")
parts_in_graphs = pytest.mark.skipif(not dynamo.names_parts(), reason="this torch does not say of nodes whose they are")


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x, k=1):
        return torch.relu(self.second(torch.relu(self.first(x)))) * k


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(16, 3)

    def forward(self, x, k=1):
        return self.head(self.backbone(x, k))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair():
    net = Net()
    plain = copy.deepcopy(net)
    torchcache.mark(net.backbone, freeze=True)
    plain.backbone.requires_grad_(False)
    return net, plain


def partly_trainable():
    """A net whose backbone trains its second layer, and an uncached one with the same weights."""
    net = Net()
    net.backbone.first.requires_grad_(False)
    plain = copy.deepcopy(net)
    torchcache.mark(net.backbone)
    return net, plain


def compiled(net, inner="aot_eager", **options):
    return torch.compile(net, backend=torchcache.torchcache_backend, options={"inner": inner, **options})


def step(net, x):
    net.zero_grad()
    out = net(x)
    out.pow(2).sum().backward()
    return out


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_training_steps_are_the_same_without_a_graph_break(inner):
    net, plain = pair()
    run = torch.compile(net, backend=torchcache.torchcache_backend, fullgraph=True, options={"inner": inner})
    x = torch.randn(8, 16)
    mixed = torch.cat([x[:3], torch.randn(5, 16)])
    for batch in (x, x, x[:5], mixed, x[:1], x[[1, 1, 2]]):
        torch.testing.assert_close(step(run, batch), step(plain, batch))
        torch.testing.assert_close(net.head.weight.grad, plain.head.weight.grad)
    assert torchcache.stats(run).misses == 13
    assert torchcache.stats(run).hits == 8 + 5 + 3 + 1 + 3


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_full_and_short_batches_compile_at_most_twice(inner):
    net, _ = pair()
    traces = []

    def counting(module, inputs):
        traces.append(module)
        return torch._dynamo.lookup_backend(inner)(module, inputs)

    run = torch.compile(net, backend=torchcache.torchcache_backend, options={"inner": counting})
    for _ in range(3):
        for rows in (8, 8, 8, 3):
            run(torch.randn(rows, 16))
    assert len(traces) <= 2


def test_any_number_of_rows_runs_without_compiling_again():
    net, plain = pair()
    run = compiled(net, inner="eager")
    data = torch.randn(40, 16)
    run(data[:8]), run(data[30:35])
    with torch.compiler.set_stance("fail_on_recompile"):
        for start, stop in ((3, 12), (10, 17), (5, 20), (12, 24)):
            torch.testing.assert_close(run(data[start:stop]), plain(data[start:stop]))


def test_weights_attributes_and_arguments_are_part_of_the_key():
    net, plain = pair()
    run = compiled(net)
    x = torch.randn(4, 16)
    run(x)
    with torch.no_grad():
        net.backbone.first.weight.add_(1), plain.backbone.first.weight.add_(1)
    torch.testing.assert_close(run(x), plain(x))
    for k in (2, 3, 2, 5, 1):
        torch.testing.assert_close(run(x, k), plain(x, k))
    assert (torchcache.stats(run).misses, torchcache.stats(run).hits) == (4 * 5, 4 * 2)


VALUES = [
    None,
    True,
    2,
    0.5,
    "a",
    (1, None),
    {"a": None, "b": [2]},
    torch.float32,
    torch.channels_last,
    torch.device("cpu"),
]


@in_one_graph
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_what_is_no_tensor_breaks_no_graph(value):
    class Telling(Backbone):
        def forward(self, x, other=1):
            return super().forward(x), other if other is None or isinstance(other, (int, float)) else 0

    module = torchcache.mark(Telling(), freeze=True)
    run = torch.compile(lambda x, value: module(x, value), backend="eager", fullgraph=True)
    x = torch.randn(4, 16)
    for _ in range(2):
        out, told = run(x, value)
        torch.testing.assert_close(out, torch.relu(module.second(torch.relu(module.first(x)))))
        assert repr(told) == repr(value if value in VALUES[:4] else 0)
    stats = torchcache.stats(module)
    assert (stats.misses, stats.hits) == (4, 4)


def test_found_by_name_without_importing_torchcache():
    source = (
        "import torch; m = torch.nn.Linear(2, 2);"
        "f = torch.compile(m, backend='torchcache', options={'inner': 'eager'});"
        "print(f(torch.ones(3, 2)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[3, 2]" in done.stdout


@pytest.mark.parametrize("calls", [False, True])
def test_a_marked_module_compiled_on_its_own_or_a_function_that_calls_it(calls):
    module = torchcache.mark(Backbone(), freeze=True)
    run = compiled((lambda x: module(x) + 1) if calls else module)
    x = torch.randn(4, 16)
    for _ in range(2):
        torch.testing.assert_close(run(x), torch.relu(module.second(torch.relu(module.first(x)))) + calls)
    assert (torchcache.stats(module).misses, torchcache.stats(module).hits) == (4, 4)


def test_a_decorated_function_inside_a_compiled_model():
    @torchcache.torchcache
    def features(x, power=2):
        return torch.fft.rfft(x).abs() ** power

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(9, 2)

        def forward(self, x):
            return self.head(features(x))

    model = Model()
    run = compiled(model)
    x = torch.randn(4, 16)
    for _ in range(2):
        torch.testing.assert_close(run(x), model.head(torch.fft.rfft(x).abs() ** 2))
    assert (torchcache.stats(features).misses, torchcache.stats(features).hits) == (4, 4)


def test_containers_repeated_modules_and_shared_weights():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            first = torchcache.mark(Backbone(), freeze=True)
            second = torchcache.mark(Backbone(), freeze=True)
            second.first.weight = first.first.weight
            self.towers = nn.ModuleList([nn.Sequential(first), nn.Sequential(second)])
            self.head = nn.Linear(16, 2)

        def forward(self, x, y):
            return self.head(self.towers[0](x) + self.towers[0](y) + self.towers[1](x))

    model = Towers()
    run = compiled(model)
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    with torchcache.bypass():
        expected = model(x, y)
    for _ in range(2):
        torch.testing.assert_close(run(x, y), expected)
    assert torchcache.stats(run).misses == 12


@pytest.mark.parametrize("where", ["inside", "behind"])
def test_a_graph_break_inside_or_behind_a_mark(where):
    class Breaking(Backbone):
        def forward(self, x, k=1):
            h = self.first(x)
            if where == "inside":
                torch._dynamo.graph_break()
            return self.second(h) * k

    class Outer(Net):
        def forward(self, x, k=1):
            h = self.backbone(x, k)
            if where == "behind":
                torch._dynamo.graph_break()
            return self.head(h)

    net = Outer()
    net.backbone = torchcache.mark(Breaking(), freeze=True)
    run = compiled(net)
    x = torch.randn(4, 16)
    for _ in range(2):
        torch.testing.assert_close(run(x), net.head(net.backbone.second(net.backbone.first(x))))
    assert (torchcache.stats(run).misses, torchcache.stats(run).hits) == (4, 4)


def test_an_unknown_inner_backend_is_named():
    net, _ = pair()
    with pytest.raises(Exception, match="no_such_backend"):
        compiled(net, inner="no_such_backend")(torch.randn(4, 16))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_an_original_that_returns_its_input_or_one_tensor_twice(inner):
    class Passing(nn.Module):
        def forward(self, x):
            h = x * 2
            return x, h, h[:, :4]

    module = torchcache.mark(Passing())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            a, b, c = self.module(x)
            return a.add(1), b.mul(1), c.mul(3)

    run = compiled(Outer(), inner)
    x = torch.randn(4, 16)
    for _ in range(2):
        for got, expected in zip(run(x), (x + 1, x * 2, x[:, :4] * 6), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("door", ["transform", "eager", "aot_eager"])
def test_a_mark_under_activation_checkpointing_is_cached(door):
    class Checkpointed(Net):
        def body(self, x):
            return torch.relu(self.head(self.backbone(x)))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    net = Checkpointed()
    plain = copy.deepcopy(net)
    torchcache.mark(net.backbone, freeze=True)
    run = torchcache.transform(net) if door == "transform" else compiled(net, door)
    x = torch.randn(4, 16)
    for batch in (x, x, x[:3]):
        torch.testing.assert_close(step(run, batch), step(plain, batch))
        torch.testing.assert_close(net.head.weight.grad, plain.head.weight.grad)
    (region,) = torchcache.stats(run).regions
    assert region.misses == 4


def test_a_partial_is_a_backend_and_passes_options_on():
    seen = []

    def inner(module, example_inputs, **options):
        seen.append(options)
        return module.forward

    net, plain = pair()
    run = torch.compile(net, backend=functools.partial(torchcache.torchcache_backend, inner=inner, depth=3))
    x = torch.randn(4, 16)
    for _ in range(2):
        torch.testing.assert_close(run(x), plain(x))
    assert seen == [{"depth": 3}]
    assert torchcache.stats(run).hits == 4


@parts_in_graphs
@pytest.mark.parametrize("given", ["mode", "options"])
def test_mode_reaches_inductor_for_the_rest_and_for_the_misses(given, monkeypatch):
    seen = []

    class Recording:
        def __init__(self, mode, options, dynamic):
            seen.append((mode, options))

        def __call__(self, module, example_inputs):
            return module.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Recording)
    net, plain = partly_trainable()
    if given == "mode":
        run = torch.compile(net, backend="torchcache", mode="max-autotune")
    else:
        run = torch.compile(
            net, backend="torchcache", options={"mode": "max-autotune", "epilogue_fusion": True, "compile_misses": True}
        )
    x = torch.randn(4, 16)
    for _ in range(2):
        torch.testing.assert_close(run(x), plain(x))
    assert seen == 2 * [("max-autotune", {"epilogue_fusion": True} if given == "options" else None)]


@pytest.mark.parametrize("wrap", ["outside", "inside"])
def test_under_distributed_data_parallel(wrap):
    with process_group():
        net, plain = pair()
        if wrap == "outside":
            run = compiled(nn.parallel.DistributedDataParallel(net))
        else:
            run = nn.parallel.DistributedDataParallel(compiled(net))
        x = torch.randn(4, 16)
        for batch in (x, x, x[:3]):
            torch.testing.assert_close(step(run, batch), step(plain, batch))
            torch.testing.assert_close(net.head.weight.grad, plain.head.weight.grad)
        assert (torchcache.stats(net).misses, torchcache.stats(net).hits) == (4, 7)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dynamic_shapes_from_the_first_call(inner):
    net, plain = pair()
    run = torch.compile(net, backend=torchcache.torchcache_backend, options={"inner": inner}, dynamic=True)
    x = torch.randn(12, 16)
    for rows in (slice(0, 4), slice(3, 9), slice(0, 12), slice(5, 6)):
        torch.testing.assert_close(step(run, x[rows]), step(plain, x[rows]))
        torch.testing.assert_close(net.head.weight.grad, plain.head.weight.grad)
    assert torchcache.stats(net).misses == 12


def test_a_module_that_changes_itself_is_not_compiled_for_each_change(warnings):
    class Noting(Backbone):
        def __init__(self):
            super().__init__()
            self.seen = 0

        def forward(self, x, k=1):
            self.seen = x.shape[0]
            return super().forward(x, k)

    graphs = []

    def inner(module, example_inputs):
        graphs.append(module)
        return module.forward

    net = Net()
    net.backbone = Noting()
    plain = copy.deepcopy(net)
    torchcache.mark(net.backbone, freeze=True)
    run = compiled(net, inner)
    for count in (4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11):
        x = torch.randn(count, 16)
        torch.testing.assert_close(run(x), plain(x))
        assert net.backbone.seen == count
    assert len(graphs) <= torch._dynamo.config.recompile_limit
    assert any("writes to seen" in text for text in warnings)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_an_attribute_that_is_replaced_by_itself_is_not_written(inner):
    class Windows(Backbone):
        """As Swin: the mean is brought to the input's dtype, and the number of rows becomes one of Python's."""

        def __init__(self):
            super().__init__()
            self.mean = torch.ones(1, 16)

        def forward(self, x, k=1):
            self.mean = self.mean.type_as(x)
            rows = int(x.repeat_interleave(2, 0).shape[0] / (16 * 2 / 16))
            return super().forward((x - self.mean).view(rows, -1), k)

    net = Net()
    net.backbone = Windows()
    plain = copy.deepcopy(net)
    torchcache.mark(net.backbone, freeze=True)
    run, x = compiled(net, inner), torch.randn(12, 16)
    for count in (6, 4, 12, 5):
        torch.testing.assert_close(run(x[:count]), plain(x[:count]))
    assert (torchcache.stats(net).misses, torchcache.stats(net).hits) == (12, 15)
    assert type(net.backbone.mean) is torch.Tensor


@pytest.mark.parametrize("first", [True, False])
def test_instances_of_a_class_have_their_own_options(first, tmp_path):
    marked = torchcache.torchcache(type("Marked", (Backbone,), {}))
    x = torch.randn(4, 16)
    nets = []
    for number, enabled in enumerate((first, not first, first, not first)):
        net = Net()
        net.backbone = marked().requires_grad_(False).eval()
        net.backbone.torchcache_enabled = enabled
        net.backbone.torchcache_persistent = True
        net.backbone.torchcache_persistent_cache_dir = str(tmp_path / str(number))
        nets.append((net, enabled, compiled(net)))
    for _ in range(2):
        for _, _, run in nets:
            run(x)
    torchcache.flush()
    for number, (net, enabled, _) in enumerate(nets):
        assert (torchcache.stats(net).misses, torchcache.stats(net).hits) == ((4, 4) if enabled else (0, 0))
        assert (tmp_path / str(number)).exists() == enabled
    net, enabled, run = nets[0]
    net.backbone.torchcache_enabled = not enabled
    run(x)
    assert torchcache.stats(net).hits == (4 if enabled else 0)
    assert torchcache.stats(net).misses == 4


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x, mask=None, how="plain", states=(None,)):
        h = self.linear(x) if mask is None else self.linear(x) * mask
        return {"h": h, "states": states, "how": how}


class Sharing(nn.Module):
    """Returns a dict and a list in two places each."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        h = self.linear(x)
        inner, levels = {"h": h}, [h * 2]
        return {"inner": inner, "all": (inner, levels), "levels": levels}


class Writing(nn.Module):
    """Writes to one of two places, and reads the other."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        found = self.body(x)
        found["inner"]["h"] = found["inner"]["h"] + 1
        found["levels"].append(found["levels"][0] * 3)
        inner, levels = found["all"]
        return self.head(inner["h"] + sum(levels))


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "torchcache"])
def test_what_stands_in_two_places_of_an_output_is_one(backend):
    plain = Writing(Sharing())
    net = copy.deepcopy(plain)
    torchcache.mark(net.body, freeze=True)
    run = net if backend is None else torch.compile(net, backend=backend)
    x = torch.randn(6, 16)
    for _ in range(3):
        torch.testing.assert_close(run(x), plain(x))
    assert torchcache.stats(net).hits == 12


@in_one_graph
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "torchcache"])
def test_none_and_constants_among_arguments_and_outputs_break_no_graph(backend):
    class Head(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body
            self.head = nn.Linear(16, 3)

        def forward(self, x, mask=None, how="tanh"):
            found = self.body(x, mask=mask, how=how, states=(None, 2))
            h = found["h"].tanh() if found["how"] == "tanh" and found["states"][0] is None else found["h"]
            return self.head(h), found["states"], found["how"]

    net = Head(torchcache.mark(Optional(), freeze=True))
    plain = Head(copy.deepcopy(torchcache.unmark(net.body)))
    plain.load_state_dict(net.state_dict())
    torchcache.mark(net.body)
    run = torch.compile(net, backend=backend, fullgraph=True)
    x, mask = torch.randn(6, 16), torch.rand(6, 1)
    for given in ((x,), (x,), (x, mask), (x, None, "torchcache: nothing"), (x, mask)):
        got, expected = run(*given), plain(*given)
        torch.testing.assert_close(got[0], expected[0])
        assert got[1:] == expected[1:]
    assert (torchcache.stats(net).misses, torchcache.stats(net).hits) == (18, 12)


class Crops(nn.Module):
    """How its output lies in memory, and a number in it, depend on the size of its input."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        y = self.convolution(x)
        return (y.contiguous(memory_format=torch.channels_last) if x.shape[-1] > 10 else y), y.shape[-1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", torchcache.torchcache_backend])
def test_one_graph_calls_a_mark_with_crops_of_several_sizes(backend):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torchcache.mark(Crops(), freeze=True)
            self.head = nn.Linear(8, 2)

        def forward(self, *crops):
            pairs = [self.backbone(crop) for crop in crops]
            return sum(self.head(features.relu().mean((2, 3)) * size) for features, size in pairs)

    model = Both()
    compiled = torch.compile(model, backend=backend)
    large, small = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)
    for crops in [(large, small), (large, small), (small, large)]:
        found = compiled(*crops)
        found.sum().backward()
        with torchcache.bypass():
            torch.testing.assert_close(found, model(*crops), atol=1e-5, rtol=1e-5)
    assert torchcache.stats(model).hits == 16


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.adapter = nn.Linear(16, 16)

    def forward(self, x):
        return self.base(x) + self.adapter(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", torchcache.torchcache_backend])
def test_what_is_unfrozen_or_added_later_gets_its_gradient_in_the_next_step(backend):
    model = Net()
    torchcache.mark(model.backbone, freeze=True)
    compiled, x = torch.compile(model, backend=backend), torch.randn(6, 16)

    def gradients(run):
        model.zero_grad()
        run(x).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def same_gradients():
        found = gradients(compiled)
        with torchcache.bypass():
            expected = gradients(model)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected)

    same_gradients()
    model.backbone.second.weight.requires_grad_(True)
    same_gradients()
    model.backbone.second.weight.requires_grad_(False)
    same_gradients()
    model.backbone.first = Adapted(model.backbone.first)
    same_gradients()
    model.backbone.requires_grad_(False)
    hits = torchcache.stats(model).hits
    same_gradients()
    same_gradients()
    assert torchcache.stats(model).hits >= hits + 6


@pytest.mark.parametrize("backend", ["eager", "aot_eager", torchcache.torchcache_backend])
@pytest.mark.parametrize("numbers", [(1.5, 0.5, 2.0), (True, False, True), (1, 3, 5)], ids=["floats", "flags", "whole"])
def test_a_number_that_differs_between_calls_is_part_of_the_key(backend, numbers):
    model = Net()
    torchcache.mark(model.backbone, freeze=True)
    compiled, x = torch.compile(model, backend=backend), torch.randn(6, 16)
    for number in (*numbers, *numbers):
        found = compiled(x, number)
        with torchcache.bypass():
            torch.testing.assert_close(found, model(x, number))
    assert torchcache.stats(model).misses == 6 * len({*numbers})


class Returned(nn.Module):
    def forward(self, x):
        return x, x[:, :0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", torchcache.torchcache_backend])
def test_what_a_mark_returns_of_an_empty_batch_is_not_its_input(backend):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torchcache.mark(Returned(), freeze=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            features, none = self.backbone(x)
            return self.head(features) + none.sum()

    compiled = torch.compile(Model(), backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*must not also be an input")
        for rows in (3, 0, 2):
            assert compiled(torch.randn(rows, 4)).shape == (rows, 2)


class Shared(nn.Module):
    """One layer under two names, and one tensor in two layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.layers = nn.ModuleList([self.stem, nn.Linear(6, 6), nn.Linear(6, 6)])
        self.layers[2].weight = self.layers[1].weight

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.stem(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_layer_under_two_names_keeps_its_weights(backend):
    plain = nn.Sequential(Shared(), nn.Linear(6, 2))
    model = copy.deepcopy(plain)
    torchcache.mark(model[0], freeze=True)
    x, run = torch.randn(8, 6), torch.compile(model, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(run(x), plain(x))
    assert {type(leaf) for leaf in model[0].parameters()} == {nn.Parameter}
    assert torchcache.stats(model).hits


class TwoViews(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.shift = nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(12, 2)

    def forward(self, x, y):
        return self.head(torch.cat([self.encoder(x + self.shift), self.encoder(y)], 1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "torchcache"])
def test_calls_within_sample_keys_that_a_graph_holds_are_not_taken_for_others(backend):
    plain = TwoViews()
    model = copy.deepcopy(plain)
    torchcache.mark(model.encoder, freeze=True, audit=0.0)
    options = {"options": {"inner": "eager"}} if backend == "torchcache" else {}
    run = torch.compile(model, backend=backend, **options)
    x, y = torch.randn(16, 6), torch.randn(16, 6)
    for call in range(8):
        with torchcache.sample_keys(range(16)), torch.set_grad_enabled(call > 4):
            torch.testing.assert_close(run(x, y), plain(x, y))


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_no_graph_of_cuda_holds_a_lookup():
    assert torch.Tag.cudagraph_unsafe in torch.ops.torchcache.lookup.default.tags


SCALING = """
import torch

SCALE = 2.0

class Body(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * globals()["SCALE"]

class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Body(4, 4).requires_grad_(False), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))
"""


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_dynamo_puts_among_globals_is_no_part_of_code_that_reads_them_all(backend):
    scope = {"__name__": "scaling"}
    exec(compile(SCALING, "scaling.py", "exec"), scope)
    model = scope["Whole"]()
    plain = copy.deepcopy(model)
    torchcache.mark(model.body, audit=0)
    x = torch.randn(6, 4)
    for _ in range(3):
        torch._dynamo.reset()
        run = torch.compile(model, backend=backend)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                torch.testing.assert_close(run(x), plain(x))
    assert torchcache.stats(model).hits == 30
    scope["SCALE"] = 3.0
    torch.testing.assert_close(run(x), plain(x))


class Said:
    """What a model of people's own returns."""

    def __init__(self, mean):
        self.mean = mean


@dataclasses.dataclass
class Held:
    mean: torch.Tensor
    scale: int = 3


class Named(NamedTuple):
    mean: torch.Tensor
    scale: int


class Says(nn.Module):
    """A frozen layer that returns more than tensors, and what is computed of that."""

    WAYS: ClassVar = {
        "an object": (Said, lambda said: said.mean),
        "a dataclass": (Held, lambda held: held.mean * held.scale),
        "a distribution": (lambda y: torch.distributions.Normal(y, 1.0), lambda found: found.mean),
        "a range": (lambda y: (y, range(3)), lambda found: found[0] * len(found[1])),
        "a number of its contents": (lambda y: (y, y.mean().item()), lambda found: found[0] * found[1]),
        "a named tuple": (lambda y: Named(y, 2), lambda found: found.mean * found.scale),
        "a sparse tensor": (lambda y: y.to_sparse(), lambda found: found.to_dense()),
    }

    class Body(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.lin, self.make = nn.Linear(4, 4).requires_grad_(False), make

        def forward(self, x):
            return self.make(self.lin(x))

    def __init__(self, way):
        super().__init__()
        make, self.use = self.WAYS[way]
        self.body, self.head = self.Body(make), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.use(self.body(x)))


@pytest.mark.parametrize("whole", [False, True], ids=["with breaks", "as one graph"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", Says.WAYS)
def test_what_a_graph_cannot_return_is_computed_where_it_can(way, backend, whole):
    model, x = Says(way), torch.randn(6, 4)
    expected = model(x)
    options = {"backend": backend, "fullgraph": whole}
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        try:
            torch.compile(copy.deepcopy(model), **options)(x)
        except torch._dynamo.exc.TorchDynamoException:
            pytest.skip("no graph without a mark either")
        torch._dynamo.reset()
        torchcache.mark(model.body)
        run = torch.compile(model, **options)
        for _ in range(3):
            torch.testing.assert_close(run(x), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_quantized_output_is_computed(backend):
    body = nn.Sequential(nn.Linear(4, 4), Quantized()).requires_grad_(False)
    model, x = torchcache.mark(body), torch.randn(6, 4)
    run = torch.compile(model, backend=backend)
    for _ in range(3):
        assert torch.equal(run(x).int_repr(), copy.deepcopy(body)(x).int_repr())


class Quantized(nn.Module):
    def forward(self, x):
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
