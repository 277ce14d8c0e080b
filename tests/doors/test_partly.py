"""Partly trainable marks: the frozen part is looked up, the rest trains as it would without a cache."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

import torchcache
from torchcache import dynamo, torchcache_backend
from torchcache.op import LOOKUP


def opened(door, model, **options):
    """The model as a user runs it through this door."""
    if door == "transform":
        return torchcache.transform(model)
    if door == "call":
        return model
    return torch.compile(model, backend=torchcache_backend, options={"inner": door, **options})


def gradients(model, outputs):
    model.zero_grad()
    nn.functional.cross_entropy(outputs, torch.arange(len(outputs)) % 3).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_trains_the_same(run, model, twin, inputs, **named):
    found, expected = run(*inputs, **named), twin(*inputs, **named)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found, expected = gradients(model, found), gradients(twin, expected)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def counted(model):
    """Rows served, computed and stored, computed only."""
    stats = torchcache.stats(model)
    return stats.hits, stats.misses, stats.bypasses


def lookups(model):
    return [node for graph in torchcache.graphs(model) for node in graph.graph.nodes if node.target is LOOKUP]


class Net(nn.Module):
    """A frozen layer, a trainable one, and a number between them."""

    def __init__(self, width=6):
        super().__init__()
        self.body, self.top = nn.Linear(width, width), nn.Linear(width, 3)
        self.scale = 1.5
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.top(torch.tanh(self.body(x)).view(x.shape[0], 2, -1).flatten(1) * self.scale)


def nets(kind=Net, **options):
    """A marked net and its uncached twin."""
    torch.manual_seed(0)
    twin = kind()
    return torchcache.mark(copy.deepcopy(twin), **options), twin


DOORS = ["call", "eager", "aot_eager"]  # ``transform`` leaves a partly trainable mark to its first call


@pytest.mark.parametrize("door", DOORS)
def test_rows_are_found_in_batches_of_any_size(door):
    model, twin = nets()
    run, x = opened(door, model), torch.randn(12, 6)
    for rows in ([0, 1, 2, 3, 4, 5], [3, 7, 8], [*range(8), 11, 0], [9, 10, 11]):
        assert_trains_the_same(run, model, twin, [x[rows]])
    # A row is missed once: 0 to 5, 7 and 8, 6 and 11, 9 and 10.
    assert counted(model)[1] == 12


@pytest.mark.parametrize("door", DOORS)
def test_rows_on_disk_serve_another_model_of_the_same_kind(door, tmp_path):
    x = torch.randn(8, 6)
    options = {"persistent": True, "persistent_cache_dir": tmp_path}
    model, twin = nets(**options)
    # What torch.compile leaves on the module that it is given is none of the mark's.
    assert_trains_the_same(opened(door, nn.Sequential(model)), model, twin, [x])
    torchcache.flush()
    torch._dynamo.reset()
    model, twin = nets(**options)
    assert_trains_the_same(opened("transform", model), model, twin, [x[[5, 2, 7]]])
    assert sum(region.disk_hits for region in torchcache.stats(model).regions) == 3
    _data_write(twin), _data_write(model)
    assert_trains_the_same(model, model, twin, [x[[5, 2, 7]]])
    assert sum(region.disk_hits for region in torchcache.stats(model).regions) == 3


def _data_write(net):
    net.body.weight.data.mul_(1.5)


def _in_place(net):
    with torch.no_grad():
        net.body.bias.add_(1)


def _replaced(net):
    net.body.weight = nn.Parameter(torch.ones(6, 6), requires_grad=False)


def _other_layer(net):
    torch.manual_seed(5)
    net.body = nn.Linear(6, 6).requires_grad_(False)


def _number(net):
    net.scale = 0.5


def _hook(net):
    net.body.register_forward_hook(lambda module, args, output: output + 1)


def _thawed(net):
    net.body.requires_grad_(True)


CHANGES = [_data_write, _in_place, _replaced, _other_layer, _number, _thawed]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change, door):
    model, twin = nets()
    run, x = opened(door, model), torch.randn(8, 6)
    for _ in range(2):
        assert_trains_the_same(run, model, twin, [x])
    change(model)
    change(twin)
    for rows in ([0, 1, 2, 3], [2, 3, 6, 7], [1, 0]):
        assert_trains_the_same(run, model, twin, [x[rows]])


def test_a_number_that_changes_is_compiled_a_few_times():
    graphs = []

    def inner(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    model, twin = nets()
    run, x = opened(inner, model), torch.randn(8, 6)
    for scale in (1.5, 0.5, 2.5):
        model.scale = twin.scale = scale
        assert_trains_the_same(run, model, twin, [x])
    assert len(graphs) <= 6


@pytest.mark.parametrize("door", ["call", "transform"])
def test_a_hook_that_is_added_later_runs(door):
    model, twin = nets()
    run, x = opened(door, model), torch.randn(8, 6)
    assert_trains_the_same(run, model, twin, [x])
    _hook(model)
    _hook(twin)
    assert_trains_the_same(run, model, twin, [x])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("door", ["call", "transform"])
@pytest.mark.parametrize("when", ["full_backward_hook", "full_backward_pre_hook", "module_full_backward_hook"])
def test_a_hook_of_backward_that_is_added_later_runs(door, when, request):
    model, twin = nets()
    run, x = opened(door, model), torch.randn(8, 6)
    assert_trains_the_same(run, model, twin, [x])
    seen = {model.top: 0, twin.top: 0}

    def hook(module, *_):
        if module in seen:
            seen[module] += 1

    for each in (model, twin):
        register = getattr(each.top, f"register_{when}", None) or getattr(nn.modules.module, f"register_{when}")
        request.addfinalizer(register(hook).remove)
    assert_trains_the_same(run, model, twin, [x])
    assert seen[model.top] == seen[twin.top] > 0


class Twins(nn.Module):
    """Two branches of one frozen layer that differ in a number alone."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x, y):
        return self.top(torch.tanh(self.body(x)) * 2) + self.top(torch.tanh(self.body(y)) * 3)


