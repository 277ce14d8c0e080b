"""Nested values as data: a spec says how tensors and constants are put together, so that a program can print it."""

import collections
import dataclasses
import enum
from collections import OrderedDict
from typing import Any

import torch

KEYS = ("first", "second", "third")


class Pool(enum.Enum):
    MEAN = "mean"
    LAST = "last"


@dataclasses.dataclass
class Record:
    first: Any = None
    second: Any = None
    third: Any = None


@dataclasses.dataclass
class Output(OrderedDict):
    """What a library calls a model output: its fields that are not ``None`` are its entries too."""

    first: Any = None
    second: Any = None
    third: Any = None

    def __post_init__(self):
        for name in KEYS:
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


Named = collections.namedtuple("Named", KEYS, defaults=(None, None, None))
MAPPINGS = {"dict": dict, "ordered": OrderedDict}
OBJECTS = {"named": Named, "record": Record, "output": Output}
KINDS = ("tuple", "list", *MAPPINGS, *OBJECTS)
# Kinds of which only the class tells one from the other.
LIKE = ({"tuple", "list"}, {"dict", "ordered"}, {"named", "record"}, {"record", "output"})
CONSTANTS = (None, 1, 2, 1.0, -0.0, 0.0, True, "mean", "last", Pool.MEAN, Pool.LAST, (2, 1))


def draw_spec(draw, tensors, depth=2):
    """A spec that holds tensors ``0 .. tensors - 1``, each once and in any order, and some constants.

    Parameters
    ----------
    draw : random.Random
        Where to draw from.
    tensors : int
        How many.
    depth : int
        How deep.

    Returns
    -------
    tuple
        ``("tensor", place)``, ``("constant", value)``, ``("size", dim)`` or ``(kind, keys, specs)``.
    """
    return _draw(draw, draw.sample(range(tensors), tensors), depth)


def _draw(draw, places, depth):
    if len(places) == 1 and (depth == 0 or draw.random() < 0.4):
        return ("tensor", places[0])
    kind = draw.choice(KINDS)
    count = draw.randint(1, len(KEYS))
    groups = [places[index::count] for index in range(count)]
    if depth == 0:
        groups, kind = [[place] for place in places], "list"
    parts = tuple(_draw(draw, group, depth - 1) if group else _constant(draw) for group in groups)
    if len(parts) < len(KEYS) and draw.random() < 0.6:
        parts += (_constant(draw),)
    return (kind, tuple(draw.sample(KEYS[: len(parts)], len(parts))), parts)


def _constant(draw):
    return ("size", -1) if draw.random() < 0.2 else ("constant", draw.choice(CONSTANTS))


def varied(draw, spec):
    """A spec that differs in one constant, in the order of one container or of its names, or in a container's kind."""
    ways: dict[str, list[Any]] = {}
    for way, found in _variants(draw, spec):
        if repr(found) != repr(spec):
            ways.setdefault(way, []).append(found)
    return draw.choice(ways[draw.choice(sorted(ways))])


def _variants(draw, spec):
    if spec[0] == "constant":
        yield from (("close" if _alike(value, spec[1]) else "constant", ("constant", value)) for value in CONSTANTS)
    if len(spec) < 3:
        return
    kind, keys, parts = spec
    order = draw.sample(range(len(parts)), len(parts))
    renamed = tuple(keys[index] for index in order)
    yield "order", (kind, renamed, tuple(parts[index] for index in order))
    yield "names", (kind, renamed, parts)
    yield from (("like" if {kind, other} in LIKE else "kind", (other, keys, parts)) for other in KINDS)
    for at, part in enumerate(parts):
        for way, found in _variants(draw, part):
            yield way, (kind, keys, (*parts[:at], found, *parts[at + 1 :]))


def _alike(a, b):
    return a == b or (isinstance(a, Pool) and isinstance(b, Pool))


def build(spec, tensors, shape):
    """The value that a spec stands for."""
    kind = spec[0]
    if kind == "tensor":
        return tensors[spec[1]]
    if kind == "constant":
        return spec[1]
    if kind == "size":
        return shape[spec[1]]
    _, keys, specs = spec
    parts = [build(part, tensors, shape) for part in specs]
    if kind in ("tuple", "list"):
        return tuple(parts) if kind == "tuple" else parts
    entries = dict(zip(keys, parts, strict=True))
    if kind in MAPPINGS:
        return MAPPINGS[kind](entries)
    return OBJECTS[kind](**entries)


def parts_of(value):
    """The names and parts of a container in order; ``None`` for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, Record):
        return [("first", value.first), ("second", value.second), ("third", value.third)]
    return None


def leaves_of(value):
    """Every tensor and every constant in a nested value, in order."""
    parts = parts_of(value)
    if parts is None:
        yield value
    else:
        for _, part in parts:
            yield from leaves_of(part)


def names_of(value):
    """The class of every container in a nested value, and every name of a part, in order."""
    parts = parts_of(value)
    if parts is not None:
        yield type(value).__name__
        for name, part in parts:
            yield name
            yield from names_of(part)


def weigh(values):
    """One number for constants: another for other ones, for other places, and for another order."""
    total = 0.0
    for place, value in enumerate(values):
        if isinstance(value, Pool):
            number = 3.0 + len(value.value + value.name)
        elif isinstance(value, str):
            number = 5.0 + sum(map(ord, value)) % 31
        elif value is None:
            number = -2.0
        else:
            number = float(value) + (0.5 if isinstance(value, bool) else 0.0)
        total += number * (place + 1)
    return total


def tensors_of(value):
    """Every tensor in a nested value."""
    return (leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor))
