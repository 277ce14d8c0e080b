"""The program of a call: what its code reads is part of it and nothing else is; whatever changes of it is seen."""

import argparse
import contextvars
import copy
import datetime
import decimal
import enum
import os
import pathlib
import pickle
import queue
import random
import re
import subprocess
import sys
import textwrap
import threading
import types
import uuid
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import test_changes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchcache
from torchcache.identity.program import Program
from torchcache.identity.written import Written

LOG = []
LIMIT = torch.zeros(1)
CONTEXT = contextvars.ContextVar("role", default=1.0)
LOCAL = threading.local()


class Own(threading.local):
    role = 1.0


OWN = Own()


def read(module, function=None):
    return Program((module, function or type(module).forward), "net")


def module_of(forward, **attributes):
    """A module of a class of its own."""
    module = type("Net", (nn.Module,), {"forward": forward, "__module__": __name__})()
    module.layer = nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module.eval()


def source(text, name="own_code", **scope):
    """The namespace of a piece of source code."""
    scope["__name__"] = name
    exec(textwrap.dedent(text), scope)
    return scope


# Every kind of change that the doors must see.


@pytest.mark.parametrize("name", sorted(test_changes.CASES))
def test_a_change_of_what_is_read_is_seen_and_gives_another_digest(name, request, monkeypatch):
    module, change = test_changes.build(name, request, monkeypatch)
    program = read(module)
    contents = [tensor.tolist() for tensor in program.tensors]
    assert program.problem is None
    assert all(program.unchanged() for _ in range(4))
    assert not program.changes()
    change()
    after = read(module)
    if [tensor.tolist() for tensor in after.tensors] == contents:
        assert not program.unchanged()
        assert program.changes()
        assert after.digest != program.digest
    assert after.unchanged()


# What is read by name, and what is not.


def test_an_entry_of_a_configuration_that_forward_never_reads_is_no_part():
    def forward(self, x):
        return self.layer(x) * self.args.scale

    module = module_of(forward, args=argparse.Namespace(scale=2.0, lr=1e-3, output="a"))
    program = read(module)
    module.args.lr, module.args.output = 1e-4, "b"
    assert program.unchanged()
    assert read(module).digest == program.digest
    module.args.scale = 3.0
    assert not program.unchanged()
    assert program.changes() == ["args.scale"]
    assert read(module).digest != program.digest


ONE_ITEM = [
    "self.args['scale']",
    "self.args.get('scale')",
    "self.args.get('scale', 1)",
    "self.args['scale'] if x is None else self.args.get('missing')",
    "[self.args['scale'] for _ in range(2)]",
]
ALL_ITEMS = [
    "self.args[name], self.args['scale']",
    "self.args.get(name, self.args['scale'])",
    "self.args.get('un' + str(name)), self.args['scale']",
    "self.args.get, self.args['scale']",
    "max(self.args.get, ('scale',)), self.args['scale']",
    "self.args.pop('scale')",
    "len(self.args), self.args['scale']",
    "'scale' in self.args, self.args['scale']",
    "(lambda args: args)(self.args), self.args['scale']",
    "getattr(self, 'args'), self.args['scale']",
    "vars(self), self.args['scale']",
    "str(self.args['scale'])",
    "(args := self.args), self.args['scale']",
    "self.others, self.args['scale']",
]


@pytest.mark.parametrize("code", [*ONE_ITEM, *ALL_ITEMS])
def test_an_item_of_a_dict_that_forward_never_reads_is_no_part(code):
    scope = source(
        f"""
        def forward(self, x, name="scale"):
            return x, {code}
        """
    )
    module = module_of(scope["forward"], args={"scale": 2.0, "lr": 1e-3, "deep": {"a": 1}})
    module.others = [module.args]
    program = read(module)
    assert program.problem is None
    module.args.update(lr=1e-4, more=1)
    module.args["deep"]["a"] = 2
    assert program.unchanged() == (code in ONE_ITEM)
    assert (read(module).digest == program.digest) == (code in ONE_ITEM)
    now = read(module)
    module.args["scale"] = 3.0
    assert not now.unchanged()
    if code in ONE_ITEM:
        assert now.changes() == ["args['scale']"]
    assert read(module).digest != now.digest