@pytest.mark.parametrize("door", DOORS)
def test_twin_branches_with_other_constants_have_rows_of_their_own(door):
    model, twin = nets(Twins)
    run, x = opened(door, model), torch.randn(8, 6)
    for _ in range(2):
        assert_trains_the_same(run, model, twin, [x, x.clone()])
        assert_trains_the_same(run, model, twin, [x.flip(0), x])


class Branches(nn.Module):
    """Frozen layers of one shape with weights of their own, one of which may be left out."""

    def __init__(self):
        super().__init__()
        self.bodies = nn.ModuleList(nn.Linear(6, 6).requires_grad_(False) for _ in range(3))
        self.top, self.without = nn.Linear(6, 3), None

    def forward(self, *inputs):
        pairs = zip(self.bodies, inputs, strict=True)
        return sum(self.top(torch.tanh(body(x))) for place, (body, x) in enumerate(pairs) if place != self.without)


@pytest.mark.parametrize("door", DOORS)
def test_branches_of_one_shape_have_weights_of_their_own(door):
    model, twin = nets(Branches)
    run, inputs = opened(door, model), [torch.randn(8, 6) for _ in range(3)]
    for without in (None, 0, 1, None, 0):
        model.without = twin.without = without
        assert_trains_the_same(run, model, twin, inputs)
        assert_trains_the_same(run, model, twin, [inputs[2], inputs[2], inputs[2]])


class Sized(nn.Module):
    """Reads only the length of its second input."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x, tokens):
        return self.top(self.body(x) * tokens.shape[1] + torch.arange(tokens.shape[1]).sum())


@pytest.mark.parametrize("door", DOORS)
def test_the_size_of_another_input_is_part_of_the_key(door):
    model, twin = nets(Sized)
    run, x = opened(door, model), torch.randn(4, 6)
    for length in (3, 5, 7, 9, 3, 5):
        assert_trains_the_same(run, model, twin, [x, torch.zeros(4, length)])


class Masked(nn.Module):
    """Reads its mask by row position, through an index made from the number of rows."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x, mask):
        return self.top(self.body(x) * mask[torch.arange(x.shape[0])[:, None], torch.arange(6)])


@pytest.mark.parametrize("door", DOORS)
def test_a_mask_that_is_read_by_position_belongs_to_its_row(door):
    model, twin = nets(Masked)
    run, x, mask = opened(door, model), torch.randn(8, 6), (torch.rand(8, 6) > 0.5).float()
    for rows in (slice(None), [5, 6, 7], [1, 4, 2, 3], [3], [6, 0]):
        assert_trains_the_same(run, model, twin, [x[rows], mask[rows]])
    assert_trains_the_same(run, model, twin, [x, mask.roll(1, 0)])
    hits, _misses, bypasses = counted(model)
    assert hits >= 9
    assert bypasses == 0


