import collections
import dataclasses
import enum
import functools
import gc
import os
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import recipes
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import RECIPES, Box, Color, Level, Mode, Named, Record, Role, make, mutable_ids, mutations, same
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from torchcache.errors import Bypass
from torchcache.values import take
from torchcache.values.take import take_arguments, take_outputs

X, Y = torch.randn(3, 2), torch.randn(3, 4)


def key(value):
    return take_outputs(value).key


@given(RECIPES)
def test_rebuilt_values_are_the_original_around_other_tensors(plan):
    value = make(plan)
    taken = take_outputs(value)
    others = [tensor + 1 for tensor in taken.tensors]
    pairs = dict(zip(map(id, taken.tensors), map(id, others), strict=True))
    assert same(value, taken.rebuild(taken.tensors), lambda a, b: a is b)
    assert same(value, taken.rebuild(others), lambda a, b: pairs[id(a)] == id(b))


@given(RECIPES)
def test_rebuilt_containers_are_nobody_elses(plan):
    value = make(plan)
    taken = take_outputs(value)
    first, second = taken.rebuild(taken.tensors), taken.rebuild(taken.tensors)
    ids = mutable_ids(value), mutable_ids(first), mutable_ids(second)
    assert len(set.union(*ids)) == sum(map(len, ids))


@settings(max_examples=400)
@given(st.data())
def test_keys_are_equal_exactly_when_the_values_are(data):
    plan = data.draw(RECIPES)
    other = data.draw(mutations(plan))
    assert key(make(plan)) == key(make(plan))
    assert (key(make(plan)) == key(make(other))) == same(make(plan), make(other))


@given(RECIPES, RECIPES)
def test_unrelated_values_have_different_keys(plan, other):
    assert (key(make(plan)) == key(make(other))) == same(make(plan), make(other))


@given(RECIPES)
def test_paths_are_as_many_as_tensors_and_all_different(plan):
    value = make(plan)
    taken = take_outputs(value)
    places = [taken.path(index) for index in range(len(taken.tensors))]
    assert len(set(places)) == len(places)


def test_plain_values_of_equal_spelling_are_told_apart():
    huge = 10**10_000
    values = [1, True, 1.0, 1 + 0j, "1", b"1", "True", None, "None", 0.0, -0.0, huge, huge + 1, -huge, "\ud800"]
    values += [(), [], {}, set(), frozenset(), "", b"", (1,), [1], {1: 1}, {1}, frozenset([1]), {True: 1}, {1.0: 1}]
    values += [(1, (2,)), ((1,), 2), (1, 2), (12,), ("a", "b"), ("ab",), ("a", "", "b"), torch.Size([1]), slice(1), 255]
    keys = [key(value) for value in values]
    assert len(set(keys)) == len(values)


def test_not_a_number_counts_by_its_bits():
    assert key(float("nan")) == key(float("nan"))
    assert key(recipes.NAN) != key(float("nan"))


def test_enums_count_by_class_name_and_value():
    def color(value, name="RED"):
        return enum.Enum("Color", {name: value}, module="m", qualname="Color")[name]

    assert key(color(1)) == key(color(1))
    assert len({key(color(1)), key(color(2)), key(color(1.0)), key(color(1, "BLUE")), key(Color.RED), key(1)}) == 6
    assert key(Mode(8)) != key(Mode(16))


def test_an_enum_member_counts_with_what_its_constructor_gave_it():
    def size(factor):
        class Size(enum.Enum):
            SMALL = 1

            def __init__(self, value):
                self.factor = factor

        return Size.SMALL

    assert key(size(0.5)) == key(size(0.5)) != key(size(0.25))


def test_an_int_enum_counts_with_its_integer():
    def level(integer):
        class Level(int, enum.Enum):
            def __new__(cls, value):
                member = int.__new__(cls, integer)
                member._value_ = value
                return member

            ONE = 1

        return Level.ONE

    assert key(level(1)) == key(level(1)) != key(level(2))


def test_a_registered_container_counts_with_its_context():
    assert key(Box([X], 2.0)) == key(Box([Y], 2.0)) != key(Box([X], 3.0))
    context = [1]
    taken = take_outputs(Box([X], context))
    rebuilt = taken.rebuild([Y])
    rebuilt.context.append(2)
    assert context == [1]
    assert taken.rebuild([Y]).context == [1]


class Table:
    def __init__(self, columns):
        self.columns = columns