def test_an_item_that_comes_later_or_is_of_another_dict_is_seen():
    def forward(self, x):
        return x * self.args.get("scale", 1.0) * self.deep["a"]["b"]

    module = module_of(forward, args={"lr": 1}, deep={"a": {"b": 1, "c": 1}})
    for change in (
        lambda: module.args.update(scale=2.0),
        lambda: setattr(module, "args", {"scale": 3.0}),
        lambda: setattr(module, "args", OrderedDict(scale=3.0)),
        lambda: module.deep["a"].update(c=2),
    ):
        program = read(module)
        assert program.unchanged()
        change()
        assert not program.unchanged()
        assert read(module).digest != program.digest


@pytest.mark.parametrize(
    "code",
    [
        "getattr(self, name)",
        "vars(self)[name]",
        "self.__dict__[name]",
        "getattr(self, 'un' + 'read'.upper())",
        "getattr(helper(self), name)",
        "operator.attrgetter(name)(self)",
        "eval('self.unread')",
        "sorted(vars(self))",
        "copy.deepcopy(self.held)",
        "str(self.held)",
        "json.dumps(self.held, default=vars)",
        "[getattr(part, name) for part in self.parts]",
    ],
)
def test_what_reads_an_object_under_unknown_names_reads_all_of_it(code):
    held = types.SimpleNamespace(unread=2.0)
    scope = source(
        f"""
        import copy, json, operator
        def helper(x):
            return x
        def forward(self, x, name="unread"):
            return x, {code}
        """
    )
    module = module_of(scope["forward"], held=held, unread=2.0, parts=[held])
    program = read(module)
    module.unread = held.unread = 3.0
    assert not program.unchanged()
    assert read(module).digest != program.digest


@pytest.mark.parametrize("code", ["getattr(self, 'known', None)", "hasattr(self, 'known')", "self.known"])
def test_constant_names_are_read_as_such(code):
    module = module_of(source(f"def forward(self, x): return x, {code}")["forward"], known=1, unread=1)
    program = read(module)
    module.unread = 2
    assert program.unchanged()
    assert read(module).digest == program.digest
    module.known = 2
    assert not program.unchanged()


def test_methods_that_nobody_calls_docstrings_and_comments_are_no_part():
    def build(body):
        scope = source(body, nn=nn)
        torch.manual_seed(0)
        return read(scope["Net"]().eval()).digest

    plain = """
        class Net(nn.Module):
            def forward(self, x):
                return self.step(x)
            def step(self, x):
                return x * 2
    """
    noted = """
        # A comment.
        class Net(nn.Module):
            '''About the class.'''
            version = 3
            def __init__(self):
                super().__init__()
            def forward(self, x):
                '''About the method.'''

                return self.step(x)  # another
            def step(self, x):
                'About the step.'
                return x * 2
            def training_step(self, x):
                return self.args.lr
    """
    assert build(plain) == build(noted)
    assert build(plain) != build(plain.replace("x * 2", "x * 3"))
    assert build(plain) != build(plain.replace("x * 2", "2 * x"))


def test_a_marked_method_has_no_part_in_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text, self.scale = nn.Linear(2, 2), nn.Linear(2, 2), 1.0

        def encode(self, x):
            return self.image(x)

        def forward(self, x):
            return self.text(x) * self.scale

    net = Net()
    program = read(net, Net.encode)
    assert {id(tensor) for tensor in program.tensors} == {id(tensor) for tensor in net.image.parameters()}
    net.scale = 2.0
    assert program.unchanged()
    assert len(read(net).tensors) == 2