class Prototypes(nn.Module):
    """Compares each row with inputs that all rows share."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6).requires_grad_(False), nn.Linear(8, 3)

    def forward(self, x, prototypes):
        return self.top(self.body(x) @ prototypes.T)


@pytest.mark.parametrize("door", DOORS)
def test_an_input_that_all_rows_share_counts_whole(door):
    model, twin = nets(Prototypes)
    run, x, prototypes = opened(door, model), torch.randn(8, 6), torch.randn(8, 6)
    for rows in (slice(None), [5, 6, 7], [1, 4, 2, 3]):
        assert_trains_the_same(run, model, twin, [x[rows], prototypes])
    assert_trains_the_same(run, model, twin, [x, prototypes.roll(1, 0)])


@pytest.mark.parametrize("door", ["call", "transform"])
def test_a_mark_that_trains_as_a_whole_is_computed_and_names_what_trains(door, warnings):
    net, twin = nets(lambda: nn.Linear(6, 3))
    model = nn.Sequential(nn.Linear(6, 6), torchcache.mark(net))
    run = model if door == "call" else net
    assert torch.equal(net(torch.ones(4, 6)), twin(torch.ones(4, 6)))
    run(torch.ones(4, 6)).sum().backward()
    assert counted(net)[2] == 8
    assert any("weight" in text and "freeze=True" in text for text in warnings)


class Mixing(nn.Module):
    """Draws numbers beside a frozen layer, and has nothing else that could be cached."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        return self.top(self.body(x + torch.rand_like(x)))


def test_what_follows_chance_is_computed_and_counted():
    model, _ = nets(Mixing)
    outputs = [model(torch.ones(4, 6)) for _ in range(2)]
    assert not torch.equal(*outputs)
    stats = torchcache.stats(model)
    assert (stats.hits, stats.misses, stats.bypasses) == (0, 0, 8)
    assert any("random" in reason for region in stats.regions for reason in region.reasons)


class Breaking(Net):
    def forward(self, x):
        h = torch.tanh(self.body(x))
        torch._dynamo.graph_break()
        return self.top(h * self.scale)


@pytest.mark.parametrize("door", DOORS)
def test_a_graph_break_changes_no_value(door):
    model, twin = nets(Breaking)
    run, x = opened(door, model), torch.randn(8, 6)
    for rows in ([0, 1, 2, 3], [2, 3, 6, 7], [0, 1, 2, 3]):
        assert_trains_the_same(run, model, twin, [x[rows]])


class Checkpointed(Net):
    def forward(self, x):
        h = torch.utils.checkpoint.checkpoint(lambda t: torch.tanh(self.body(t)), x, use_reentrant=False)
        return self.top(h * self.scale)


@pytest.mark.parametrize("door", DOORS)
def test_activation_checkpointing(door):
    model, twin = nets(Checkpointed)
    run, x = opened(door, model), torch.randn(8, 6)
    for _ in range(3):
        assert_trains_the_same(run, model, twin, [x])


