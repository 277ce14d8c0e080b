"""A partly trained mark that is called answers as its code does, also where that answers otherwise once traced."""

import collections
import copy
import dataclasses
import random
import threading

import numpy as np
import pytest
import torch
from test_partly import assert_trains_the_same, counted, gradients
from torch import nn

import torchcache


class Asks(nn.Module):
    """Code that asks whether it is compiled, and keeps its latest features."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)
        self.norm, self.drop, self.latest = nn.BatchNorm1d(3), nn.Dropout(dropout), None

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if self.asks and not torch.compiler.is_compiling():
            h = h / h.norm(dim=-1, keepdim=True)
        self.latest = self.norm(self.head(self.drop(h)))
        return self.latest

    asks = True


class Same(Asks):
    """The same that asks nothing."""

    asks = False


def _steps(net, data):
    """Outputs, gradients, what is kept, and random numbers of several steps."""
    torch.manual_seed(1)
    seen = []
    for x in data:
        outputs = net(x)
        assert net.latest is outputs
        seen += [outputs.detach(), *gradients(net, outputs).values(), *map(torch.clone, net.buffers()), torch.rand(2)]
    return seen


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another thread"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", [Asks, Same])
def test_steps_are_those_of_the_code(kind, dropout, beside, warnings):
    done = threading.Event()
    other = threading.Thread(target=done.wait, daemon=True)
    if beside:
        other.start()
    twin = kind(dropout)
    model = torchcache.mark(copy.deepcopy(twin), pure=True)
    x = torch.randn(8, 6)
    data = [x[:4], x[4:], x[[1, 5, 2]], x[:4]] * 4
    try:
        for got, expected in zip(_steps(model, data), _steps(twin, data), strict=True):
            torch.testing.assert_close(got, expected)
    finally:
        done.set()
    if kind is Asks:
        assert counted(model)[0] == 0
        assert any("answers otherwise where Dynamo traces it" in text for text in warnings)
    else:
        assert counted(model)[0] >= 8
        assert not warnings


class Encoder(nn.Module):
    """torch's own encoder, which asks too, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2).requires_grad_(False).eval(), nn.Linear(8, 3)

    def forward(self, x, mask):
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


def test_padding_of_torchs_encoder_is_zero_as_without_a_mark():
    twin = Encoder()
    model, x = torchcache.mark(copy.deepcopy(twin)), torch.randn(4, 6, 8)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:, 4:] = True
    for _ in range(3):
        assert_trains_the_same(model, model, twin, [x, mask])


