"""What is marked, and its weights, replaced or changed in every way that Python and torch allow."""

import copy

import pytest
import torch
from torch import nn

import torchcache


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.linear = nn.Linear(8, 8)
        self.scale = 1.0

    def forward(self, ids):
        return self.linear(self.embedding(ids)).mean(1) * self.scale


class Model(nn.Module):
    """A head that may read from the marked module as well."""

    def __init__(self, reads=""):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(8, 3)
        self.reads = reads

    def forward(self, ids):
        features = self.backbone(ids)
        if self.reads == "weight":
            return features @ self.backbone.embedding.weight.t()
        if self.reads == "attribute":
            features = features * self.backbone.scale
        return self.head(features)


def through(door, model):
    """What runs a marked model."""
    if door == "compile":
        return torch.compile(model, backend="torchcache", options={"inner": "eager"})
    return torchcache.transform(model) if door == "transform" else model


class Twins:
    """A cached model and an uncached one that undergo the same changes."""

    def __init__(self, door, reads=""):
        self.cached = Model(reads).eval()
        self.plain = copy.deepcopy(self.cached)
        torchcache.mark(self.cached.backbone, freeze=True)
        self.run = through(door, self.cached)
        self.ids = torch.randint(50, (6, 5))
        for _ in range(3):  # the third call is checked by the quickest look
            self.agree()

    def change(self, function):
        with torch.no_grad():
            for model in (self.cached, self.plain):
                torch.manual_seed(1)
                function(model)

    def agree(self):
        with torch.no_grad():
            expected = self.plain(self.ids)
        for _ in range(2):
            torch.testing.assert_close(self.run(self.ids), expected)


def replace_module(model):
    model.backbone = Backbone().eval()
    if hasattr(model.forward, "traced"):  # the cached one
        torchcache.mark(model.backbone, freeze=True)


def replace_child(model):
    model.backbone.linear = nn.Linear(8, 8).requires_grad_(False)


def replace_parameter(model):
    model.backbone.linear.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)


def replace_data(model):
    model.backbone.linear.weight.data = torch.randn(8, 8)


def transpose_data(model):
    model.backbone.linear.weight.data = model.backbone.linear.weight.data.t()


def write_in_place(model):
    model.backbone.linear.weight.mul_(2)


def load(model):
    model.backbone.load_state_dict({name: 2 * value for name, value in model.backbone.state_dict().items()})


def set_attribute(model):
    model.backbone.scale = 3.0


def add_hook(model):
    model.backbone.linear.register_forward_hook(lambda module, args, output: output + 1)


def widen(model):
    model.double()


def larger_embedding(model):
    model.backbone.embedding = nn.Embedding(70, 8).requires_grad_(False)


CHANGES = [
    replace_child,
    replace_parameter,
    replace_data,
    transpose_data,
    write_in_place,
    load,
    set_attribute,
    add_hook,
    widen,
    larger_embedding,
]


@pytest.mark.parametrize("door", ["eager", "transform", "compile"])
@pytest.mark.parametrize("reads", ["", "weight", "attribute"])
def test_every_change_is_seen(door, reads):
    for change in CHANGES:
        if door == "compile" and change is add_hook:
            continue  # torch.compile itself does not see it
        torch._dynamo.reset()
        twins = Twins(door, reads)
        twins.change(change)
        twins.agree()


@pytest.mark.parametrize("door", ["transform", "compile"])
def test_another_module_in_the_place_of_the_marked_one_uses_its_own_weights(door):
    twins = Twins(door)
    other = Backbone().eval()
    twins.plain.backbone = copy.deepcopy(other)
    twins.cached.backbone = torchcache.mark(other, freeze=True)
    twins.agree()


@pytest.mark.parametrize("door", ["transform", "compile"])
def test_one_weight_made_trainable_gets_its_gradient_and_frozen_again_is_cached(door):
    twins = Twins(door)
    weight = twins.cached.backbone.linear.weight
    weight.requires_grad_(True)
    twins.run(twins.ids).sum().backward()
    assert weight.grad.abs().sum() > 0
    twins.agree()
    weight.requires_grad_(False)
    twins.agree()
    misses = torchcache.stats(twins.cached).misses
    twins.agree()
    assert torchcache.stats(twins.cached).misses == misses


def test_a_copy_of_a_transformed_model_uses_its_own_weights():
    twins = Twins("transform")
    copied = copy.deepcopy(twins.cached)
    with torch.no_grad():
        copied.backbone.embedding.weight.add_(1)
        expected = copy.deepcopy(twins.plain)
        expected.backbone.embedding.weight.add_(1)
        torch.testing.assert_close(copied(twins.ids), expected(twins.ids))
    twins.agree()


@pytest.mark.parametrize("door", ["transform", "compile"])
def test_copies_whose_numbers_change_have_rows_of_their_own(door):
    torch._dynamo.reset()
    marked = torchcache.torchcache(type("Marked", (Backbone,), {}))

    def build():
        model = Model().eval()
        model.backbone = marked().requires_grad_(False)
        return model

    def answers(model, run):
        backbone = model.backbone
        features = backbone.linear(backbone.embedding(ids)).mean(1) * backbone.scale
        torch.testing.assert_close(run(ids), model.head(features))

    ids = torch.randint(50, (6, 5))
    first = build()
    second = copy.deepcopy(first)
    runs = [(model, through(door, model)) for model in (first, second)]
    for scale in (1.0, 3.0, 2.0, 3.0, 1.0, 5.0):
        second.backbone.scale = scale  # Dynamo takes a number that changes for an input of its graph
        for model, run in [*runs, *reversed(runs)]:
            answers(model, run)
    first.backbone, second.backbone = second.backbone, first.backbone
    for model, run in runs:
        answers(model, run)


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_a_change_made_by_code_that_runs_often_is_a_miss(door):
    twins = Twins(door)

    def put(model, value):
        model.backbone.scale = value  # the interpreter makes this store a quick one of its own

    for step in range(200):
        for model in (twins.cached, twins.plain):
            put(model, float(step % 3))
        with torch.no_grad():
            torch.testing.assert_close(twins.run(twins.ids), twins.plain(twins.ids))


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_training_mode_set_in_every_step_changes_nothing(door):
    twins = Twins(door)
    for _ in range(40):
        twins.cached.train()
        assert not twins.cached.backbone.linear.training
        twins.agree()
    twins.change(set_attribute)
    twins.agree()


def test_a_train_of_ones_own_is_still_called():
    class Noting(nn.Linear):
        def train(self, mode=True):
            self.told = mode
            return super().train(mode)

    marked = torchcache.mark(nn.Sequential(Noting(2, 2)), freeze=True)
    marked.train()
    assert marked[0].told is True
    assert not marked[0].training