class Writing(Net):
    """Writes in place to what it computes, and to a buffer that the frozen layer reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x):
        self.shift.add_(1)
        h = self.body(x) + self.shift
        h.mul_(2)
        return self.top(h.relu_())


@pytest.mark.parametrize("door", DOORS)
def test_writes_in_place_keep_their_order(door):
    model, twin = nets(Writing)
    run, x = opened(door, model), torch.randn(8, 6)
    for _ in range(4):
        assert_trains_the_same(run, model, twin, [x])
    torch.testing.assert_close(model.shift, twin.shift)


class Lengths(Net):
    """Makes a mask from lengths by writing in place; the frozen and the trainable part read it."""

    def forward(self, x, lengths):
        mask = torch.zeros(x.shape[:2], dtype=lengths.dtype)
        mask[(torch.arange(mask.shape[0]), lengths - 1)] = 1
        mask = mask.flip([-1]).cumsum(-1).flip([-1]).bool()
        h = self.body(x).masked_fill(~mask[..., None], 0.5)
        h = torch.tanh(self.body(h))
        return self.top(h.masked_fill(~mask[..., None], 0.0).sum(1))


class LengthsOfOther(Lengths):
    """As many rows as another tensor has, which a trace does not know to be the same."""

    def forward(self, x, lengths):
        mask = torch.zeros((lengths.shape[0], 5), dtype=lengths.dtype)
        mask[(torch.arange(lengths.shape[0]), lengths - 1)] = 1
        mask = mask.flip([-1]).cumsum(-1).flip([-1]).bool()
        h = torch.tanh(self.body(x)) * mask[..., None]
        return self.top(h.sum(1)) + mask.sum(1)[:, None]


@pytest.mark.parametrize("kind", [Lengths, LengthsOfOther])
@pytest.mark.parametrize("door", DOORS)
def test_what_is_written_in_place_is_so_on_both_sides_of_the_cut(door, kind):
    model, twin = nets(kind)
    run, x, lengths = opened(door, model), torch.randn(9, 5, 6), torch.randint(1, 5, (9,))
    for rows in (range(9), range(9), [1, 3, 5], [4, 2, 7, 8], range(9)):
        assert_trains_the_same(run, model, twin, [x[[*rows]], lengths[[*rows]]])
    hits, misses, bypasses = counted(model)
    assert (misses, bypasses) == (9, 0)
    assert hits >= 25


class MappedMask(Net):
    """Writes in place, and makes a mask by ``vmap`` as transformers does."""

    def forward(self, x):
        h = self.body(x)
        h[:, 0] = 0.0
        places = torch.arange(h.shape[1])
        causal = torch.func.vmap(lambda i: torch.func.vmap(lambda j: (i >= j) & (j != 2))(places))(places)
        return self.top(torch.tanh(h @ causal.to(h.dtype)))


@pytest.mark.parametrize("door", DOORS)
def test_what_is_mapped_behind_a_write_in_place_is_analysed(door):
    model, twin = nets(MappedMask)
    run, x = opened(door, model), torch.randn(8, 6)
    for _ in range(3):
        assert_trains_the_same(run, model, twin, [x])
    assert counted(model) == (16, 8, 0)


class Around(Net):
    """Writes in place to what another mark gives, which is read again later."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        y = self.inner(x)
        y += 1
        y[:, 0] = x[:, 1]
        return self.top(torch.tanh(self.body(y)) + y)


@pytest.mark.parametrize("door", DOORS)
def test_a_write_to_what_a_mark_within_gives_is_not_lost(door):
    torch.manual_seed(0)
    twin = Around()
    model = copy.deepcopy(twin)
    torchcache.mark(model.inner, audit=0), torchcache.mark(model, audit=0)
    run, x = opened(door, model), torch.randn(8, 6)
    for _ in range(3):
        assert_trains_the_same(run, model, twin, [x])


def test_the_graph_shows_a_lookup_without_the_state():
    model, _ = nets()
    model(torch.randn(4, 6))
    (node,) = lookups(model)
    assert [len(part) for part in node.args[:2]] == [1, 0]


def test_copies_answer_for_themselves():
    model, twin = nets()
    x = torch.randn(4, 6)
    assert_trains_the_same(model, model, twin, [x])
    for change in (_data_write, _in_place):
        other, other_twin = copy.deepcopy(model), copy.deepcopy(twin)
        change(other)
        change(other_twin)
        assert_trains_the_same(other, other, other_twin, [x])
        assert_trains_the_same(model, model, twin, [x])


class Following(Net):
    """The trainable part reads what the frozen layer gives, and what follows from it without state."""

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.top(h) + self.top(h.relu())


def test_what_follows_from_another_output_is_computed_again_and_not_stored():
    model, twin = nets(Following)
    x = torch.randn(4, 6)
    for _ in range(2):
        assert_trains_the_same(model, model, twin, [x])
    (region,) = torchcache.stats(model).regions
    assert (region.misses, region.hits, region.memory_bytes) == (4, 4, 4 * 24)