def test_tensors_are_those_that_code_can_reach_in_a_stable_order():
    table = torch.ones(2)

    def forward(self, x):
        return self.layer(x) + self.table + self.held["t"] + table + LIMIT

    module = module_of(forward, held={"t": torch.ones(3)}, unused=nn.Linear(2, 2))
    module.register_buffer("table", torch.ones(1))
    program = read(module)
    wanted = [module.layer.weight, module.layer.bias, module.table, module.held["t"], table, LIMIT]
    assert {id(tensor) for tensor in program.tensors} == {id(tensor) for tensor in wanted}
    order = [tuple(tensor.shape) for tensor in program.tensors]
    assert order == [tuple(tensor.shape) for tensor in read(module).tensors]


@pytest.mark.parametrize("code", ["self.parameters()", "self.state_dict()", "torch.func.functional_call(self, {}, x)"])
def test_code_that_takes_all_parameters_reads_them_all(code):
    module = module_of(
        source(f"def forward(self, x): return {code}", torch=torch)["forward"], unused=nn.Sequential(nn.Linear(2, 2))
    )
    assert {id(t) for t in read(module).tensors} == {id(t) for t in module.parameters()}


def test_tensors_have_no_weak_references():
    module = module_of(lambda self, x: self.layer(x))
    program = read(module)
    assert program.tensors
    assert not any(map(weakref.getweakrefcount, program.tensors))  # torch.utils.swap_tensors refuses them


# What cannot be read.


def odd_values():
    yield "generator", (i for i in range(3))
    yield "queue", queue.Queue()
    yield "iterator", iter([1, 2])
    yield "lock", threading.Lock()
    yield "pool", ThreadPoolExecutor(1)
    yield "thread", threading.Thread(target=print)
    yield "ufunc", np.frompyfunc(abs, 1, 1)


@pytest.mark.parametrize(("name", "value"), list(odd_values()), ids=lambda v: v if isinstance(v, str) else "")
def test_odd_attributes_matter_only_where_they_are_read(name, value):
    unread = module_of(lambda self, x: self.layer(x), extra=value)
    assert read(unread).problem is None
    reading = read(module_of(lambda self, x: (self.layer(x), self.extra), extra=value))
    if name in ("generator", "queue", "iterator", "ufunc"):
        assert "extra" in reading.problem
        assert type(value).__name__ in reading.problem
    else:
        assert reading.problem is None


def configurations():
    pydantic = pytest.importorskip("pydantic")
    omegaconf = pytest.importorskip("omegaconf")

    class Settings(pydantic.BaseModel):
        scale: float = 2.0

    yield Settings(), lambda config: setattr(config, "scale", 3.0)
    for tree in ({"scale": 2.0}, {"scale": "${other}", "other": 2.0}):
        other = "other" if "other" in tree else "scale"
        yield omegaconf.OmegaConf.create(tree), lambda config, name=other: setattr(config, name, 3.0)
    nested = omegaconf.OmegaConf.create({"model": {"scale": "${base}"}, "base": 2.0})
    yield nested.model, lambda config: setattr(nested, "base", 3.0)


def test_configurations_of_libraries_count_by_their_values():
    for config, change in configurations():
        module = module_of(lambda self, x: self.layer(x) * self.config.scale, config=config)
        program = read(module)
        assert program.problem is None
        assert program.unchanged()
        assert read(module).digest == program.digest
        assert not program.outside().differences()
        change(config)
        assert not program.unchanged()
        assert read(module).digest != program.digest


