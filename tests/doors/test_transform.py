"""The main job: mark, transform, train; the second epoch skips the backbone."""

import pytest
import torch
from torch import nn

import torchcache


class Backbone(nn.Module):
    def __init__(self, width=10):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


def pair(**options):
    """A transformed model and its uncached twin."""
    model, twin = Model(), Model()
    torchcache.mark(model.backbone, freeze=True, **options)
    twin.load_state_dict(model.state_dict())
    twin.backbone.requires_grad_(False).eval()
    return torchcache.transform(model), twin


def counts(model):
    """Rows computed and stored, and rows served."""
    stats = torchcache.stats(model)
    return stats.misses, stats.hits


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
    assert counts(model) == (21, 42)
    assert len(torchcache.stats(model).regions) == 1


def test_keys_do_not_depend_on_batch_size_order_or_company():
    model, twin = pair()
    x = torch.randn(64, 10)
    model(x[:16])
    for rows in ([3], [5, 2], [1, 1, 1], list(range(15, -1, -1)), [0, 7, 9]):
        torch.testing.assert_close(model(x[rows]), twin(x[rows]))
    assert counts(model)[0] == 16
    model(x)
    x = x[torch.randperm(64)].clone()
    x[17] = torch.randn(10)  # one new row among 63 known
    torch.testing.assert_close(model(x), twin(x))
    assert counts(model)[0] == 65


def test_state_loaded_before_the_first_call_counts():
    model, twin = pair()
    state = Model().state_dict()
    model.load_state_dict(state)
    twin.load_state_dict(state)
    x = torch.randn(4, 10)
    torch.testing.assert_close(model(x), twin(x))


def test_transform_consumes_no_random_numbers_and_keeps_the_state_dict():
    model, plain = Model(), Model()
    torchcache.mark(model.backbone, freeze=True)
    torch.manual_seed(3)
    torchcache.transform(model)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


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
    assert rows > 4 or counts(model)[0] == 2 * rows  # not all of the others fit into 1 MB


def test_what_no_grad_alone_freezes_is_cached_and_what_trains_is_named(warnings):
    teacher, student = torchcache.mark(nn.Linear(3, 2)), torchcache.mark(nn.Linear(3, 2))
    torchcache.transform(nn.ModuleList([teacher, student]))
    x = torch.randn(4, 3)
    for _ in range(3):
        with torch.no_grad():
            target = teacher(x)
        (student(x) - target).pow(2).mean().backward()
    assert counts(teacher) == (4, 8)
    assert counts(student) == (0, 0)
    assert student.weight.grad is not None
    assert any("it trains weight, bias: freeze what is not to train" in text for text in warnings)


def test_a_root_that_is_marked_itself():
    model = torchcache.transform(torchcache.mark(Backbone(), freeze=True))
    x = torch.randn(4, 10)
    for _ in range(2):
        torch.testing.assert_close(model(x), torch.tanh(model.linear(x)))
    assert counts(model) == (4, 4)


def test_marking_again_takes_the_new_options():
    model, _ = pair()
    x = torch.randn(4, 10)
    model(x)
    torchcache.mark(model.backbone, freeze=True, cache_dtype=torch.bfloat16)
    model(x), model(x)
    assert any(region.memory_bytes == 4 * 20 for region in torchcache.stats(model).regions)


def test_rows_stored_in_inference_mode_serve_training():
    model, twin = pair()
    x = torch.randn(4, 10)
    with torch.inference_mode():
        model(x[:2].clone()), model(x[1:3].clone())
    for net in (model, twin):
        net(x).sum().backward()
    torch.testing.assert_close(model.head.weight.grad, twin.head.weight.grad)
    assert counts(model) == (4, 4)