def test_evaluation_without_gradients_between_steps():
    model, twin = nets()
    x = torch.randn(8, 6)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (model, twin)]
    for _ in range(3):
        assert_trains_the_same(model, model, twin, [x])
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(model(x), twin(x))
    assert counted(model)[0] >= 16


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("door", ["call", "eager", "transform"])
@pytest.mark.parametrize("first", ["validation", "training"])
def test_validation_finds_its_rows_again_while_the_rest_trains(first, door, mode):
    model, twin = nets()
    run, x, held_out = opened(door, model), torch.randn(8, 6), torch.randn(4, 6)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (model, twin)]
    if first == "validation":
        with mode():
            torch.testing.assert_close(run(held_out), twin(held_out))
    for epoch in range(4):
        assert_trains_the_same(run, model, twin, [x])
        for optimizer in optimizers:
            optimizer.step()
        before = counted(model)
        with mode():
            torch.testing.assert_close(run(held_out), twin(held_out))
        after = counted(model)
        assert [now - was for now, was in zip(after, before, strict=True)] == ([4, 0, 0] if epoch else [0, 4, 0])


def test_padding_is_for_what_is_frozen_as_a_whole(warnings):
    class Masked(Net):
        def forward(self, x, mask):
            return super().forward(x) + mask.sum(1, keepdim=True)

    model, twin = nets(Masked, padding="mask")
    batch = [torch.randn(4, 6), torch.tensor([[1.0, 1.0, 0.0]] * 4)]
    for _ in range(2):
        assert_trains_the_same(model, model, twin, batch)
    assert ["padding= is for marks that are frozen as a whole" in text for text in warnings] == [True]
    assert counted(model)[0] >= 4


@pytest.mark.parametrize("door", ["call", "aot_eager"])
def test_a_dropped_model_is_given_back(door):
    model, _ = nets()
    opened(door, model)(torch.randn(4, 6)).sum().backward()
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", ["partly", "frozen", "not at all"])
@pytest.mark.parametrize("door", ["call", "eager"])  # AOTAutograd refers to weights itself, where sizes vary
def test_weights_can_be_swapped_as_without_a_mark(door, kind):
    model = Net() if kind != "not at all" else nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3).requires_grad_(False))
    torchcache.mark(model.body if kind == "frozen" else model)
    run = opened(door, model)
    for _ in range(2):
        run(torch.randn(5, 6)).sum().backward()
    model.zero_grad()
    weights = [*model.parameters()]
    for weight in weights:
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2, weight.requires_grad))
    x = torch.randn(5, 6)
    torch.testing.assert_close(run(x), copy.deepcopy(model)(x))


def test_a_frozen_mark_inside_is_looked_up_by_itself():
    torch.manual_seed(0)
    twin = Net()
    model = copy.deepcopy(twin)
    torchcache.mark(model.body, freeze=True)
    torchcache.mark(model)
    x = torch.randn(8, 6)
    for _ in range(3):
        assert_trains_the_same(model, model, twin, [x])
    assert torchcache.stats(model.body).hits >= 8


class Asking(Net):
    """Its code asks a tensor for no more than its type, its shape, and whether it trains."""

    def __init__(self):
        super().__init__()
        self.asked = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        scale = len(self.asked) * (1.0 if self.asked.dtype == torch.float32 else 2.0) + self.asked.requires_grad
        return super().forward(x) * scale


@pytest.mark.parametrize("door", ["call", "transform"])
def test_other_data_in_a_parameter_is_seen(door):
    twin = Asking()
    model = torchcache.mark(copy.deepcopy(twin))
    run, x = opened(door, model), torch.randn(8, 6)
    for data in (torch.ones(3), torch.ones(3).double(), torch.ones(5).double(), torch.ones(7)):
        for asking in (model, twin):
            asking.asked.data = data
        for _ in range(2):
            torch.testing.assert_close(run(x), twin(x))
    for asking in (model, twin):
        asking.asked.requires_grad_(True)
    torch.testing.assert_close(run(x), twin(x))
    assert torchcache.stats(model).bypasses == 0


def test_a_lazy_layer_is_computed_until_it_has_its_shape():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Tanh(), nn.LazyLinear(3))
    torchcache.mark(model)
    x = torch.randn(8, 6)
    for _ in range(3):
        torch.testing.assert_close(model(x), model[2](model[0](x).tanh()))
    assert torchcache.stats(model).hits >= 8