def plain_values():
    yield [re.compile("a+"), re.compile("a+", re.I), re.compile("b")]
    yield [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)]
    yield [decimal.Decimal("1.5"), decimal.Decimal("1.50001")]
    yield [uuid.UUID(int=1), uuid.UUID(int=2)]
    yield [pathlib.PurePosixPath("a"), pathlib.PurePosixPath("b")]
    yield [random.Random(0), random.Random(1)]
    yield [np.random.default_rng(0), np.random.default_rng(1)]
    yield [memoryview(b"a"), memoryview(b"b")]
    yield [1, 1.0, True, "1", b"1", None, (1,), [1], {1}, frozenset({1}), {1: 1}, {1: 2}, range(1), slice(1), ...]
    yield [enum.Enum("E", {"A": 1}).A, enum.Enum("E", {"A": 2}).A, enum.Enum("F", {"A": 1}).A]
    yield [type("Text", (str,), {})("a"), type("Text", (str,), {})("b"), type("Other", (str,), {})("a"), "a"]
    yield [np.float32(1), np.float64(1), np.ones(1), np.ones(1, "f4"), np.ones((1, 1))]
    yield [np.sqrt, np.log, np.add]
    yield [torch.float32, torch.float16, torch.device("cpu"), torch.device("cuda")]
    yield [0.0, -0.0, float("nan"), 1j]


@pytest.mark.parametrize("values", list(plain_values()), ids=lambda values: type(values[0]).__name__)
def test_plain_values_count_by_type_and_value(values):
    digests = [read(module_of(lambda self, x: (x, self.extra), extra=value)) for value in values]
    assert all(program.problem is None for program in digests)
    assert len({program.digest for program in digests}) == len(values)
    again = [read(module_of(lambda self, x: (x, self.extra), extra=value)).digest for value in values]
    assert again != digests


def test_uninitialised_parameters_ask_for_a_first_batch():
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert "0.weight" in read(lazy).problem
    assert "first" in read(lazy).problem
    lazy(torch.ones(1, 2))
    assert read(lazy).problem is None
    assert read(nn.Linear(2, 2, device="meta")).problem is None


# What changes without being written.


def test_a_local_of_a_thread_counts_as_it_is_in_this_thread():
    for local in (LOCAL, OWN):
        local.role = 1.0
        scope = source("def forward(self, x): return x + HELD.role", HELD=local)
        module = module_of(scope["forward"])
        program = read(module)
        assert program.unchanged()
        seen = []

        def look(program=program, local=local, seen=seen):
            local.role = -1.0
            seen.append(program.unchanged())

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert seen == [False]
        assert program.unchanged()
        local.role = 2.0
        assert not program.unchanged()


def test_a_context_variable_counts_by_its_value():
    def forward(self, x):
        return x + CONTEXT.get()

    module = module_of(forward)
    program = read(module)
    token = CONTEXT.set(-1.0)
    assert not program.unchanged()
    assert read(module_of(forward)).digest != program.digest
    CONTEXT.reset(token)
    assert program.unchanged()


def test_an_environment_variable_counts_where_it_is_named(monkeypatch):
    def forward(self, x):
        return x if os.environ.get("NET_MODE") == "a" else os.getenv("NET_OTHER")

    module = module_of(forward)
    program = read(module)
    monkeypatch.setenv("UNRELATED", "1")
    assert program.unchanged()
    assert read(module_of(forward)).digest == program.digest
    monkeypatch.setenv("NET_MODE", "a")
    assert not program.unchanged()
    assert read(module_of(forward)).digest != program.digest


def test_nothing_is_imported_and_what_is_imported_later_is_seen(monkeypatch):
    def forward(self, x):
        import a_module_that_ends_the_run as late

        return late.scale(x)

    module = module_of(forward)
    program = read(module)
    assert program.problem is None
    assert program.unchanged()
    late = types.ModuleType("a_module_that_ends_the_run")
    late.scale = lambda x: x * 2
    monkeypatch.setitem(sys.modules, late.__name__, late)
    assert not program.unchanged()
    second = read(module)
    late.scale = lambda x: x * 3
    assert not second.unchanged()