class Added(nn.Module):
    """What is frozen shows only once what multiplies it is no zero, as an adapter is at first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scale = nn.Linear(6, 3).requires_grad_(False), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        h = self.body(x)
        return x[:, :3] + self.scale * (h if torch.compiler.is_compiling() else h.tanh())


def test_what_shows_later_is_found():
    twin = Added()
    model, x = torchcache.mark(copy.deepcopy(twin)), torch.randn(4, 6)
    torch.testing.assert_close(model(x), twin(x))
    for net in (model, twin):
        net.scale.data.fill_(1.0)
    for _ in range(8):
        model(x)
    assert_trains_the_same(model, model, twin, [x])


class AsksLater(Same):
    """Code that asks where it is given an argument that its first calls lack."""

    def forward(self, x, flag=None):
        h = super().forward(x)
        return h if flag is None or torch.compiler.is_compiling() else h * 2


def test_what_is_traced_in_a_later_call_is_tried():
    twin = AsksLater()
    model, x = torchcache.mark(copy.deepcopy(twin), pure=True), torch.randn(4, 6)
    for given in ([x], [x], [x, True], [x, True]):
        assert_trains_the_same(model, model, twin, given)


def test_while_another_thread_traces_calls_are_computed(warnings):
    twin = Same()
    model, x = torchcache.mark(copy.deepcopy(twin), pure=True), torch.randn(4, 6)
    for _ in range(2):
        assert_trains_the_same(model, model, twin, [x])
    traces, goes_on = threading.Event(), threading.Event()

    def backend(graph, inputs):
        traces.set()
        goes_on.wait(60)
        return graph.forward

    other = threading.Thread(target=torch.compile(lambda x: x + 1, backend=backend), args=(x,))
    other.start()
    try:
        assert traces.wait(60)
        before, noticed = counted(model), torch.compiler.is_compiling()
        assert_trains_the_same(model, model, twin, [x])
    finally:
        goes_on.set()
        other.join()
    # In older releases nothing tells, and nothing is in the way.
    assert counted(model) == (before[0] + (0 if noticed else 4), before[1], before[2] + (4 if noticed else 0))
    assert_trains_the_same(model, model, twin, [x])
    assert counted(model)[0] > before[0]
    assert not warnings


class Takes(nn.Module):
    """Code that takes from what it holds in each call, which nobody can put back."""

    def __init__(self, source, take):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)
        self.source, self.take = source, take

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))) * self.take(self.source)


def _generated():
    yield from range(1, 100)


SOURCES = {
    "generator": (_generated, next),
    "iterator": (lambda: iter(range(1, 100)), next),
    "Random": (lambda: random.Random(0), lambda source: source.random()),
    "torch.Generator": (lambda: torch.Generator().manual_seed(0), lambda source: torch.rand((), generator=source)),
    "NumPy": (lambda: np.random.default_rng(0), lambda source: float(source.random())),
    "bytearray": (lambda: bytearray(range(1, 100)), lambda source: source.pop()),
    "deque": (lambda: collections.deque(range(1, 100)), lambda source: source.popleft()),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_cannot_be_put_back_is_taken_once(source):
    make, take = SOURCES[source]
    model, twin, x = torchcache.mark(Takes(make(), take)), Takes(make(), take), torch.randn(4, 6)
    for _ in range(12):
        torch.testing.assert_close(model(x), twin(x))


def test_a_name_of_the_users_own_stands_for_what_cannot_be_read():
    twin, model = [Takes(_generated(), lambda source: 0.0 if source is None else 1.0) for _ in range(2)]
    torchcache.mark(model, persistent_module_hash="first")
    x = torch.randn(4, 6)
    for _ in range(3):
        torch.testing.assert_close(model(x), twin(x))
    assert counted(model)[0] == 8


class Follows(nn.Module):
    """A frozen average of what trains, which its forward moves on, as code for momentum contrast does."""

    def __init__(self, big):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.query = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", torch.zeros((1 << 22) + 1 if big else 9))

    def forward(self, x):
        h = torch.tanh(self.body(x))
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            key.data = key.data * 0.5 + (query.data + 1) * 0.5
        self.queue.data.mul_(0.5).add_(1)
        return self.query(h) + self.key(h) + self.queue[:3]


@pytest.mark.parametrize("big", [False, True])
def test_averages_that_forward_moves_on_move_once(big):
    twin = Follows(big)
    model, x = torchcache.mark(copy.deepcopy(twin), pure=True), torch.randn(4, 6)
    for _ in range(12):
        torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(model.key.weight, twin.key.weight)


@torch._dynamo.disable
def _noise(x):
    return x * torch.rand_like(x)


class Noisy(Same):
    """Draws in code that no graph holds."""

    def forward(self, x):
        return _noise(self.head(self.body(x)))


class NoisyInNumPy(Noisy):
    """Draws from NumPy's generator."""

    def forward(self, x):
        return self.head(self.body(x)) * torch.from_numpy(np.random.rand(3)).float()


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another thread"])
@pytest.mark.parametrize("kind", [Noisy, NoisyInNumPy])
def test_what_code_draws_is_drawn_once_and_from_the_same_generator(kind, beside, warnings):
    done = threading.Event()
    other = threading.Thread(target=done.wait, daemon=True)
    if beside:
        other.start()
    seen = []
    try:
        for net in (kind(), torchcache.mark(kind())):
            torch.manual_seed(1)
            found = []
            for number in range(20):
                np.random.seed(number % 3)
                found += [net(torch.ones(4, 6) * number).detach(), torch.tensor(np.random.rand())]
            seen.append([*found, torch.rand(2)])
    finally:
        done.set()
    for got, expected in zip(*seen, strict=True):
        torch.testing.assert_close(got, expected)