@pytest.mark.skipif(not dynamo.names_parts(), reason="this torch does not say of nodes whose they are")
def test_misses_are_compiled_for_any_number_of_rows():
    seen = []

    def inner(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    model, twin = nets()
    run, x = opened(inner, model, compile_misses=True), torch.randn(12, 6)
    for rows in ([0, 1, 2, 3], [1, 2, 5], [0, 1], [6, 7, 8, 9, 10], [11]):
        assert_trains_the_same(run, model, twin, [x[rows]])
    compiled = [graph for graph in seen if not graph.graph.find_nodes(op="call_function", target=LOOKUP)]
    assert 1 <= len(compiled) <= 2


class Enlarging(nn.Module):
    """Maps that are made as large as others, as in a feature pyramid; the last convolution trains."""

    def __init__(self, mode):
        super().__init__()
        self.fine, self.coarse, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 3, 3)
        self.mode = mode
        self.fine.requires_grad_(False)
        self.coarse.requires_grad_(False)

    def forward(self, x):
        fine = self.fine(x)
        return self.last(fine + nn.functional.interpolate(self.coarse(fine), fine.shape[-2:], mode=self.mode)).mean(
            (2, 3)
        )


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("door", ["transform", "call", "aot_eager"])
def test_rows_that_are_enlarged_are_found_in_batches_of_other_sizes(door, mode):
    model = torchcache.mark(Enlarging(mode))
    run, twin, x = opened(door, model), copy.deepcopy(model), torch.randn(8, 3, 12, 12)
    twin = torchcache.unmark(twin)
    for rows in (8, 5, 3, 8):
        assert_trains_the_same(run, model, twin, [x[:rows]])
    assert counted(run)[1] == 8


class Graph(nn.Module):
    """Nodes and edges: each batch has two numbers of rows."""

    def __init__(self, messages):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8).requires_grad_(False), nn.Linear(8, 2)
        self.messages = messages

    def forward(self, nodes, edges, weights):
        return self.head(self.messages(self.body(nodes), edges, weights))


def to_nodes(hidden, edges, weights):
    return torch.zeros_like(hidden).index_add_(0, edges[1], weights[:, :1] * hidden.index_select(0, edges[0]))


def to_edges(hidden, edges, weights):
    return hidden[edges[0]] * weights[:, :1]


def to_classes(hidden, edges, weights):
    return weights.new_zeros(8).index_add_(0, hidden.argmax(-1)[edges[0]], weights.sum(1))[None]


def to_clusters(hidden, edges, weights):
    found = hidden.argmax(-1, keepdim=True)[edges[0]]
    return weights.new_zeros(8, 8).scatter_add_(0, found.expand(-1, 8), weights.abs())


@pytest.mark.parametrize(
    "sizes", [((6, 10), (7, 12), (9, 5), (6, 6)), ((6, 1), (1, 6), (6, 3)), ((1, 1), (6, 1), (1, 5))]
)
@pytest.mark.parametrize("messages", [to_nodes, to_edges, to_classes, to_clusters])
@pytest.mark.parametrize("door", DOORS)
def test_two_numbers_of_rows_are_told_apart(door, messages, sizes):
    model = Graph(messages)
    twin = copy.deepcopy(model)
    run = opened(door, torchcache.mark(model))
    for _ in range(3):
        for nodes, edges in sizes:
            batch = torch.randn(nodes, 4), torch.randint(nodes, (2, edges)), torch.randn(edges, 8)
            torch.testing.assert_close(run(*batch), twin(*batch))


class Listed(Net):
    """Takes images one by one: these may have as many channels as there are images."""

    def forward(self, images):
        return super().forward(torch.stack(images).mean((1, 2)))


@pytest.mark.parametrize("door", DOORS)
def test_what_looks_like_rows_and_is_none_ends_no_run(door, warnings):
    model, twin = nets(Listed)
    run = opened(door, model)
    for rows in (4, 3, 3, 2, 1):
        images = list(torch.randn(rows, 3, 5, 6))
        assert_trains_the_same(run, model, twin, (images,))
    assert not counted(model)[0]
    assert any("cached while it trains: what is frozen gives no row" in text for text in warnings)


class Reading(Net):
    def forward(self, x):
        return super().forward(self.body(x).cummax(0).values)


@pytest.mark.parametrize("door", DOORS)
def test_a_frozen_part_whose_rows_meet_is_computed(door, warnings):
    model, twin = nets(Reading)
    run = opened(door, model)
    for _ in range(3):
        assert_trains_the_same(run, model, twin, (torch.randn(5, 6),))
    assert counted(model) == (0, 0, 15)
    (told,) = [text for text in warnings if "other rows of the batch" in text]
    assert "is computed, not cached: a row's output changes" in told


