"""Door 2: torch.compile with our backend."""

import copy
import functools
import gc
import subprocess
import sys
import time
import weakref

import pytest
import torch
from torch import nn

import torchcache
from torchcache.graph import trust


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


def test_misses_run_with_any_number_of_rows_without_compiling_again():
    net, plain = pair()
    run = compiled(net, inner="eager", compile_misses=True)
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


def test_found_by_name_without_importing_torchcache():
    source = (
        "import torch; m = torch.nn.Linear(2, 2);"
        "f = torch.compile(m, backend='torchcache', options={'inner': 'eager'});"
        "print(f(torch.ones(3, 2)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[3, 2]" in done.stdout


def test_a_marked_module_compiled_on_its_own():
    module = torchcache.mark(Backbone(), freeze=True)
    run = compiled(module)
    x = torch.randn(4, 16)
    expected = run(x)
    torch.testing.assert_close(run(x), expected)
    assert (torchcache.stats(run).misses, torchcache.stats(run).hits) == (4, 4)


def test_a_function_that_calls_a_marked_module():
    module = torchcache.mark(Backbone(), freeze=True)

    @torch.compile(backend=torchcache.torchcache_backend, fullgraph=True, options={"inner": "eager"})
    def run(x):
        return module(x).sum(1)

    x = torch.randn(4, 16)
    torch.testing.assert_close(run(x), run(x))
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


def test_activation_checkpointing_and_autocast_behave():
    class Checkpointed(Net):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.head, self.backbone(x), use_reentrant=False)

    net = Checkpointed()
    torchcache.mark(net.backbone, freeze=True)
    run = compiled(net)
    x = torch.randn(4, 16)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(x)
        with torch.autocast("cpu", dtype=torch.bfloat16), torchcache.bypass():
            torch.testing.assert_close(out, net(x), rtol=1e-2, atol=1e-2)
        net.zero_grad()
        out.float().sum().backward()
        assert net.head.weight.grad is not None
    assert torchcache.stats(run).misses == 4


def test_a_graph_break_inside_a_mark_falls_back_to_the_eager_door():
    class Breaking(Backbone):
        def forward(self, x, k=1):
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.second(h) * k

    net = Net()
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


def test_a_fallback_to_the_eager_door_is_logged_once(monkeypatch):
    class Breaking(Backbone):
        def forward(self, x, k=1):
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.second(h)

    lines = []
    monkeypatch.setattr(torchcache.logging.logger, "info", lambda text, *args: lines.append(text % args))
    net = Net()
    net.backbone = torchcache.mark(Breaking(), freeze=True)
    run = compiled(net)
    for _ in range(3):
        run(torch.randn(4, 16))
    (line,) = [line for line in lines if "Breaking does not trace" in line]
    assert "graph_break" in line
    assert f"{__file__}:" in line


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


@pytest.mark.parametrize("given", ["mode", "options"])
def test_mode_reaches_inductor_for_the_rest_and_for_the_misses(given, monkeypatch):
    seen = []

    class Recording:
        def __init__(self, mode, options, dynamic):
            seen.append((mode, options))

        def __call__(self, module, example_inputs):
            return module.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Recording)
    net, plain = pair()
    if given == "mode":
        run = torch.compile(net, backend="torchcache", mode="max-autotune")
    else:
        run = torch.compile(
            net, backend="torchcache", options={"mode": "max-autotune", "epilogue_fusion": True, "compile_misses": True}
        )
    x = torch.randn(4, 16)
    for _ in range(2):
        torch.testing.assert_close(run(x), plain(x))
    assert len(seen) == 2
    assert {mode for mode, _ in seen} == {"max-autotune"}
    if given == "options":
        assert all(options == {"epilogue_fusion": True} for _, options in seen)


def test_the_backbone_is_not_compiled_before_its_first_miss(tmp_path):
    operators = []

    def inner(module, example_inputs, **options):
        operators.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    def net():
        torch.manual_seed(0)
        found = Net()
        torchcache.mark(found.backbone, freeze=True, persistent=True, persistent_cache_dir=str(tmp_path))
        return found

    x = torch.randn(6, 16)
    torchcache.transform(net())(x[:4])
    torchcache.flush()
    torch._dynamo.reset()
    warm = net()
    run = compiled(warm, inner, compile_misses=True)
    for _ in range(2):
        run(x[:4])
    (outer,) = operators
    assert torchcache.stats(run).misses == 0
    assert any("lookup" in name for name in outer)
    run(x)
    assert torchcache.stats(run).misses == 2
    assert any(not any("lookup" in name for name in graph) for graph in operators[1:])