def test_containers_are_read_without_code_of_their_own():
    class Lazy(OrderedDict):
        def __getitem__(self, name):
            raise SystemExit(name)

        keys = values = items = __iter__ = __getitem__

    held = Lazy()
    OrderedDict.__setitem__(held, "a", 1)
    module = module_of(lambda self, x: (x, self.held), held=held)
    program = read(module)
    assert program.problem is None
    assert program.unchanged()
    OrderedDict.__setitem__(held, "a", 2)
    assert not program.unchanged()
    assert read(module).digest != program.digest


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_part_of_the_state(order):
    large = np.zeros((4096, 512), dtype=np.float32, order=order)
    large.flags.writeable = False
    module = module_of(lambda self, x: x + self.table[0, 1], table=large)
    program = read(module)
    (table,) = (tensor for tensor in program.tensors if tensor.numel() == large.nbytes)
    large.flags.writeable = True
    large[:, 1:] = 1
    assert float(table.view(torch.float32).mean()) == 511 / 512
    assert program.unchanged()
    large.dtype = np.int32
    assert not program.unchanged()


def test_arrays_with_gaps_are_compared_whole():
    table = np.zeros((4096, 512), dtype=np.float32)[:, ::2]
    module = module_of(lambda self, x: x + self.table[0, 1], table=table)
    program = read(module)
    assert program.unchanged()
    table[4095, 255] = 1
    assert not program.unchanged()


def test_a_program_that_is_rewritten_in_every_call_is_looked_at_to_the_end():
    def forward(self, x):
        self.took = x
        self.same = 1
        return self.layer(x) * self.scale

    module = module_of(forward, scale=1.0, took=None, same=1)
    program = read(module)
    for step in range(100):
        module.took, module.same = object(), 1
        assert program.unchanged(), step
    module.scale = 2.0
    assert not program.unchanged()


def test_a_new_attribute_with_a_name_that_is_read_is_seen():
    module = module_of(lambda self, x: self.get(x))
    type(module).get = lambda self, x: x
    program = read(module)
    module.other = 1
    assert program.unchanged()
    module.get = lambda x: x * 2
    assert not program.unchanged()


# Patches and reinstalled packages.


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.functional, "relu"),
        (torch, "matmul"),
        (torch.Tensor, "matmul"),
        (nn.Module, "_call_impl"),
        (nn.Linear, "forward"),
    ],
)
def test_patches_of_torch_are_seen(owner, name, monkeypatch):
    def forward(self, x):
        return torch.matmul(nn.functional.relu(self.layer(x)), x)

    module = module_of(forward)
    program = read(module)
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs) * 2)
    assert not program.unchanged()
    first = read(module).digest
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs) * 3)
    assert len({program.digest, first, read(module).digest}) == 3


SCRIPT = """
import sys
import torch
from torch import nn
import mynets
from torchcache.identity.program import Program
torch.manual_seed(0)
def first():
    return PLUGINS
def second():
    return OTHERS
def third():
    return PLUGINS, OTHERS, frozenset({(1, "a"), (2, "b")})
PLUGINS, OTHERS = {first, second, third, "name"}, {second, third, frozenset({first, "a"}), frozenset({first, "b"})}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.names, self.text = mynets.Net(), {"b", "a", "c", "d"}, {"k": {1, 2.5, None}}
    def forward(self, x):
        return self.net(x), self.names, self.text, PLUGINS
program = Program((Net(), Net.forward), "net")
assert program.problem is None, program.problem
print(program.digest.hex())
"""


def in_a_process(tmp_path, files, seed="0", folder="site-packages"):
    package = tmp_path / folder / "mynets"
    package.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (package / name).write_text(textwrap.dedent(text))
    paths = [str(package.parent), os.environ.get("PYTHONPATH", ""), os.getcwd()]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NET = """
    __version__ = "0.1.0"
    from torch import nn
    from .blocks import Block
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.block = nn.Linear(4, 4), Block()
        def forward(self, x):
            return self.block(self.linear(x))
"""
BLOCK = """
    from torch import nn
    from .deep import near
    class Block(nn.Module):
        def forward(self, x):
            return near(x) * 1.0
"""
DEEP = """
    def near(x):
        return far(x)
    def far(x):
        return farther(x)
    def farther(x):
        return x
"""


DEEP_ELSEWHERE = """
    from .farther import farther
    def near(x):
        return far(x)
    def far(x):
        return farther(x)
"""


