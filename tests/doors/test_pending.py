"""A forward that writes to a marked module before calling it: no row is stored under what the module was before."""

import pytest
import torch
from torch import nn

import torchcache

SETTINGS = {"scale": 1.0}
FACTOR = 1.0


class Bag:
    def __init__(self):
        self.scale = 1.0


def nonlocal_pair():
    held = 1.0

    def get():
        return held

    def put(value):
        nonlocal held
        held = value

    return get, put


class Scaled(nn.Module):
    """Returns x times a number found in one of many places."""

    def __init__(self, place):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.place = place
        self.scale = 1.0
        self.table = {"scale": 1.0}
        self.row = [1.0]
        self.bag = Bag()
        self.get, put = nonlocal_pair()
        self.put = (put,)

    def forward(self, x):
        scale = {
            "attribute": lambda: self.scale,
            "dict": lambda: self.table["scale"],
            "list": lambda: self.row[0],
            "object": lambda: self.bag.scale,
            "global": lambda: FACTOR,
            "global dict": lambda: SETTINGS["scale"],
            "closure": lambda: self.get(),
        }[self.place]()
        return x * self.weight * scale


class Setting(nn.Module):
    """Writes the number, then calls the module that reads it."""

    def __init__(self, place):
        super().__init__()
        self.backbone = Scaled(place)
        self.head = nn.Linear(2, 1)
        self.seen = 0

    def forward(self, x, scale):
        global FACTOR
        place, backbone = self.backbone.place, self.backbone
        if place == "attribute":
            backbone.scale = scale
        elif place == "dict":
            backbone.table["scale"] = scale
        elif place == "list":
            backbone.row[0] = scale
        elif place == "object":
            backbone.bag.scale = scale
        elif place == "global":
            FACTOR = scale
        elif place == "global dict":
            SETTINGS["scale"] = scale
        else:
            backbone.put[0](scale)
        features = backbone(x)
        return features, self.head(features)


@pytest.fixture(autouse=True)
def _as_before():
    global FACTOR
    FACTOR = SETTINGS["scale"] = 1.0


def cached(place, door, directory):
    model = Setting(place)
    torchcache.mark(model.backbone, freeze=True, persistent=True, persistent_cache_dir=directory)
    return through(door, model)


def through(door, model):
    """What runs a marked model."""
    if door == "transform":
        return torchcache.transform(model)
    return torch.compile(model, backend="torchcache", options={"inner": "eager"})


@pytest.mark.parametrize("door", ["transform", "compile"])
@pytest.mark.parametrize("place", ["attribute", "dict", "list", "object", "global", "global dict", "closure"])
def test_rows_are_those_of_what_was_written(place, door, tmp_path):
    global FACTOR
    x = torch.randn(3, 2)
    for scales in ([2.0, 3.0, 2.0, 1.0], [3.0, 2.0]):
        torch._dynamo.reset()
        FACTOR = SETTINGS["scale"] = 1.0
        model = cached(place, door, tmp_path)
        for scale in scales:
            for _ in range(2):
                torch.testing.assert_close(model(x, scale)[0], x * scale)
        torchcache.flush()


class Counting(nn.Module):
    """Writes to itself, not to what it calls."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        return self.backbone(x)


@pytest.mark.parametrize("door", ["transform", "compile"])
def test_what_is_written_elsewhere_does_not_matter(door):
    model = Counting()
    torchcache.mark(model.backbone, freeze=True)
    run = through(door, model)
    x = torch.randn(3, 2)
    for _ in range(3):
        run(x)
    assert model.steps == 3
    assert torchcache.stats(model).hits == 6


class Broken(nn.Module):
    """Writes the number, leaves the graph, then calls the module that reads it."""

    def __init__(self):
        super().__init__()
        self.backbone = Scaled("attribute")
        self.head = nn.Linear(2, 1)

    def forward(self, x, scale):
        self.backbone.scale = scale
        torch._dynamo.graph_break()
        features = self.backbone(x)
        return features, self.head(features)


@pytest.mark.parametrize("door", ["transform", "compile"])
def test_writes_before_a_graph_break_are_seen(door):
    model = Broken()
    torchcache.mark(model.backbone, freeze=True)
    run = through(door, model)
    x = torch.randn(3, 2)
    for scale in (2.0, 3.0, 2.0, 1.0, 3.0):
        torch.testing.assert_close(run(x, scale)[0], x * scale)
    before = torchcache.stats(model).misses
    torch.testing.assert_close(run(x, 3.0)[0], x * 3)
    assert torchcache.stats(model).misses == before


@pytest.mark.parametrize("backend", ["torchcache", "aot_eager"])
@pytest.mark.parametrize("place", ["attribute", "dict", "object", "global"])
def test_what_is_written_before_each_call_is_served(place, backend):
    model, x = Setting(place), torch.randn(3, 2)
    torchcache.mark(model.backbone, freeze=True)
    run = torch.compile(model, backend=backend)
    for _ in range(4):
        torch.testing.assert_close(run(x, 2.0)[0], x * 2)
    assert torchcache.stats(model).hits >= 6


def test_what_is_written_in_one_graph_says_why_nothing_is_served(warnings):
    model, x = Setting("attribute"), torch.randn(3, 2)
    torchcache.mark(model.backbone, freeze=True)
    run = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(run(x, 2.0)[0], x * 2)
    assert len([text for text in warnings if "code before it in the graph writes what it reads" in text]) == 1