@pytest.mark.parametrize("wrap", ["transform inside", "compile outside", "compile inside"])
def test_under_distributed_data_parallel(wrap):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net, plain = pair()
        if wrap == "transform inside":
            run = nn.parallel.DistributedDataParallel(torchcache.transform(net))
        elif wrap == "compile outside":
            run = compiled(nn.parallel.DistributedDataParallel(net))
        else:
            run = nn.parallel.DistributedDataParallel(compiled(net))
        x = torch.randn(4, 16)
        for batch in (x, x, x[:3]):
            torch.testing.assert_close(step(run, batch), step(plain, batch))
            torch.testing.assert_close(net.head.weight.grad, plain.head.weight.grad)
        assert (torchcache.stats(net).misses, torchcache.stats(net).hits) == (4, 7)
    finally:
        # Gloo's thread takes the interpreter's lock to let go of the last reduction, and whoever lets go of the reducer
        # waits for that thread with the lock held.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dynamic_shapes_from_the_first_call(inner):
    net, plain = pair()
    run = torch.compile(net, backend=torchcache.torchcache_backend, options={"inner": inner}, dynamic=True)
    x = torch.randn(12, 16)
    for rows in (slice(0, 4), slice(3, 9), slice(0, 12), slice(5, 6)):
        torch.testing.assert_close(step(run, x[rows]), step(plain, x[rows]))
        torch.testing.assert_close(net.head.weight.grad, plain.head.weight.grad)
    assert torchcache.stats(net).misses == 12


def test_a_module_that_changes_itself_is_not_compiled_for_each_change():
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


DYING = """
import copy, gc, torch, torchcache
from torch import nn
from torchcache.graph.trust import Trust

holds = Trust.holds

def collect_and_hold(self):
    gc.collect()
    return holds(self)

Trust.holds = collect_and_hold

class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.itself = [self]

    def forward(self, x):
        return self.linear(x)

def compiled():
    return torch.compile(model, backend="torchcache", options={"inner": "eager"})

gc.disable()
x = torch.randn(3, 4)
model = nn.Sequential(torchcache.mark(Backbone(), freeze=True), nn.Linear(4, 2))
run = compiled()
for number in range(6):
    run(x), run(x)
    if number % 3 == 0:
        torchcache.unmark(model[0])
        torchcache.mark(model[0], freeze=True)
    elif number % 3 == 1:
        model[0] = torchcache.mark(Backbone(), freeze=True)
    else:
        model = copy.deepcopy(model)
        run = compiled()
    torch.testing.assert_close(run(x), model[1](model[0].linear(x)))
"""


def test_what_dies_while_guards_are_evaluated_does_not_end_the_process():
    done = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def _none_watched(monkeypatch):
    monkeypatch.setattr(trust, "_asking", weakref.WeakKeyDictionary())


@pytest.mark.usefixtures("_none_watched")
def test_an_interrupt_while_guards_are_evaluated_is_raised(monkeypatch):
    net = Net()
    torchcache.mark(net.backbone, freeze=True)
    run, x = compiled(net), torch.randn(4, 16)
    expected = run(x)
    torch.testing.assert_close(run(x), expected)
    holds = trust.Trust.holds

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(trust.Trust, "holds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(x)
    monkeypatch.setattr(trust.Trust, "holds", holds)
    torch.testing.assert_close(run(x), expected)
    assert torchcache.stats(net).misses == 4
    assert gc.isenabled()


@pytest.mark.usefixtures("_none_watched")
def test_a_few_models_are_watched_and_more_run_the_same_code():
    graphs = []

    def inner(module, example_inputs):
        graphs.append(module)
        return module.forward

    marked = torchcache.torchcache(type("Marked", (Backbone,), {}))
    for number in range(12):
        net = Net()
        plain = copy.deepcopy(net)
        net.backbone = marked().requires_grad_(False).eval()
        net.backbone.load_state_dict(plain.backbone.state_dict())
        run, x = compiled(net, inner), torch.randn(4 + number % 3, 16)
        for _ in range(2):
            torch.testing.assert_close(run(x), plain(x))
    assert len(graphs) < torch._dynamo.config.recompile_limit


@pytest.mark.parametrize("asking", [0, 3], ids=["guarded by Dynamo", "watched"])
@pytest.mark.parametrize("first", [True, False])
def test_instances_of_a_class_have_their_own_options(asking, first, monkeypatch, tmp_path):
    monkeypatch.setattr(trust, "ASKING", asking)
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