torch.utils._pytree.register_pytree_node(
    Table,
    lambda table: ([{"columns": list(table.columns)}], {"count": len(table.columns)}),
    lambda parts, context: Table(parts[0]["columns"]),
    serialized_type_name="tests.Table",
)


def test_containers_that_exist_only_while_they_are_looked_at_are_all_different():
    tables = [Table([torch.zeros(2)]) for _ in range(50)]
    assert len(take_outputs(tables).tensors) == 50


def test_tensors_within_a_context_are_leaves():
    taken = take_outputs(Box([], X))
    assert taken.tensors[0] is X
    assert taken.rebuild([Y]).context is Y


def test_model_outputs_hold_each_tensor_once_and_work_as_before():
    taken = take_outputs(BaseModelOutputWithPooling(last_hidden_state=X, pooler_output=Y, hidden_states=(X, Y)))
    assert len(taken.tensors) == 2
    assert [taken.path(index) for index in range(2)] == [" 'last_hidden_state'", " 'pooler_output'"]
    rebuilt = taken.rebuild([Y, X])
    assert type(rebuilt) is BaseModelOutputWithPooling
    assert list(rebuilt.keys()) == ["last_hidden_state", "pooler_output", "hidden_states"]
    assert rebuilt.last_hidden_state is rebuilt["last_hidden_state"] is rebuilt[0] is Y
    assert rebuilt.attentions is None
    rebuilt.extra = 1
    assert not hasattr(taken.rebuild([Y, X]), "extra")
    assert rebuilt.hidden_states[0] is rebuilt.last_hidden_state


def test_which_arguments_are_one_object_is_part_of_the_key():
    def key_of(*args, **kwargs):
        return take_arguments(args, kwargs, ("a", "b", "c")).key

    x, y, z = (torch.zeros(2) for _ in range(3))
    keys = [key_of(x, y, z), key_of(x, x, z), key_of(x, y, x), key_of(x, y, y), key_of(x, x, x)]
    assert len(set(keys)) == 5
    assert key_of(z, z, c=x) == keys[1]
    assert key_of(x, [x], z) != key_of(x, [y], z)
    (args, kwargs) = take_arguments((x, [x]), {"c": x}, ("a", "b", "c")).rebuild([y])
    assert args[0] is args[1][0] is kwargs["c"] is y


def test_what_an_output_holds_beyond_its_fields_counts_and_comes_back():
    def output(**more):
        made = BaseModelOutputWithPooling(last_hidden_state=X)
        for name, value in more.items():
            object.__setattr__(made, name, value)
        return made

    assert key(output(grid=(2, 3))) != key(output(grid=(3, 2))) != key(output())
    assert len({key(output(grid=1, size=2)), key(output(size=1, grid=2)), key(output(grid=1, shape=2))}) == 3
    assert take_outputs(output(grid=(2, 3))).rebuild([X]).grid == (2, 3)
    with pytest.raises(Bypass, match="output 'grid' is an object"):
        take_outputs(output(grid=object()))


def test_packed_sequences_are_rebuilt_by_their_class():
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    taken = take_outputs(packed)
    rebuilt = taken.rebuild([tensor.clone() for tensor in taken.tensors])
    assert type(rebuilt) is type(packed)
    assert torch.equal(nn.utils.rnn.pad_packed_sequence(rebuilt)[0], nn.utils.rnn.pad_packed_sequence(packed)[0])


def test_results_of_torch_are_understood():
    taken = take_outputs(torch.max(X, 1))
    assert type(taken.rebuild(taken.tensors)) is torch.return_types.max
    assert taken.key != key(torch.min(X, 1)) != key((X, Y))


def test_a_batch_encoding_is_understood_without_its_tokenizers_encodings():
    taken = take_outputs(transformers.BatchEncoding({"x": X}))
    assert type(taken.rebuild([Y])) is transformers.BatchEncoding
    assert taken.rebuild([Y])["x"] is Y
    with pytest.raises(Bypass, match="'_encodings'"):
        take_outputs(transformers.BatchEncoding({"x": X}, encoding=[object()], n_sequences=1))


class Config:
    pass


class Liar:
    """Says that it is a list, and answers nothing else."""

    @property
    def __class__(self):
        return list

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError

    def __hash__(self):
        return 1


class Meta(type):
    """Makes classes that no dict can hold."""

    def __eq__(cls, other):
        raise RuntimeError

    __hash__ = None