def test_every_process_folder_and_hash_seed_gives_the_same_digest(tmp_path):
    files = {"__init__.py": NET, "blocks.py": BLOCK, "deep.py": DEEP}
    found = {in_a_process(tmp_path, files, seed) for seed in ("1", "2", "3")}
    found.add(in_a_process(tmp_path / "elsewhere", files))
    assert len(found) == 1


def test_a_package_installed_again_with_an_edit_is_another_program(tmp_path):
    files = {"__init__.py": NET, "blocks.py": BLOCK, "deep.py": DEEP}
    edits = [
        {},
        {"blocks.py": BLOCK.replace("1.0", "3.0")},
        {"deep.py": DEEP.replace("return farther(x)", "return farther(x) + 1")},
        {"deep.py": DEEP.replace("return x", "return x + 1")},
    ]
    found = [in_a_process(tmp_path, {**files, **edit}) for edit in edits]
    assert len(set(found)) == len(edits)


def test_an_upgrade_of_a_package_is_seen_under_whatever_name_it_is_distributed(tmp_path):
    found = set()
    for version in ("1.0", "2.0"):
        listed = tmp_path / "site-packages" / "another_name-1.dist-info" / "RECORD"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text(f"mynets/farther.py,sha256={version},9\n")
        farther = f"def farther(x):\n    return x * {version}\n"
        files = {"__init__.py": NET, "blocks.py": BLOCK, "deep.py": DEEP_ELSEWHERE, "farther.py": farther}
        found.add(in_a_process(tmp_path, files))
    assert len(found) == 2


# Copies, marks and real models.


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2))])
        self.config = {"sizes": [1, 2], "names": {"b", "a"}, "nested": {"x": (1, None, 2.5)}}

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x, self.config


def test_copies_and_pickles_are_the_same_program():
    tree = Tree()
    found = [read(module).digest for module in (tree, Tree(), copy.deepcopy(tree), pickle.loads(pickle.dumps(tree)))]
    assert len(set(found)) == 1
    assert len(read(tree).tensors) == 4


def test_marks_of_torchcache_are_seen_through():
    tree = Tree()
    before = read(tree)

    def wrapper(self, x):
        return x

    wrapper.torchcache_function = Tree.forward
    marked = type("Tree", (Tree,), {"forward": wrapper, "torchcache_base": Tree, "torchcache_options": object()})
    tree.__class__ = marked
    tree._torchcache_programs = {}
    assert Program((tree, wrapper), "net").digest == before.digest
    assert Program((tree, Tree.forward), "net").digest == before.digest


def test_one_object_in_two_places_is_not_two_equal_ones():
    """A part that knows its owner reads from that owner, wherever else it is kept."""

    def net(shared):
        def part(owner):
            return types.SimpleNamespace(owner=owner)

        first, second = (types.SimpleNamespace(scale=1.0) for _ in range(2))
        first.part = part(first)
        second.part = first.part if shared else part(second)
        return module_of(lambda self, x: x * self.second.part.owner.scale, first=first, second=second)

    assert read(net(True)).digest != read(net(False)).digest


def test_real_models_are_read_whole_and_twice_the_same():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    model(torch.arange(6).view(2, 3))
    program = read(model)
    assert program.problem is None
    assert {id(tensor) for tensor in model.parameters()} <= {id(tensor) for tensor in program.tensors}
    assert read(transformers.BertModel(config).eval()).problem is None
    model(torch.arange(6).view(2, 3))
    assert program.unchanged()
    assert not program.changes()
    assert read(model).digest == program.digest
    model.config.hidden_act = "relu"
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    assert not program.unchanged()
    assert read(model).digest != program.digest


def test_a_function_registered_in_a_library_is_part_of_the_model():
    transformers = pytest.importorskip("transformers")

    def attention(factor):
        def mine(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kw):
            return ((query @ key.transpose(2, 3) * factor).softmax(-1) @ value).transpose(1, 2).contiguous(), None

        return mine

    found = []
    for factor in (0.5, 3.0):
        transformers.AttentionInterface.register("mine", attention(factor))
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
        )
        model = transformers.BertModel(config).eval()
        model.set_attn_implementation("mine")
        found.append(read(model).digest)
    assert found[0] != found[1]


