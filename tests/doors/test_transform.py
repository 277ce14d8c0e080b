"""The main job: mark, transform, train; the second epoch skips the backbone."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchcache


class Backbone(nn.Module):
    """Counts the rows that it really computes."""

    computed = 0

    def __init__(self, width=10):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, k=1.0):
        return torch.tanh(self.linear(x)) * k


class Model(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = Backbone() if backbone is None else backbone
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


def marked_model(**options):
    model = Model()
    torchcache.mark(model.backbone, freeze=True, **options)
    return model


def pair(**options):
    """A transformed model and its uncached twin."""
    model = marked_model(**options)
    twin = Model()
    twin.load_state_dict(model.state_dict())
    twin.backbone.requires_grad_(False).eval()
    return torchcache.transform(model), twin


def test_training_is_the_same_and_the_second_epoch_computes_nothing():
    model, twin = pair()
    batches = [(torch.randn(n, 10), torch.randint(3, (n,))) for n in (8, 8, 5)]
    losses = {}
    for name, net in (("cached", model), ("plain", twin)):
        optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
        losses[name] = []
        for _ in range(3):
            for x, y in batches:
                loss = nn.functional.cross_entropy(net(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[name].append(loss.item())
    assert losses["cached"] == pytest.approx(losses["plain"], rel=1e-5)
    stats = torchcache.stats(model)
    assert (stats.misses, stats.hits) == (21, 42)
    assert len(stats.regions) == 1


def test_one_new_row_among_63_known_computes_exactly_one_row():
    model, twin = pair()
    x = torch.randn(64, 10)
    model(x)
    x = x[torch.randperm(64)].clone()
    x[17] = torch.randn(10)
    torch.testing.assert_close(model(x), twin(x))
    assert torchcache.stats(model).misses == 65


def test_duplicates_in_a_batch_are_computed_once():
    model, twin = pair()
    x = torch.randn(3, 10)[[0, 1, 0, 2, 2, 0]]
    torch.testing.assert_close(model(x), twin(x))
    assert (torchcache.stats(model).misses, torchcache.stats(model).hits) == (3, 3)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_small_batches(rows):
    model, twin = pair()
    x = torch.randn(rows, 10)
    for _ in range(2):
        torch.testing.assert_close(model(x), twin(x))
    assert torchcache.stats(model).misses == rows


def test_graph_shows_the_lookup_by_name():
    model, _ = pair()
    model(torch.randn(4, 10))
    (graph,) = torchcache.graphs(model)
    assert "torchcache.lookup" in str(graph.graph)
    assert "linear" in str(graph.graph)  # the head stays


def test_changed_weights_are_a_miss():
    model, twin = pair()
    x = torch.randn(4, 10)
    model(x)
    with torch.no_grad():
        model.backbone.linear.weight.mul_(2)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), twin(x))
    model.backbone.linear.weight = nn.Parameter(torch.randn(10, 10), requires_grad=False)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), twin(x))
    fresh = Model().state_dict()
    model.load_state_dict(fresh)
    twin.load_state_dict(fresh)
    torch.testing.assert_close(model(x), twin(x))
    model.double(), twin.double()
    torch.testing.assert_close(model(x.double()), twin(x.double()))
    assert torchcache.stats(model).hits == 0


def test_state_loaded_before_the_first_call_counts():
    model, twin = pair()
    state = Model().state_dict()
    model.load_state_dict(state)
    twin.load_state_dict(state)
    x = torch.randn(4, 10)
    torch.testing.assert_close(model(x), twin(x))


def test_changed_attribute_is_a_miss():
    class Scaled(Backbone):
        def __init__(self):
            super().__init__()
            self.factor = 2.0
            self.sizes = [1, 2]

        def forward(self, x):
            return super().forward(x) * self.factor + self.sizes[1]

    model = Model(torchcache.mark(Scaled(), freeze=True))
    torchcache.transform(model)
    x = torch.randn(4, 10)
    for factor in (2.0, 3.0, 2.0, 5.0, 7.0, 11.0):
        model.backbone.factor = factor
        expected = model.head(torch.tanh(model.backbone.linear(x)) * factor + model.backbone.sizes[1])
        torch.testing.assert_close(model(x), expected)
    assert torchcache.stats(model).misses == 4 * 5
    model.backbone.sizes[1] = 10
    expected = model.head(torch.tanh(model.backbone.linear(x)) * 11.0 + 10)
    torch.testing.assert_close(model(x), expected)


def test_transform_consumes_no_random_numbers_and_keeps_the_state_dict():
    model = Model()
    keys = list(model.state_dict())
    torch.manual_seed(3)
    torchcache.transform(_marked(model))
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == [name for name, _ in Model().named_modules()]


def _marked(model):
    torchcache.mark(model.backbone, freeze=True)
    return model


def test_deepcopy_uses_its_own_weights():
    model, _ = pair()
    x = torch.randn(4, 10)
    before = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.backbone.linear.weight.zero_()
        twin.backbone.linear.bias.zero_()
    torch.testing.assert_close(twin(x), twin.head.bias.expand(4, 3))
    torch.testing.assert_close(model(x), before)
    assert len(torchcache.graphs(twin)) == 1
    assert torchcache.stats(twin).misses == 4


def test_pickle_keeps_marks_and_the_transformation():
    model, _ = pair()
    x = torch.randn(4, 10)
    expected = model(x)
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(twin(x), expected)
    assert torchcache.stats(twin).hits == 4


@pytest.mark.parametrize("rows", [4, 40_000], ids=["short", "in memory that is used again"])
@pytest.mark.parametrize("options", [{}, {"cache_dtype": torch.float64}, {"max_memory_cache_size": 1e6}])
def test_outputs_never_alias_the_store_or_another_call(rows, options):
    backbone = torchcache.mark(Backbone(), freeze=True, **options)

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            self.scale = nn.Parameter(torch.ones(10))

        def forward(self, a, b):
            first = self.backbone(a)
            second = self.backbone(b)
            return (first * self.scale - second * self.scale).pow(2).sum()

    model = torchcache.transform(Siamese())
    a, b = torch.randn(rows, 10), torch.randn(rows, 10)
    expected = torch.tanh(backbone.linear(a))
    held = []
    for _ in range(3):
        loss = model(a, b)
        model.scale.grad = None
        loss.backward()
        plain = torch.tanh(backbone.linear(a)) - torch.tanh(backbone.linear(b))
        torch.testing.assert_close(model.scale.grad, 2 * plain.pow(2).sum(0), rtol=1e-4, atol=1e-2)
        held.append(backbone(a))
    for out in [*held, backbone(a)]:
        torch.testing.assert_close(out, expected)
        out.zero_()
    torch.testing.assert_close(backbone(a), expected)
    assert rows > 4 or torchcache.stats(model).misses == 3 * rows  # the eager door has rows of its own


def test_input_that_needs_a_gradient_gets_it():
    model, twin = pair()
    x = torch.randn(4, 10, requires_grad=True)
    model(x).sum().backward()
    got, x.grad = x.grad, None
    twin(x).sum().backward()
    torch.testing.assert_close(got, x.grad)
    assert torchcache.stats(model).hits == torchcache.stats(model).misses == 0
    with torch.no_grad():
        model(x)
    assert torchcache.stats(model).misses == 4


def test_nothing_marked_is_an_error():
    with pytest.raises(torchcache.MarkError, match="marked"):
        torchcache.transform(Model())


def test_all_marks_without_a_frozen_part_are_named_at_once():
    model = nn.Sequential(torchcache.mark(nn.Linear(2, 2)), torchcache.mark(nn.Linear(2, 2)))
    with pytest.raises(torchcache.MarkError) as error:
        torchcache.transform(model)
    assert "0 is marked" in str(error.value)
    assert "1 is marked" in str(error.value)
    assert "weight" in str(error.value)


def test_a_mark_inside_a_mark_is_the_outer_ones():
    inner = torchcache.mark(nn.Linear(10, 10), freeze=True)
    model = Model(torchcache.mark(nn.Sequential(inner, nn.ReLU()), freeze=True))
    torchcache.transform(model)
    model(torch.randn(4, 10))
    assert len(torchcache.stats(model).regions) == 1


def test_two_marks_in_a_row_are_one_region_when_their_options_agree():
    def build(second):
        first = torchcache.mark(nn.Linear(10, 10), freeze=True)
        other = torchcache.mark(nn.Linear(10, 10), freeze=True, **second)
        return torchcache.transform(nn.Sequential(first, other, nn.Linear(10, 3)))

    together, apart = build({}), build({"max_memory_cache_size": 10**6})
    x = torch.randn(4, 10)
    for model, regions in ((together, 1), (apart, 2)):
        model(x)
        assert len(torchcache.stats(model).regions) == regions


def test_graph_break_falls_back_to_the_eager_door():
    class Breaking(Backbone):
        def forward(self, x):
            x = self.linear(x)
            if x.sum().item() > -1e9:
                x = x + 1
            return x

    model = Model(torchcache.mark(Breaking(), freeze=True))
    torchcache.transform(model)
    x = torch.randn(4, 10)
    expected = model.head(model.backbone.linear(x) + 1)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)
    stats = torchcache.stats(model)
    assert (stats.misses, stats.hits) == (4, 8)


def test_a_break_outside_the_mark_keeps_it_cached():
    class Outer(Model):
        def forward(self, x):
            features = self.backbone(x)
            torch._dynamo.graph_break()
            return self.head(features)

    model = Outer()
    torchcache.transform(_marked(model))
    x = torch.randn(4, 10)
    expected = model.head(torch.tanh(model.backbone.linear(x)))
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    assert (torchcache.stats(model).misses, torchcache.stats(model).hits) == (4, 4)


def test_keys_do_not_depend_on_batch_size_or_order():
    model, twin = pair()
    x = torch.randn(16, 10)
    model(x)
    for rows in ([3], [5, 2], [1, 1, 1], list(range(15, -1, -1)), [0, 7, 9]):
        torch.testing.assert_close(model(x[rows]), twin(x[rows]))
    assert torchcache.stats(model).misses == 16


def test_autocast_has_keys_of_its_own():
    model, twin = pair()
    x = torch.randn(4, 10)
    model(x)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = model(x), twin(x)
        assert got.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected)
    assert torchcache.stats(model).misses == 8
    torch.testing.assert_close(model(x), twin(x))


def test_autocast_blocks_inside_a_mark_are_kept():
    class Mixed(Backbone):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.linear(x)
                with torch.autocast("cpu", enabled=False):
                    x = self.linear(x.float())
            return self.linear(x) + x

    plain = Mixed().requires_grad_(False)
    model = nn.Sequential(torchcache.mark(copy.deepcopy(plain), freeze=True), nn.Linear(10, 3))
    torchcache.transform(model)
    x = torch.randn(4, 10)
    for _ in range(2):
        torch.testing.assert_close(model(x), model[1](plain(x)))
    assert (torchcache.stats(model).misses, torchcache.stats(model).hits) == (4, 4)
    assert len(torchcache.stats(model).regions) == 1


def test_hooks_of_the_model_run():
    model, _ = pair()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model.backbone.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(4, 10)
    expected = model.head(torch.tanh(model.backbone.linear(x)) * 2)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    assert len(seen) == 2


def test_a_root_that_is_marked_itself():
    model = torchcache.transform(torchcache.mark(Backbone(), freeze=True))
    x = torch.randn(4, 10)
    expected = torch.tanh(model.linear(x))
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    assert torchcache.stats(model).hits == 4


def test_padded_batches_of_varying_length():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 10)
            self.encoder = nn.TransformerEncoderLayer(10, 2, 16, batch_first=True)

        def forward(self, ids, mask):
            h = self.encoder(self.embedding(ids), src_key_padding_mask=~mask)
            return (h * mask[..., None]).sum(1)

    model = Model(torchcache.mark(Tokens(), freeze=True))
    model.forward = None
    del model.forward
    twin = copy.deepcopy(torchcache.unmark(copy.deepcopy(model.backbone)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = model.backbone, model.head

        def forward(self, ids, mask):
            return self.head(self.backbone(ids, mask))

    net = torchcache.transform(Net())
    batches = []
    for length in (5, 9, 7, 5, 12, 6, 6):
        ids = torch.randint(50, (6, length))
        mask = torch.arange(length)[None] < torch.randint(1, length + 1, (6, 1))
        batches.append((ids, mask))
    for _ in range(2):
        for ids, mask in batches:
            torch.testing.assert_close(net(ids, mask), net.head(twin(ids, mask)), rtol=1e-4, atol=1e-5)
    assert torchcache.stats(net).misses == 42
    assert torchcache.stats(net).hits == 42


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_rows_stored_in_inference_mode_serve_training(door):
    model = Model()
    torchcache.mark(model.backbone, freeze=True)
    if door == "transform":
        torchcache.transform(model)
    x = torch.randn(4, 10)
    with torch.inference_mode():
        expected = model(x[:2].clone())
        model(x[1:3].clone())
    out = model(x)
    torch.testing.assert_close(out[:2], expected)
    out.sum().backward()
    torch.testing.assert_close(model.head.weight.grad, torch.tanh(model.backbone.linear(x)).sum(0).expand(3, 10))
    assert torchcache.stats(model).misses == 4


def test_an_output_that_follows_from_another_is_computed_again_and_not_stored():
    class Two(Backbone):
        def forward(self, x):
            h = torch.tanh(self.linear(x))
            return h, h.relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torchcache.mark(Two(), freeze=True)
            self.head = nn.Linear(10, 3)

        def forward(self, x, scale):
            h, positive = self.backbone(x)
            late = scale.exp()
            return self.head(h + positive * late)

    model = torchcache.transform(Net())
    x, scale = torch.randn(4, 10), torch.randn(1)
    for _ in range(2):
        h = torch.tanh(model.backbone.linear(x))
        torch.testing.assert_close(model(x, scale), model.head(h + h.relu() * scale.exp()))
    (region,) = torchcache.stats(model).regions
    assert (region.misses, region.hits) == (4, 4)
    assert region.memory_bytes == 4 * 40


def test_the_users_own_name_serves_both_doors_and_is_cheap(monkeypatch):
    model = Model()
    torchcache.mark(model.backbone, freeze=True, persistent_module_hash="v1")
    torchcache.transform(model)
    x = torch.randn(4, 10)
    first = model(x)
    with torch.no_grad():
        model.backbone.linear.weight.zero_()
    torch.testing.assert_close(model(x), first)  # the name is the user's promise
    assert torchcache.stats(model).hits == 4


def test_marking_again_takes_the_new_options():
    model, _ = pair()
    x = torch.randn(4, 10)
    model(x)
    torchcache.mark(model.backbone, freeze=True, cache_dtype=torch.bfloat16)
    model(x), model(x)
    assert any(region.memory_bytes == 4 * 20 for region in torchcache.stats(model).regions)
