"""Random nested values, described by recipes: one recipe makes equal values as often as it is asked."""

import collections
import dataclasses
import datetime
import decimal
import enum
import struct
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutputWithPooling


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    ONE = 1
    TWO = 2


class Mode(enum.IntFlag):
    A = 1
    B = 2


class Role(str, enum.Enum):
    QUERY = "query"
    DOC = "doc"


class Pair(NamedTuple):
    left: Any
    right: Any


Other = collections.namedtuple("Other", "left right")


class Named(Pair):
    """A namedtuple with a ``__dict__``."""


@dataclasses.dataclass
class Record:
    a: Any
    b: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = None


@dataclasses.dataclass(slots=True)
class Slotted:
    a: Any
    b: Any = None


class Box:
    def __init__(self, parts, context):
        self.parts, self.context = parts, context


class Crate(Box):
    pass


for _kind in (Box, Crate):
    pytree.register_pytree_node(
        _kind,
        lambda box: (box.parts, box.context),
        lambda parts, context, kind=_kind: kind(list(parts), context),
        serialized_type_name=f"tests.{_kind.__name__}",
    )


def recipe(kind, children=(), extra=None):
    return (kind, tuple(children), extra)


NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000001))[0]
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.integers(),
    st.sampled_from([0.0, -0.0, 1.0, float("nan"), -float("nan"), NAN, float("inf")]),
    st.complex_numbers(),
    st.text(st.characters(), max_size=3),
    st.binary(max_size=3),
    st.sampled_from(["1", b"1", "", b"", "\ud800", 10**4000, ..., NotImplemented]),
    st.sampled_from([*Color, *Level, *Role, Mode.A, Mode.B, Mode.A | Mode.B, Mode(0), Mode(8), Mode(16)]),
    st.sampled_from([torch.float32, torch.float64, torch.strided, torch.channels_last, torch.device("cpu")]),
    st.sampled_from([torch.Size([1, 2]), torch.Size([]), range(3), range(0, 3, 2), range(1, 3)]),
    st.sampled_from([np.float32(1), np.float64(1), np.int64(1), np.int32(1), np.bool_(True), np.str_("1")]),
    st.sampled_from([datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2), datetime.timedelta(1)]),
    st.sampled_from([decimal.Decimal("1"), decimal.Decimal("1.0"), decimal.Decimal("NaN")]),
)
KEYS = st.one_of(st.sampled_from(["a", "b", "c", 1, 2, Color.RED, Level.ONE, (1, "a"), (1.0, "a"), b"a", None]))
ARRAYS = st.sampled_from(
    [
        ((2, 3), "f4", "C"),
        ((2, 3), "f4", "F"),
        ((3, 2), "f4", "C"),
        ((2, 3), "i4", "C"),
        ((2, 3), ">f4", "C"),
        ((0, 3), "f4", "C"),
        ((0, 2), "f4", "C"),
        ((), "f4", "C"),
        ((2,), "U3", "C"),
    ]
)
FACTORIES = st.sampled_from([None, int, list, dict])


def _branches(children):
    several = st.lists(children, max_size=3)
    two = st.tuples(children, children)
    keyed = st.dictionaries(KEYS, children, max_size=3).map(lambda d: (tuple(d), tuple(d.values())))
    return st.one_of(
        st.builds(recipe, st.sampled_from(["list", "tuple"]), several),
        st.builds(recipe, st.just("deque"), several, st.sampled_from([None, 3, 4])),
        keyed.flatmap(
            lambda item: st.sampled_from(["dict", "OrderedDict"]).map(lambda kind: recipe(kind, item[1], item[0]))
        ),
        st.tuples(keyed, FACTORIES).map(lambda item: recipe("defaultdict", item[0][1], (item[0][0], item[1]))),
        st.builds(recipe, st.sampled_from(["Pair", "Other", "Record", "Frozen", "Slotted", "slice"]), two),
        st.builds(recipe, st.sampled_from(["Named", "Extended"]), st.tuples(children, children, children)),
        st.builds(recipe, st.sampled_from(["Box", "Crate"]), st.lists(children, min_size=1, max_size=3)),
        st.builds(recipe, st.just("ModelOutput"), st.tuples(children, children), st.sampled_from([(0, 1), (1, 0)])),
        st.builds(recipe, st.sampled_from(["set", "frozenset"]), st.just(()), st.lists(KEYS, max_size=3).map(tuple)),
        st.builds(recipe, st.just("array"), st.just(()), ARRAYS),
    )


LEAVES = st.one_of(st.just(recipe("tensor")), ATOMS.map(lambda value: recipe("atom", (), value)))
RECIPES = st.recursive(LEAVES, _branches, max_leaves=12)