def test_a_vision_transformer_of_timm_is_read():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224").eval()
    program = read(model)
    assert program.problem is None
    assert {id(tensor) for tensor in model.parameters()} <= {id(tensor) for tensor in program.tensors}
    model(torch.zeros(1, 3, 224, 224))
    assert program.unchanged()
    model.blocks[3].attn.scale = 1.0
    assert not program.unchanged()
    assert program.changes() == ["blocks.3.attn.scale"]


# Properties.

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3) | st.tuples(inner, inner)
    ),
    max_leaves=6,
)


def exact(value):
    """A value with its types and the order of its entries."""
    if isinstance(value, dict):
        return "dict", tuple((key, exact(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(exact, value))
    return type(value).__name__, repr(value)


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES)
def test_digests_are_equal_exactly_where_values_are(one, other):
    def forward(self, x):
        return x, self.value

    digests = [read(module_of(forward, value=value)).digest for value in (one, copy.deepcopy(one), other)]
    assert digests[0] == digests[1]
    assert (digests[0] == digests[2]) == (exact(one) == exact(other))


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES)
def test_a_replaced_value_is_seen_exactly_where_it_differs(one, other):
    module = module_of(lambda self, x: (x, self.value), value=one)
    program = read(module)
    module.value = other
    if exact(one) != exact(other):
        assert not program.unchanged()
    module.value = one
    assert program.unchanged()


# What a forward writes.


class Noting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(2, 2)])
        self.calls, self.maps, self.log = 0, None, []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, what):
        if what == "calls":
            self.calls += 1
        elif what == "maps":
            self.maps = x
        elif what == "log":
            self.log.append(1)
        elif what == "seen":
            self.seen += 1
        elif what == "inner.0.note":
            self.inner[0].note = 1
        return x


@pytest.mark.parametrize("what", ["calls", "maps", "log", "seen", "inner.0.note", "nothing"])
def test_what_a_forward_writes_is_named(what):
    module = Noting()
    written = Written(module)
    module._torchcache_note = 1
    module(torch.ones(2), what)
    assert written.changes() == ([] if what == "nothing" else [what])


def test_what_a_pure_mark_writes_is_no_part_of_its_identity():
    def forward(self, x):
        self.calls += 1
        LOG.append(x.shape)
        return self.layer(x) * self.scale

    module = module_of(forward, calls=0, scale=1.0)
    program = Program((module, type(module).forward), "net", pure=True)
    module(torch.ones(1, 4))
    assert program.unchanged()
    assert Program((module, type(module).forward), "net", pure=True).digest == program.digest
    assert read(module).digest != program.digest
    plain = read(module)
    module(torch.ones(1, 4))
    assert plain.changes() == ["calls", "the global LOG"]


def test_what_libraries_wrap_for_themselves_is_no_part(monkeypatch):
    """Lightning puts its own ``torch.compile`` there as soon as it is imported."""

    def digest():
        torch.manual_seed(0)
        return Program((nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Sequential.forward), "").digest

    before, compiler = digest(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiler(*args, **kwargs))
    assert digest() == before
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: None)
    assert digest() != before


@pytest.mark.parametrize("draw", [random.random, np.random.rand, torch.rand])
def test_draws_of_others_from_the_generators_of_the_process_change_nothing(draw):
    class Perhaps(nn.Module):
        """Code that may draw from each of them."""

        chance = 0.0

        def forward(self, x):
            if self.chance:
                return x * random.random() * np.random.rand() * torch.rand((), generator=torch.default_generator)
            return x + 1

    model, x = torchcache.mark(Perhaps()), torch.randn(3, 2)
    for _ in range(4):
        draw(*([2] if draw is torch.rand else []))
        model(x)
    assert torchcache.stats(model).hits == 9