@pytest.mark.parametrize("door", ["call", "transform"])
def test_what_dynamo_cannot_trace_later_is_computed(door, monkeypatch):
    """It asserts of a global of Python's own that is found anew."""
    monkeypatch.setattr("builtins.torchcache_scale", 1.0, raising=False)

    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(x) * torchcache_scale)  # noqa: F821

    model, data = Scales(), torch.randn(4, 8)
    twin = copy.deepcopy(model)
    run = opened(door, torchcache.mark(model, audit=0))
    for scale in (1.0, 1.0, 1.0, 2.0, 2.0, 3.0):
        monkeypatch.setattr("builtins.torchcache_scale", scale)
        assert_trains_the_same(run, model, twin, [data])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", ["one row", "width"])
@pytest.mark.parametrize("door", ["call", "transform"])
def test_a_call_that_the_code_itself_rejects_turns_nothing_off(door, bad, first, warnings, capfd):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).requires_grad_(False)
            self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            return self.head(self.body(x))

    model, data = torchcache.mark(Norms(), audit=0), torch.randn(12, 8)
    run = opened(door, model)
    for _ in range(0 if first else 2):
        run(data)
    expected = "more than 1 value per channel" if bad == "one row" else "cannot be multiplied"
    with pytest.raises((ValueError, RuntimeError), match=expected) as caught:
        run(data[:1] if bad == "one row" else torch.randn(12, 9))
    assert caught.value.__context__ is None
    before = counted(model)[0]
    for _ in range(3):
        run(data)
    assert counted(model)[0] - before == (24 if first else 36)
    assert counted(model)[2] == 0
    assert not warnings
    assert "fake" not in capfd.readouterr().err


class Tables(Net):
    """Sets itself up in its first call."""

    @functools.cached_property
    def table(self):
        return torch.arange(6.0)

    def forward(self, x):
        return super().forward(x + self.table)


class Reversed(Net):
    """What trains comes first."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(6, 6), nn.Linear(6, 3).requires_grad_(False)


@pytest.mark.parametrize("door", ["call", "transform"])
@pytest.mark.parametrize(("kind", "told"), [(Tables, 0), (Reversed, 1)])
def test_that_no_part_is_cached_is_said_once_a_mark_is_set_up(kind, told, door, warnings):
    model, data = torchcache.mark(kind(), audit=0), torch.randn(4, 6)
    run = opened(door, model)
    for _ in range(4):
        run(data)
    assert len([text for text in warnings if "no part of" in text]) == told
    assert bool(counted(model)[0]) != bool(told)


def test_a_graph_that_ends_before_the_frozen_part_is_no_reason_to_warn(warnings):
    class Checks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
            self.head = nn.Linear(8, 3)

        def forward(self, x, labels):
            if labels.max() >= 3:
                raise ValueError
            return nn.functional.cross_entropy(self.head(self.body(x)), labels)

    model, data, labels = torchcache.mark(Checks()), torch.randn(8, 8), torch.arange(8) % 3
    for _ in range(2):
        for some in (slice(0, 4), slice(4, 8)):
            model(data[some], labels[some]).backward()
    assert torchcache.stats(model).hits >= 8
    assert not [text for text in warnings if "no part of" in text]


class Framed(nn.Module):
    """A partly trained mark, and what is in the compiled frame beside it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.ReLU(), nn.Linear(6, 3))
        self.own = nn.Parameter(torch.ones(1, 3))


class MakesOnes(Framed):
    def forward(self, x):
        count = x.shape[0]
        mask = torch.ones(count, 3)
        return self.body(x) + mask


class Expands(Framed):
    def forward(self, x):
        count = x.shape[0]
        own = self.own.expand(count, -1)
        return self.body(x) + own


class Asks(Framed):
    def forward(self, x):
        if x.shape[0] > 4:
            return self.body(x) * 2
        return self.body(x)


class Asserts(Framed):
    def forward(self, x):
        assert x.shape[0] < 100
        return self.body(x)


class Divides(Framed):
    def forward(self, x):
        count = int(x.shape[0])
        own = self.own / count
        return self.body(x) + own


