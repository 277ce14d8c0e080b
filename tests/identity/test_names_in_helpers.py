"""What a helper reads under a name that it is given, of whatever it is given."""

from __future__ import annotations

import collections
import enum
import functools
import inspect
import operator
import sys
import types

import pytest
import torch
from torch import nn

import torchcache


def by_getattr(config, key):
    return getattr(config, key)


def by_vars(config, key):
    return vars(config)[key]


def by_getter(config, key):
    return operator.attrgetter(key)(config)


def by_members(config, key):
    return dict(inspect.getmembers(config))[key]


def by_partial(config, key):
    return functools.partial(getattr, config)(key)


def by_loop(config, key):
    return sum(value for name, value in vars(config).items() if name == key)


class Unbound:
    def read(config, key):
        return getattr(config, key)


WAYS = [by_getattr, by_vars, by_getter, by_members, by_partial, by_loop, Unbound.read]


class List(list):
    pass


class Mapping(dict):
    pass


def made_class():
    return type("Config", (type("Defaults", (), {}),), {})


HOLDERS = {
    "a class": made_class,
    "a class of modules": lambda: type("Part", (nn.Module,), {}),
    "a module of Python": lambda: types.ModuleType("settings"),
    "a function": lambda: lambda: None,
    "a wrapper": lambda: functools.wraps(max)(lambda *given: given),
    "a function that is cached": lambda: functools.lru_cache(lambda: 1),
    "a partial": lambda: functools.partial(max, 1),
    "a list": lambda: List([1]),
    "a dict": lambda: Mapping(a=1),
    "an ordered dict": collections.OrderedDict,
    "a tensor": lambda: torch.ones(2),
    "a parameter": lambda: nn.Parameter(torch.ones(2), requires_grad=False),
    "an object": lambda: types.SimpleNamespace(),
    "a member of an enum": lambda: enum.Enum("Level", {"LOW": 1}).LOW,
}


class Scaled(nn.Module):
    """The product with what its helper finds."""

    def __init__(self, way, config):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.way, self.key = way, "scale"
        self.config = (config,)

    def forward(self, x):
        return self.lin(x) * self.way(self.config[0], self.key)


def agrees_after(module, change, hits=8):
    """Whether a change shows in the next call; rows were served before."""
    torchcache.mark(module.eval(), freeze=True, audit=0.0)
    x = torch.randn(8, 4)
    for _ in range(4):
        module(x)
    assert torchcache.stats(module).hits >= hits
    change()
    found = module(x)
    with torchcache.bypass():
        return torch.allclose(found, module(x), atol=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__qualname__)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_name_that_a_helper_is_given_counts_on_anything(holder, way):
    if way is by_members and holder in ("a tensor", "a parameter"):
        pytest.skip("tensors have members that may not be asked for")
    config = HOLDERS[holder]()
    config.scale = 1.0
    assert agrees_after(Scaled(way, config), lambda: setattr(config, "scale", 3.0))


@pytest.mark.parametrize("of", [type, lambda config: config.__class__, lambda config: type(config).__mro__[1]])
def test_what_a_class_passes_on_counts(of):
    config = made_class()()
    type(config).__mro__[1].scale = 1.0

    class Passed(Scaled):
        def forward(self, x):
            return self.lin(x) * by_getattr(of(self.config[0]), self.key)

    assert agrees_after(Passed(None, config), lambda: setattr(type(config).__mro__[1], "scale", 3.0))


def test_a_module_of_python_counts_where_it_is_looked_up(monkeypatch):
    settings = types.ModuleType("settings_of_a_test")
    settings.scale = 1.0
    monkeypatch.setitem(sys.modules, settings.__name__, settings)

    class Looked(Scaled):
        def forward(self, x):
            return self.lin(x) * by_getattr(sys.modules["settings_of_a_test"], "sc" + "ale")

    # All modules count then, and those of a test's runner cannot be read.
    assert agrees_after(Looked(None, None), lambda: setattr(settings, "scale", 3.0), hits=0)


def test_an_attribute_of_an_ordered_dict_counts_by_its_name():
    config = collections.OrderedDict()
    config.scale = 1.0

    class Named(Scaled):
        def forward(self, x):
            return self.lin(x) * self.config[0].scale

    assert agrees_after(Named(None, config), lambda: setattr(config, "scale", 3.0))


class Reader:
    """Made in each call."""

    def __init__(self, config):
        self.held = config

    def find(self, key):
        return getattr(self.held, key)


Pair = collections.namedtuple("Pair", "held key")


def by_object(config, key):
    return Reader(config).find(key)


def by_pair(config, key):
    pair = Pair(config, key)
    return getattr(pair.held, pair.key)


@pytest.mark.parametrize("way", [by_object, by_pair])
@pytest.mark.parametrize("holder", ["a class", "an object", "a module of Python", "a function"])
def test_what_an_object_holds_that_is_made_in_the_call_counts(holder, way):
    config = HOLDERS[holder]()
    config.scale = 1.0
    assert agrees_after(Scaled(way, config), lambda: setattr(config, "scale", 3.0))


def by_keyword(config, key):
    return getattr(types.SimpleNamespace(net=config).net, key)


def by_type(config, key):
    return getattr(type("Made", (), {"config": config}).config, key)


class Handed(Scaled):
    """Hands what it holds out by a property."""

    @property
    def handed(self):
        return self.config[0]

    def forward(self, x):
        return self.lin(x) * getattr(self.handed, self.key)


class Answering(Scaled):
    """And by an attribute that it makes up."""

    def __getattr__(self, name):
        return self.config[0] if name == "made_up" else super().__getattr__(name)

    def forward(self, x):
        return self.lin(x) * getattr(self.made_up, self.key)


@pytest.mark.parametrize("made", [Handed, Answering, by_keyword, by_type])
@pytest.mark.parametrize("holder", ["a class", "an object", "a module of Python"])
def test_what_stands_under_no_name_counts(holder, made):
    config = HOLDERS[holder]()
    config.scale = 1.0
    module = made(None, config) if isinstance(made, type) else Scaled(made, config)
    assert agrees_after(module, lambda: setattr(config, "scale", 3.0))


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"layer0": nn.Linear(4, 4), "layer1": nn.Linear(4, 4)})

    @property
    def trunk(self):
        return self.body

    def forward(self, x):
        for index in range(2):
            x = getattr(self.trunk, f"layer{index}")(x)
        return x


def test_weights_count_that_a_property_hands_out():
    module = Trunk()
    assert agrees_after(module, lambda: module.body["layer1"].weight.detach().mul_(2.0))


class Shelf:
    held = None


def by_shelf(config, key):
    Shelf.held = config
    return taken(key)


def taken(key):
    return getattr(Shelf.held, key)


def test_what_is_put_into_a_class_in_the_call_counts():
    config = types.SimpleNamespace(scale=1.0)
    assert agrees_after(Scaled(by_shelf, config), lambda: setattr(config, "scale", 3.0))