class Unhashable(metaclass=Meta):
    pass


class Failing:
    pass


def _fail(*_):
    raise ValueError("no")


torch.utils._pytree.register_pytree_node(Failing, _fail, _fail, serialized_type_name="tests.Failing")


@dataclasses.dataclass
class Model(nn.Module):
    a: int = 0

    def __hash__(self):
        return id(self)


@dataclasses.dataclass
class Numbers(list):
    a: int = 0


class Integer(int):
    pass


class Word(str):
    pass


class Items(dict):
    pass


class Wrapper(torch.Tensor):
    pass


class Attached(enum.Enum):
    ODD = Config()


def labelled():
    tensor = torch.zeros(2)
    tensor.label = 3
    return tensor


def within_itself():
    values = []
    values.append(values)
    return values


def deep():
    values = []
    for _ in range(10_000):
        values = [values]
    return values


NOT_UNDERSTOOD = {
    "object": object,
    "config": Config,
    "liar": Liar,
    "object of a class that cannot be hashed": Unhashable,
    "defaultdict of a liar": lambda: collections.defaultdict(type("", (Liar,), {"__call__": int})()),
    "class": lambda: Config,
    "function": lambda: deep,
    "lambda": lambda: lambda: 0,
    "partial": lambda: functools.partial(deep),
    "method": lambda: X.sum,
    "module": lambda: nn.Linear(1, 1),
    "a dataclass that is a module": lambda: Model.__new__(Model),
    "a dataclass that is a list": Numbers,
    "Python module": lambda: os,
    "generator": lambda: (x for x in ()),
    "iterator": lambda: iter([1]),
    "random generator": torch.Generator,
    "lock": threading.Lock,
    "weak reference": lambda: weakref.ref(Config),
    "namespace": types.SimpleNamespace,
    "mapping proxy": lambda: types.MappingProxyType({}),
    "chain map": collections.ChainMap,
    "counter": collections.Counter,
    "defaultdict of its own": lambda: collections.defaultdict(lambda: 0),
    "bytearray": bytearray,
    "memoryview": lambda: memoryview(b"a"),
    "int subclass": lambda: Integer(2),
    "str subclass": lambda: Word("a"),
    "dict subclass": Items,
    "enum of objects": lambda: Attached.ODD,
    "path": Path,
    "model cache": transformers.DynamicCache,
    "tensor subclass": lambda: torch.zeros(2).as_subclass(Wrapper),
    "buffer with its attributes": lambda: nn.Buffer(torch.zeros(2)),
    "uninitialized": nn.UninitializedParameter,
    "tensor with an attribute": labelled,
    "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse rows": lambda: torch.eye(2).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([X, X[:1]]),
    "nested, jagged": lambda: torch.nested.nested_tensor([X, X[:1]], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "meta": lambda: X.to("meta"),
    "array of objects": lambda: np.array([Config()]),
    "array of records": lambda: np.zeros(2, "i4,f4"),
    "large array": lambda: np.zeros(2**20),
    "array with gaps": lambda: np.zeros((4, 4))[:, ::2],
    "array backwards": lambda: np.zeros(4)[::-1],
    "masked array": lambda: np.ma.zeros(2),
    "long double": lambda: np.longdouble(1),
    "container that cannot be flattened": Failing,
    "dict by object": lambda: {Config(): 1},
    "dict by tensor": lambda: {X: 1},
    "set of objects": lambda: {Config()},
    "frozenset of objects": lambda: frozenset([Config()]),
    "a list within itself": within_itself,
    "a deep list": deep,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_a_bypass_wherever_it_stands(name):
    value = NOT_UNDERSTOOD[name]()
    for place in (
        value,
        [X, value],
        {"a": (value,)},
        Record(value),
        Box([X], value),
        Box([value], None),
        Named(X, value),
    ):
        with pytest.raises(Bypass, match=r"^output.* is "):
            take_outputs(place)
    with pytest.raises(Bypass, match=r"^argument 'config'.* is "):
        take_arguments((X,), {"config": value}, ("x", "config"))


def test_tuples_of_tuples_that_unfold_without_end_are_a_bypass():
    value = (1,)
    for _ in range(60):
        value = (value, value)
    with pytest.raises(Bypass, match="is one of more than 100,000 values"):
        take_outputs({"a": value})


def test_a_call_from_deep_within_a_recursion_is_a_bypass():
    value = X
    for _ in range(60):
        value = [value]
    depth = 0
    frame = sys._getframe()
    while frame:
        depth, frame = depth + 1, frame.f_back

    def call_at(left):
        return call_at(left - 1) if left else take_outputs(value)

    with pytest.raises(Bypass, match="is nested too deeply"):
        call_at(sys.getrecursionlimit() - depth - 80)
    assert call_at(10).tensors[0] is X


def test_tensors_inside_transforms_are_bypassed():
    reasons = []

    def look(x):
        with pytest.raises(Bypass) as raised:
            take_outputs([x])
        reasons.append(raised.value.reason)
        return x.sum()

    torch.func.vmap(look)(X)
    torch.func.grad(look)(X)
    with torch._subclasses.FakeTensorMode() as mode:
        look(mode.from_tensor(X))
    assert ["torch.func" in reason for reason in reasons] == [True, True, False]


def test_reasons_name_the_place_the_type_and_the_advice():
    with pytest.raises(Bypass) as raised:
        take_arguments((X, {"a": [Config()]}), {}, ("x", "config"))
    assert raised.value.reason == "argument 'config'['a'][0] is a Config, which torchcache cannot take apart"
    assert "register_pytree_node" in raised.value.advice
    for output in (transformers.DynamicCache(), (X, transformers.DynamicCache()), {"past_key_values": Config()}):
        with pytest.raises(Bypass) as raised:
            take_outputs(output)
        assert raised.value.advice.startswith("call it with use_cache=False")


def test_names_that_cannot_be_printed_do_no_harm():
    huge = 10**10_000
    assert take_outputs({huge: X}).path(0) == "[<int>]"
    with pytest.raises(Bypass, match="output 'aaaa"):
        take_outputs({"a" * 10_000: {huge: Config()}})


def test_positional_and_keyword_arguments_are_the_same():
    names = ("x", "y", "flag")
    calls = [
        ((X, Y), {"flag": 1}),
        ((X, Y, 1), {}),
        ((X,), {"y": Y, "flag": 1}),
        ((X,), {"flag": 1, "y": Y}),
        ((), {"flag": 1, "y": Y, "x": X}),
    ]
    for args, kwargs in calls:
        taken = take_arguments(args, kwargs, names)
        assert taken.key == take_arguments(*calls[0], names).key
        assert [id(tensor) for tensor in taken.tensors] == [id(X), id(Y)]
        assert same((args, kwargs), taken.rebuild([X, Y]), lambda a, b: a is b)
        assert list(taken.rebuild([X, Y])[1]) == list(kwargs)
        assert [taken.path(0), taken.path(1)] == [" 'x'", " 'y'"]


def test_arguments_that_a_function_can_tell_apart_have_different_keys():
    names = ("x", "y")
    calls = [
        ((X,), {}),
        ((), {"y": X}),
        ((X, Y), {}),
        ((X,), {"z": Y}),
        ((X, Y, Y), {}),
        ((X, Y, (Y,)), {}),
        ((X, Y), {"z": Y}),
        ((X, Y), {"z": Y, "a": Y}),
        ((X, Y), {"a": Y, "z": Y}),
        ((X, None), {}),
        ((X, (Y,)), {}),
        ((), {}),
    ]
    keys = [take_arguments(args, kwargs, names).key for args, kwargs in calls]
    assert len(set(keys)) == len(calls)
    for args, kwargs in calls:
        taken = take_arguments(args, kwargs, names)
        assert same((args, kwargs), taken.rebuild(taken.tensors), lambda a, b: a is b)


ARGUMENTS = st.tuples(st.lists(RECIPES, max_size=3), st.dictionaries(st.sampled_from("abcd"), RECIPES, max_size=3))


@given(ARGUMENTS, st.lists(st.sampled_from("abc"), max_size=3, unique=True), st.booleans())
def test_rebuilt_arguments_are_in_the_callers_form(given_arguments, names, stack):
    args = tuple(make(plan) for plan in given_arguments[0])
    kwargs = {name: make(plan) for name, plan in given_arguments[1].items()}
    taken = take_arguments(args, kwargs, names, stack_lists=stack)
    assert same((args, kwargs), taken.rebuild(taken.tensors), lambda a, b: a is b if not stack else torch.equal(a, b))


@pytest.mark.parametrize("keywords", [(), ("y",), ("z",), ("y", "z"), ("z", "y", "w")])
def test_the_short_way_gives_what_the_long_one_does(monkeypatch, keywords):
    calls = [((X,) * count, dict.fromkeys(keywords, Y)) for count in range(4)]
    short = [take_arguments(*call, ("x", "y")) for call in calls] + [take_outputs(X)]
    monkeypatch.setattr(take, "_all_plain", lambda values: False)
    long = [take_arguments(*call, ("x", "y")) for call in calls] + [take_outputs(X)]
    for one, other in zip(short, long, strict=True):
        assert one.key == other.key
        assert same(one.tensors, other.tensors, lambda a, b: a is b)
        assert same(one.rebuild(one.tensors), other.rebuild(other.tensors), lambda a, b: a is b)
        assert list(map(one.path, range(len(one.tensors)))) == list(map(other.path, range(len(other.tensors))))


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_equal_tensors_is_one_leaf(kind):
    images = kind(torch.randn(4, 3, 2).unbind())
    taken = take_arguments((images,), {}, ("images",), stack_lists=True)
    assert [tuple(tensor.shape) for tensor in taken.tensors] == [(4, 3, 2)]
    ((rebuilt,), _) = taken.rebuild([taken.tensors[0][:3]])
    assert type(rebuilt) is kind
    assert same(rebuilt, images[:3], torch.equal)
    assert taken.path(0) == " 'images'"
    assert taken.key == take_arguments((images[:1],), {}, ("images",), stack_lists=True).key
    assert taken.key != take_arguments((images,), {}, ("images",)).key
    assert (
        taken.key != take_arguments(({list: tuple, tuple: list}[kind](images),), {}, ("images",), stack_lists=True).key
    )
    assert taken.key != take_arguments((taken.tensors[0],), {}, ("images",), stack_lists=True).key


def test_lists_of_other_tensors_are_taken_apart():
    for values in ([X, Y], [X, X.double()], [X, 1], []):
        assert take_arguments((values,), {}, (), stack_lists=True).key == take_arguments((values,), {}, ()).key
    assert len(take_arguments((X, X.clone()), {}, (), stack_lists=True).tensors) == 2


@pytest.mark.parametrize("stacked", [False, True])
def test_a_container_in_two_places_is_one_again(stacked):
    images = [X, X.clone()]
    taken = take_arguments((images, {"again": images, "other": [*images]}), {}, ("x", "y"), stack_lists=stacked)
    (first, second), _ = taken.rebuild([tensor + 1 for tensor in taken.tensors])
    assert first is second["again"]
    assert first is not second["other"]
    assert torch.equal(first[1], X + 1)
    apart = take_arguments(([*images], {"again": images, "other": images}), {}, ("x", "y"), stack_lists=stacked)
    copies = take_arguments(([*images], {"again": [*images], "other": [*images]}), {}, ("x", "y"), stack_lists=stacked)
    assert len({taken.key, apart.key, copies.key}) == 3


def test_a_container_within_itself_is_none():
    inner = {"x": X}
    inner["itself"] = [inner]
    with pytest.raises(Bypass, match="is a dict that holds itself"):
        take_outputs((X, inner))


def test_keys_are_the_same_in_another_process():
    program = """
import recipes
from torchcache.values.take import take_outputs
value = recipes.Record({"b", "a", "c"}, {"z": frozenset(["x", "y", 1]), "y": recipes.Color.RED})
print(take_outputs(value).key.hex())
"""
    paths = os.pathsep.join([str(Path(recipes.__file__).parent), str(Path(take.__file__).parents[2])])
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_what_is_kept_of_a_value_holds_no_tensors():
    tensor, values = torch.zeros(2), collections.deque()
    values.append([tensor, Box([tensor * 1], None), Record(tensor * 1), np.zeros(2)])
    kept = dataclasses.replace(take_outputs(values), tensors=[])
    held = weakref.ref(tensor)
    del tensor, values
    gc.collect()
    assert held() is None
    assert kept.path(1) == "[0][1][0]"
    assert kept.rebuild([X, Y, X])[0][1].parts[0] is Y


def test_the_classes_of_containers_and_enums_are_listed():
    taken = take_outputs({Color.RED: [Record(X, Named(Mode.A, 1))], "b": frozenset({(Role.DOC, 1)}), "c": {Level.ONE}})
    assert set(taken.classes) == {Color, Record, Named, Mode, Role, Level}