def test_rows_that_are_taken_apart_are_computed_as_they_are():
    class Apart(Same):
        def forward(self, x):
            return self.head(torch.stack([self.body(row) for row in self.body(x).unbind(0)]))

    model, twin = torchcache.mark(Apart()), Apart()
    for rows in (4, 4, 3):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(model(x), twin(x))


@dataclasses.dataclass
class Answer:
    features: object
    told: object = None


@dataclasses.dataclass(slots=True)
class Slim:
    features: object
    told: object = None


class Bare:
    def __init__(self, features, told):
        self.features, self.told = features, told


class Answers(nn.Module):
    """Returns an object, and what it holds is another where it is traced."""

    WAYS = (
        lambda kind, h, traced: kind(h + traced, 1),
        lambda kind, h, traced: kind(h, 1.0 + traced),
        lambda kind, h, traced: kind(h, ["a", int(traced)]),
        lambda kind, h, traced: kind(Answer({"last": h + traced}), None),
        lambda kind, h, traced: [kind(h, None), "traced" if traced else "run"],
    )

    def __init__(self, kind, way):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8).requires_grad_(False), nn.Linear(8, 3)
        self.kind, self.way = kind, self.WAYS[way]

    def forward(self, x):
        return self.way(self.kind, self.head(torch.tanh(self.body(x))), torch.compiler.is_compiling())


@pytest.mark.parametrize("way", range(len(Answers.WAYS)))
@pytest.mark.parametrize("kind", [Answer, Slim, Bare])
def test_what_stands_in_objects_is_compared_with_what_code_answers(kind, way):
    model = torchcache.mark(Answers(kind, way), audit=0)
    x = torch.randn(6, 5)
    for _ in range(4):
        found = model(x)
        inner = found[0] if isinstance(found, list) else found
        features = inner.features.features["last"] if isinstance(inner.features, Answer) else inner.features
        torch.testing.assert_close(features, model.head(torch.tanh(model.body(x))))
        assert getattr(inner, "told", None) in (None, 1, 1.0, ["a", 0])
        assert not isinstance(found, list) or found[1] == "run"


@pytest.mark.parametrize("kind", [Answer, Bare])
def test_what_is_returned_in_objects_is_served(kind):
    class Same(Answers):
        def forward(self, x):
            return self.kind(self.head(torch.tanh(self.body(x))), ["a", 1, 2.0])

    model = torchcache.mark(Same(kind, 0), audit=0)
    x = torch.randn(6, 5)
    for _ in range(4):
        torch.testing.assert_close(model(x).features, model.head(torch.tanh(model.body(x))))
    assert torchcache.stats(model).hits


class Linked:
    """An object that knows the one before it, and the other way round."""

    def __init__(self, value, before):
        self.value, self.before, self.after = value, before, None
        if before is not None:
            before.after = self


class Chained(Answers):
    def forward(self, x):
        h, last = self.head(torch.tanh(self.body(x))), None
        for place in range(50):
            last = Linked(h * place if place else h + torch.compiler.is_compiling(), last)
        return last


def test_objects_that_hold_each_other_are_compared_once():
    model, x = torchcache.mark(Chained(None, 0), audit=0), torch.randn(6, 5)
    for _ in range(3):
        answer = model(x)
        torch.testing.assert_close(answer.value, 49 * model.head(torch.tanh(model.body(x))))
        while answer.before is not None:
            answer = answer.before
        torch.testing.assert_close(answer.value, model.head(torch.tanh(model.body(x))))