def make(plan):
    """A new value after a recipe, with new tensors."""
    kind, children, extra = plan
    parts = [make(child) for child in children]
    if kind == "tensor":
        return torch.zeros(2, 1)
    if kind == "atom":
        return extra
    if kind in ("list", "tuple", "set", "frozenset"):
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](extra or parts)
    if kind == "deque":
        return collections.deque(parts, extra)
    if kind in ("dict", "OrderedDict"):
        return (dict if kind == "dict" else collections.OrderedDict)(zip(extra, parts, strict=True))
    if kind == "defaultdict":
        return collections.defaultdict(extra[1], zip(extra[0], parts, strict=True))
    if kind == "slice":
        return slice(*parts)
    if kind in ("Named", "Extended"):
        value = (Named if kind == "Named" else Record)(*parts[:2])
        value.more = parts[2]
        return value
    if kind in ("Box", "Crate"):
        return (Box if kind == "Box" else Crate)(parts[1:], parts[0])
    if kind == "ModelOutput":
        value = BaseModelOutputWithPooling()
        for place in extra:
            value[("last_hidden_state", "pooler_output")[place]] = parts[place]
        return value
    if kind == "array":
        shape, dtype, order = extra
        return np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), dtype=dtype, order=order)
    return {"Pair": Pair, "Other": Other, "Record": Record, "Frozen": Frozen, "Slotted": Slotted}[kind](*parts)


def nodes(plan, path=()):
    """The path of every recipe within a recipe."""
    yield path
    for index, child in enumerate(plan[1]):
        yield from nodes(child, (*path, index))


def at(plan, path):
    return at(plan[1][path[0]], path[1:]) if path else plan


def replaced(plan, path, new):
    if not path:
        return new
    kind, children, extra = plan
    children = list(children)
    children[path[0]] = replaced(children[path[0]], path[1:], new)
    return (kind, tuple(children), extra)


TWINS = [("list", "tuple"), ("dict", "OrderedDict"), ("set", "frozenset"), ("Pair", "Other"), ("Box", "Crate")]
TWINS += [("Record", "Frozen"), ("Frozen", "Slotted")]


@st.composite
def mutations(draw, plan):
    """The recipe with one thing changed somewhere (or, now and then, nothing)."""
    path = draw(st.sampled_from(list(nodes(plan))))
    kind, children, extra = at(plan, path)
    ways = [draw(LEAVES)]
    ways += [(pair[1 - pair.index(kind)], children, extra) for pair in TWINS if kind in pair]
    if kind in ("list", "tuple", "deque"):
        ways += [(kind, children[1:], extra), (kind, (*children, recipe("tensor")), extra)]
    if kind in ("dict", "OrderedDict"):
        ways += [(kind, children[::-1], extra[::-1]), (kind, children[1:], extra[1:])]
    if len(children) > 1:
        ways += [(kind, children[::-1], extra)]
    if kind == "ModelOutput":
        ways += [(kind, children, extra[::-1])]
    if kind == "deque":
        ways += [(kind, children, 9)]
    if kind == "array":
        ways += [(kind, children, draw(ARRAYS))]
    return replaced(plan, path, draw(st.sampled_from(ways)))


def same(a, b, tensors=lambda a, b: True):
    """Whether nobody can tell two values apart, by type, content and order; their tensors as ``tensors`` says."""
    if type(a) is not type(b):
        return False

    def all_same(ours, theirs):
        ours, theirs = list(ours), list(theirs)
        return len(ours) == len(theirs) and all(same(x, y, tensors) for x, y in zip(ours, theirs, strict=True))

    if isinstance(a, torch.Tensor):
        return tensors(a, b)
    if isinstance(a, enum.Enum):
        return a is b or (a.name, a.value) == (b.name, b.value)
    if type(a) in (float, complex):
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if isinstance(a, (decimal.Decimal, np.generic)):
        return repr(a) == repr(b)
    if isinstance(a, np.ndarray):
        flags = ("C_CONTIGUOUS", "F_CONTIGUOUS", "WRITEABLE")
        alike = a.dtype.str == b.dtype.str and a.shape == b.shape and all(a.flags[f] == b.flags[f] for f in flags)
        return alike and a.tobytes() == b.tobytes()
    if isinstance(a, (set, frozenset)):
        return all_same(sorted(a, key=repr), sorted(b, key=repr))
    if isinstance(a, range):
        return (a.start, a.stop, a.step) == (b.start, b.stop, b.step)
    if isinstance(a, slice):
        return all_same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    state = [getattr(a, "__dict__", {}), getattr(b, "__dict__", {})]
    if not (all_same(state[0], state[1]) and all_same(state[0].values(), state[1].values())):
        return False
    if isinstance(a, Slotted):
        return all_same((a.a, a.b), (b.a, b.b))
    if isinstance(a, dict):
        factories = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        return factories and all_same(a, b) and all_same(dict(a.items()).values(), dict(b.items()).values())
    if isinstance(a, collections.deque):
        return a.maxlen == b.maxlen and all_same(a, b)
    if isinstance(a, (list, tuple)):
        return all_same(a, b)
    return a == b if not state[0] else True


def mutable_ids(value):
    """The ids of everything within a value that can be written to, but tensors."""
    found = set()
    if isinstance(value, (list, dict, set, collections.deque, np.ndarray, Record, Frozen, Slotted, Box, Named)):
        found.add(id(value))
    inner = [getattr(value, name) for name in ("a", "b") if isinstance(value, Slotted)]
    if not isinstance(value, (enum.Enum, torch.Tensor)):
        inner += list(getattr(value, "__dict__", {}).values())
    if isinstance(value, dict):
        inner += dict(value.items()).values()
    elif isinstance(value, (list, tuple, collections.deque)):
        inner += list(value)
    elif isinstance(value, slice):
        inner += [value.start, value.stop, value.step]
    return found.union(*(mutable_ids(part) for part in inner))