class BreaksAfter(Framed):
    def forward(self, x):
        places = torch.arange(x.shape[0])
        out = self.body(x)
        torch._dynamo.graph_break()
        return out + places[:, None]


class BreaksBefore(Framed):
    def forward(self, x):
        places = torch.arange(x.shape[0])
        torch._dynamo.graph_break()
        own = self.own.expand(x.shape[0], -1)
        return self.body(x) + places[:, None] + own


@pytest.mark.parametrize("kind", [MakesOnes, Expands, Asks, Asserts, Divides, BreaksAfter, BreaksBefore])
def test_a_frame_may_use_the_number_of_rows_before_it_calls_a_mark(kind):
    model = kind()
    twin = copy.deepcopy(model)
    torchcache.mark(model.body, audit=0)
    run = torch.compile(model, backend="torchcache", options={"inner": "eager"})
    data = torch.randn(18, 6)
    for _ in range(4):
        for rows in data[torch.randperm(18)].split(7):
            torch.testing.assert_close(run(rows), twin(rows))
    assert torchcache.stats(model).hits


class Distilled(nn.Module):
    """One encoder gives a target without gradients and a prediction with them."""

    def __init__(self, first, again):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.ReLU(), nn.Linear(6, 3))
        self.first, self.again = first, again

    def forward(self, x):
        with torch.set_grad_enabled(self.first):
            one = self.body(x)
        with torch.set_grad_enabled(self.again):
            other = self.body(x)
        return (one - 2 * other).square().mean()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "torchcache"])
def test_a_frame_may_call_a_mark_with_gradients_and_without(backend, first):
    model = Distilled(first, not first)
    twin = copy.deepcopy(model)
    torchcache.mark(model.body, audit=0)
    options = {"options": {"inner": "aot_eager"}} if backend == "torchcache" else {}
    run, data = torch.compile(model, backend=backend, **options), torch.randn(12, 6)
    optimizers = [torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.1) for one in (model, twin)]
    for _ in range(3):
        for rows in data[torch.randperm(12)].split(6):
            losses = run(rows), twin(rows)
            torch.testing.assert_close(*losses)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert torchcache.stats(model).hits or backend != "torchcache"


VIEWS = {
    "chunks": lambda body, x: (lambda one, other: body(one) - body(other))(*x[: len(x) // 2 * 2].chunk(2)),
    "halves": lambda body, x: body(x[: len(x) // 2]).sum(0) - body(x[len(x) // 2 :]).sum(0),
    "all but one": lambda body, x: body(x[1:]),
    "every second": lambda body, x: body(x[::2]),
    "repeated": lambda body, x: body(x.repeat(2, 1)),
    "joined": lambda body, x: body(torch.cat([x, x.flip(0)])),
    "one more": lambda body, x: body(torch.cat([x, x[:1]])),
    "views of each": lambda body, x: body(torch.stack([x, x + 1], 1).flatten(0, 1)),
    "beside the whole": lambda body, x: body(torch.cat([x, -x])).unflatten(0, (2, -1)).sum(0) + body(x),
}


class Several(nn.Module):
    """Calls a partly trained mark on views of its batch, whose number of rows follows from that of the batch."""

    def __init__(self, way, body):
        super().__init__()
        self.way, self.body = VIEWS[way], body

    def forward(self, x):
        return self.way(self.body, x)


class Reshaping(nn.Module):
    """Uses the number of rows within, in shapes."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        made = self.frozen(x).view(x.shape[0], 2, 3).transpose(1, 2).reshape(len(x), -1)
        return self.head(torch.relu(made + torch.ones(x.size(0), 1)))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["plain", "reshaping"])
@pytest.mark.parametrize("way", VIEWS)
def test_views_of_a_batch_have_rows_of_their_own(way, kind, inner):
    body = Reshaping() if kind == "reshaping" else MakesOnes().body
    model = Several(way, body)
    twin = copy.deepcopy(model)
    torchcache.mark(model.body, audit=0)
    run = torch.compile(model, backend="torchcache", options={"inner": inner})
    data = torch.randn(22, 6)
    for _ in range(4):
        for rows in data[torch.randperm(22)].split(8):
            made, expected = run(rows), twin(rows)
            torch.testing.assert_close(made, expected)
            made.square().sum().backward()
            expected.square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torchcache.stats(model).hits
