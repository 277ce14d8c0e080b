"""Recurrent layers in partly trained marks, frozen or trained: steps are the same, and what is frozen is served."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchcache
from torchcache import torchcache_backend

LONGEST = 5


class Tagger(nn.Module):
    """A frozen encoder, recurrent layers, and a head over the mean of their steps."""

    def __init__(self, layer, *, frozen=False, packed=False):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)).requires_grad_(False)
        self.layer = layer(6, 3, 2, bidirectional=True, dropout=0.0 if frozen else 0.3, batch_first=True)
        self.layer.requires_grad_(not frozen)
        self.head = nn.Linear(6, 2)
        self.packed = packed

    def forward(self, x, lengths):
        steps = self.encoder(x)
        if self.packed:
            steps = pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
        steps, _ = self.layer(steps)
        if self.packed:
            steps, _ = pad_packed_sequence(steps, batch_first=True)
        return self.head(steps.sum(1) / lengths[:, None])


class Unrolled(nn.Module):
    """A frozen encoder, and a cell that is called for each step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(4, 6).requires_grad_(False)
        self.cell, self.head = nn.LSTMCell(6, 3), nn.Linear(3, 2)

    def forward(self, x, lengths):
        state = None
        for step in self.encoder(x).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


MODELS = {
    "lstm": lambda: Tagger(nn.LSTM),
    "gru": lambda: Tagger(nn.GRU),
    "rnn": lambda: Tagger(nn.RNN),
    "frozen": lambda: Tagger(nn.LSTM, frozen=True),
    "packed": lambda: Tagger(nn.LSTM, packed=True),
    "cell": Unrolled,
}
DOORS = {
    "call": lambda model: model,
    "transform": torchcache.transform,
    "compile": lambda model: torch.compile(model, backend=torchcache_backend, options={"inner": "eager"}),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", MODELS)
def test_steps_are_the_same_and_the_encoder_is_served(kind, door):
    twin = MODELS[kind]()
    model = torchcache.mark(copy.deepcopy(twin), audit=0)
    runs = [(twin, twin), (model, DOORS[door](model))]
    optimizers = [torch.optim.SGD(net.parameters(), 0.5) for net, _ in runs]
    data, lengths = torch.randn(16, LONGEST, 4), torch.randint(1, LONGEST + 1, (16,))
    lengths[0] = LONGEST
    for epoch in range(3):
        for training in (True, False):
            for number, rows in enumerate(torch.randperm(16).split(6)):
                seen = []
                for (net, run), optimizer in zip(runs, optimizers, strict=True):
                    net.train(training)
                    torch.manual_seed(10 * epoch + number)
                    with torch.set_grad_enabled(training):
                        outputs = run(data[rows], lengths[rows])
                    if training:
                        optimizer.zero_grad()
                        outputs.square().sum().backward()
                        optimizer.step()
                    seen.append(outputs.detach())
                torch.testing.assert_close(*seen)
    for own, others in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, others)
    assert torchcache.stats(model).hits >= 5 * 16


class Chained(Tagger):
    """The same as one expression, in which the layer is named before its input is computed."""

    def forward(self, x, lengths):
        return self.head(self.layer(self.encoder(x))[0][:, -1])


def test_a_layer_that_is_called_within_an_expression_is_served_or_computed_with_advice(warnings):
    model, data = torchcache.mark(Chained(nn.LSTM)), torch.randn(4, LONGEST, 4)
    twin = torchcache.unmark(copy.deepcopy(model))
    for seed in range(2):
        torch.manual_seed(seed)
        found = model(data, None)
        torch.manual_seed(seed)
        torch.testing.assert_close(found, twin(data, None))
    advised = any("call such a layer in a statement of its own" in text for text in warnings)
    assert advised != bool(torchcache.stats(model).hits)  # torch 2.15 runs a trace of it


class Stepped(nn.Module):
    """Takes its rows for steps, in a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.GRU(6, 6).requires_grad_(False), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0])


def test_rows_that_are_steps_are_computed_as_they_are():
    model, twin, data = torchcache.mark(Stepped()), Stepped(), torch.randn(4, 6)
    with torch._dynamo.config.patch(allow_rnn=True):
        for rows in (4, 4, 3):
            torch.testing.assert_close(model(data[:rows]), twin(data[:rows]))


def test_tracing_that_takes_long_is_told_of(monkeypatch, warnings):
    monkeypatch.setattr("torchcache.graph.traced.LONG", 0.0)
    net = torchcache.mark(Unrolled())
    for length in (2, 3, 4):
        net(torch.randn(3, length, 4), None).sum().backward()
    (text,) = [text for text in warnings if "Dynamo traced it" in text]
    assert "pad them to few" in text


class Read(nn.Module):
    """A frozen recurrent layer, and a head that trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"layer": nn.LSTM(4, 6, batch_first=True)}).requires_grad_(False)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        steps, _ = self.body["layer"](x)
        return self.head(steps[:, -1])


def test_what_dynamo_leaves_out_of_its_graphs_is_named(warnings):
    model, data = torchcache.mark(Read()), torch.randn(4, LONGEST, 4)
    for _ in range(3):
        model(data).sum().backward()
    assert any("mark body alone" in text for text in warnings)
    assert not any("no part of" in text for text in warnings)
