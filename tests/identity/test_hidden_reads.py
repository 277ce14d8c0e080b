"""What a forward reads by functions under other names, from the environment, or from a configuration's objects."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
import subprocess
import sys
import zlib
from copy import deepcopy as clone
from dataclasses import asdict as to_dict
from operator import attrgetter as get_path
from pathlib import Path
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import torchcache

_get = getattr
ROOT = str(Path(__file__).parents[2])
DOORS = str(Path(__file__).parents[1] / "doors")


@dataclasses.dataclass
class Gains:
    gains: dict = dataclasses.field(default_factory=lambda: {"a": 1.0})


class Plain:
    factor = 1.0

    def __init__(self):
        self.level = 1.0


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.which, self.scale, self.gains = "li", 1.0, Gains()
        self.empty, self.name, self.ale = "", "lin", "ale"
        self.sc, self.plain = nn.Identity(), Plain()
        self.home = os.path.expanduser
        self.path = Path("~")
        self.space, self.kind, self.keys = "TC", "gain", ["TC", "GAIN"]


def child(module, name, get=getattr):
    return get(module, name)


def returned():
    return getattr


class Owner(Base):
    fetch = staticmethod(getattr)
    vars = staticmethod(vars)


def given():
    yield getattr


def later(module):
    name = "sc"
    for _ in range(2):
        found = getattr(module, name)
        name = module.which + "n"
    return found


def bound(module):
    name = "sc"

    def rename():
        nonlocal name
        name = module.which + "n"

    rename()
    return getattr(module, name)


def shown(module):
    get = getattr
    return locals()["g" + "et"]


def attributes(module):
    get = module.__getattr__
    return get


def weight(module):
    with torch.no_grad():
        module.lin.weight.mul_(2)


def scale(module):
    module.scale = 3.0


def level(module):
    module.plain.level = 3.0


def gains(module):
    module.gains.gains["a"] = 3.0


def factor(_):
    Plain.factor = 3.0


@pytest.fixture(autouse=True)
def _as_before():
    yield
    Plain.factor = 1.0


READS = {
    "a global": (lambda s, x: _get(s, s.which + "n")(x), weight),
    "an import": (lambda s, x: x @ get_path(s.which + "n.weight")(s).T, weight),
    "a default": (lambda s, x: child(s, s.which + "n")(x), weight),
    "a class": (lambda s, x: s.fetch(s, s.which + "n")(x), weight),
    "a list": (lambda s, x: [getattr, setattr][0](s, s.which + "n")(x), weight),
    "a result": (lambda s, x: returned()(s, s.which + "n")(x), weight),
    "a generator": (lambda s, x: next(given())(s, s.which + "n")(x), weight),
    "a condition": (lambda s, x: (getattr if s.which else None)(s, s.which + "n")(x), weight),
    "a comprehension": (lambda s, x: [getattr for _ in range(2)][1](s, s.which + "n")(x), weight),
    "a display": (lambda s, x: {"a": getattr, "b": 1}["a"](s, s.which + "n")(x), weight),
    "a name twice": (lambda s, x: s.lin(x) * s.vars(s.plain)["lev" + "el"], level),
    "a bound method": (lambda s, x: attributes(s)(s.which + "n")(x), weight),
    "called as such": (lambda s, x: getattr.__call__(s, s.which + "n")(x), weight),
    "one of two names": (lambda s, x: getattr(s, s.name or "sc")(x), weight),
    "one of three names": (lambda s, x: getattr(s, "x" if s.empty else s.name if s.name else "y")(x), weight),
    "a name assigned later": (lambda s, x: later(s)(x), weight),
    "a name assigned within": (lambda s, x: bound(s)(x), weight),
    "all variables": (lambda s, x: s.lin(x) * shown(s)(s, "sc" + s.ale), scale),
    "a namespace by name": (lambda s, x: s.lin(x) * getattr(s.plain, "__dict__")["lev" + "el"], level),  # noqa: B009
    "a state": (lambda s, x: s.lin(x) * s.plain.__reduce_ex__(2)[2]["lev" + "el"], level),
    "members of a class": (lambda s, x: s.lin(x) * vars(Plain)["fac" + "tor"], factor),
    "a format": (lambda s, x: s.lin(x) * float(str.format("{0." + "sc" + "ale}", s)), scale),
    "statically": (lambda s, x: s.lin(x) * inspect.getattr_static(s, "sc" + "ale"), scale),
    "as a dict": (lambda s, x: s.lin(x) * to_dict(s.gains)["ga" + "ins"]["a"], gains),
    "as a copy": (lambda s, x: s.lin(x) * clone(s.gains).gains["a"], gains),
}


def agrees_after(module, change):
    """Whether a change shows at the next call; nothing that is computed is compared before."""
    torchcache.mark(module.eval(), freeze=True, audit=0.0)
    x = torch.randn(8, 6)
    for _ in range(6):
        module(x)
    change(module)
    found = module(x)
    with torchcache.bypass():
        return torch.allclose(found, module(x), atol=1e-5)


@pytest.mark.parametrize("how", READS)
def test_a_function_that_reads_by_name_counts_under_any_name(how):
    forward, change = READS[how]
    # Where a getter is among its attributes, all of an object may be read.
    base = Owner if how in ("a class", "a name twice") else Base
    assert agrees_after(type("Reads", (base,), {"forward": forward})(), change)


def value(text):
    return float(text or 1)


KEY, KEYS = "tc-gain", ["TC_GAIN"]


def named(module):
    for key in ("tc gain", module.space + "_GAIN"):
        value = os.environ.get(key)
    return value


ENVIRONMENT = {
    "no identifier": lambda s, x: x * value(os.environ.get("tc-gain")),  # noqa: SIM112
    "no identifier, by a global": lambda s, x: x * value(os.getenv(KEY)),
    "no identifier, looked for": lambda s, x: x * (3 if "tc-gain" in os.environ else 1),
    "no identifier, by a variable": lambda s, x, key="": (key := "tc-gain") and x * value(os.environ.get(key)),
    "a home": lambda s, x: x * len(os.path.expanduser("~")),
    "a home, by a class": lambda s, x: x * len(str(Path.home())),
    "a home, by a path": lambda s, x: x * len(str(s.path.expanduser())),
    "a home, by an attribute": lambda s, x: x * len(s.home("~")),
    "a namespace": lambda s, x: x * value(vars(os)["env" + "iron"].get(f"{s.space}_GAIN")),
    "a search": lambda s, x: x * len(shutil.which("ls") or "?"),
    "a method": lambda s, x, get=None: (get := os.environ.get) and x * value(get(s.space + "_GAIN")),
    "by keywords": lambda s, x: x * value(os.getenv(default="1", key=s.space + "_GAIN")),
    "one of two": lambda s, x: x * (3 if (s.space + "_GAIN" if s.space else "A") in os.environ else 1),
    "a loop": lambda s, x: x * value(named(s)),
    "format": lambda s, x: x * value(os.environ.get("TC_{}".format(s.kind.upper()))),  # noqa: UP032
    "modulo": lambda s, x: x * value(os.environ.get("TC_%s" % s.kind.upper())),  # noqa: UP031
    "text": lambda s, x: x * value(os.environ.get(f"{s.space}_{s.keys[1]}")),
    "join": lambda s, x: x * value(os.getenv("_".join(s.keys))),
    "upper": lambda s, x: x * value(os.environ.get("tc_gain".upper())),
    "items": lambda s, x: x * value(next((v for k, v in os.environ.items() if k.startswith("TC_")), None)),
    "subscript": lambda s, x: x * value(os.environ["TC_" + "GAIN"[: len(s.kind)]] if len(os.environ) else None),
    "within": lambda s, x: x * (3 if "TC_" + s.kind.upper() in os.environ else 1),
    "expanded": lambda s, x: x * len(os.path.expandvars("$TC_GAIN")),
    "bytes": lambda s, x: x * value(os.getenvb(b"TC_GAIN")),
    "passed on": lambda s, x: x * value(next(iter(map(os.getenv, [f"{s.space}_GAIN"])))),
}


@pytest.mark.parametrize("how", ENVIRONMENT)
def test_an_environment_variable_counts_however_it_is_named(how, monkeypatch):
    monkeypatch.setenv("TC_GAIN", "2") if how == "subscript" else monkeypatch.delenv("TC_GAIN", raising=False)
    module = type("Reads", (Base,), {"forward": ENVIRONMENT[how]})()
    changed = {"a home": "HOME", "no identifier": "tc-gain", "a search": "PATH"}
    name = changed.get(how.partition(",")[0], "TC_GAIN")
    assert agrees_after(module, lambda _: monkeypatch.setenv(name, "3"))


def test_a_variable_that_is_named_is_the_only_one_that_counts(monkeypatch):
    class Reads(Base):
        def forward(self, x):
            home = len(os.path.expanduser("~"))
            return self.lin(x) * home * float(os.environ.get("TC_NAMED", "1")) * ("tc-other" in os.environ)

    module = torchcache.mark(Reads().eval(), freeze=True, audit=0.0)
    x = torch.randn(8, 6)
    for _ in range(3):
        module(x)
        monkeypatch.setenv("TC_OTHER", str(torch.rand(1).item()))
    assert torchcache.stats(module).misses == 8


class Gain:
    def __init__(self, gain):
        self.gain = gain

    def __call__(self, x):
        return x * self.gain


@dataclasses.dataclass
class Tanh:
    k: float = 1.0


@dataclasses.dataclass
class Relu:
    k: float = 1.0


class Configured(Base):
    def __init__(self, config):
        super().__init__()
        self.config = config


class Calls(Configured):
    def forward(self, x):
        return self.config.act(self.lin(x))


class Typed(Configured):
    def forward(self, x):
        return torch.tanh(self.lin(x)) if OmegaConf.get_type(self.config) is Tanh else torch.relu(self.lin(x))


def test_objects_and_classes_in_a_configuration_count():
    gain = Gain(1.0)
    module = Calls(OmegaConf.create({"act": gain}, flags={"allow_objects": True}))
    assert agrees_after(module, lambda _: setattr(gain, "gain", 3.0))
    assert agrees_after(
        Typed(OmegaConf.structured(Tanh)), lambda module: setattr(module, "config", OmegaConf.structured(Relu))
    )


KERNEL = """
import torch
library = torch.library.Library("tc_early", "FRAGMENT")
library.define("scaled(Tensor x) -> Tensor")
gain = [1.0]
library.impl("scaled", lambda x: x * gain[0], "CPU")
import torchcache
from torch import nn
class Early(nn.Module):
    def forward(self, x):
        return torch.ops.tc_early.scaled(x)
module = torchcache.mark(Early(), freeze=True, audit=0.0)
x = torch.randn(8, 4)
for _ in range(4):
    module(x)
gain[0] = 3.0
assert torch.equal(module(x), x * 3), "stale"
assert "before torchcache was imported" in str(torchcache.stats(module).regions[0].reasons), torchcache.stats(module)
"""


GLOBALS = """
import builtins, importlib, pkgutil, pydoc, sys, torch, torchcache
from torch import nn
FACTOR, run = 1.0, eval
class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.name, self.where, self.factor = "FACT", "__main__", 1.0
def helper():
    pass
FORWARDS = {
    "in a function": lambda s, x: x * helper.__globals__[s.name + "OR"],
    "in this module": lambda s, x: x * sys.modules[__name__].__dict__[s.name + "OR"],
    "in a module by a name": lambda s, x: x * importlib.import_module(s.where).FACTOR,
    "in a module by a path": lambda s, x: x * pydoc.locate(s.where + ".FACTOR"),
    "in a module by a path of two parts": lambda s, x: x * pkgutil.resolve_name(s.where + ":FACTOR"),
    "in one of many modules": lambda s, x: x * sys.modules[s.where].FACTOR,
    "in one of all modules": lambda s, x: x * [m for n, m in sys.modules.items() if n == s.where][0].FACTOR,
    "by code under another name": lambda s, x: x * run("FACT" + "OR"),
    "by code from a namespace": lambda s, x: x * vars(builtins)["ev" + "al"]("FACT" + "OR"),
    "by a function from a namespace": lambda s, x: x * vars(builtins)["get" + "attr"](s, "fact" + "or"),
}
x = torch.randn(8, 4)
for name, forward in FORWARDS.items():
    FACTOR = 1.0
    module = torchcache.mark(type("Reads", (Reads,), {"forward": forward})(), freeze=True, audit=0.0)
    for _ in range(5):
        module(x)
    FACTOR = module.factor = 3.0
    assert torch.equal(module(x), x * 3), name
"""


IMPORTED = """
import importlib, packed, sys, torch, torchcache
from torch import nn
NAME, PART = "some" + "where_beside", "ACT"
class Reads(nn.Module):
    def forward(self, x):
        return %s(x)
x = torch.linspace(-1, 1, 32).view(8, 4)
module = torchcache.mark(Reads(), freeze=True, audit=0.0, persistent=True, persistent_cache_dir="rows")
for given in (x, x, x, x, x + 100, x + 100):  # those that are served first are compared
    assert torch.equal(module(given), Reads()(given))
torchcache.flush()
print(torchcache.stats(module).hits)
"""
PACKED = """
import importlib
def __getattr__(name):
    return getattr(importlib.import_module("somewhere_beside"), name)
"""
BY_NAME = {
    "what a package gives": "packed.ACT",
    "a global": "getattr(importlib.import_module(NAME), PART)",
    "a global of another": "importlib.import_module(NAME).ACT",
}


@pytest.mark.parametrize("how", BY_NAME)
def test_what_forward_imports_first_is_compared_between_runs(how, tmp_path):
    served = []
    (tmp_path / "packed.py").write_text(PACKED)
    for code in ("x", "x", "torch.where(x > 50, x * 5, x)"):
        (tmp_path / "somewhere_beside.py").write_text(f"import torch\ndef ACT(x):\n    return {code}\n")
        (tmp_path / "reading.py").write_text(IMPORTED % BY_NAME[how])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), ROOT])}
        run = [sys.executable, "-B", "reading.py"]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        served.append(int(done.stdout))
    assert served[1] > served[0] == served[2]


def test_globals_count_however_they_are_found():
    done = subprocess.run([sys.executable, "-c", GLOBALS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_kernel_from_before_the_import_is_computed_with_a_reason():
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Told(nn.Module):
    """Adds a number that depends on all that its table holds."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return x + zlib.crc32(repr(self.table).encode()) % 9973


TABLES = [
    ([("a", 1), ("b", 2)], [("a", 1), ("b", 3)]),
    ([("a", 1)], [("a", True)]),
    ([("a", 0.0)], [("a", -0.0)]),
    ([("a", b"b")], [("a", "b")]),
    ([((1, 2), 3)], [(1, (2, 3))]),
    ([((1, 2), 3)], [((1, 2, 3),)]),
    ([(1, 2), (3,)], [(1,), (2, 3)]),
    ([("a", "b")], [("ab", "")]),
    ([(None,)], [(...,)]),
    ([(1 << 70,)], [(1 << 71,)]),
    ({"a": ("b", 1)}, {"a": ("b", 2)}),
    ({"a": (1,), "b": (2,)}, {"b": (2,), "a": (1,)}),
    ({("a", 1): 2}, {("a", 2): 2}),
    ([("\ud800", 1)], [("\udfff", 1)]),
    ((("a", 1), ("b", 2)), (("a", 1), ("b", 3))),
]


@pytest.mark.parametrize(("one", "other"), TABLES)
def test_tables_of_files_and_labels_count_in_every_bit(one, other):
    module, x = torchcache.mark(Told(one)), torch.arange(8.0)[:, None]
    for table in (one, other, one):
        module.table = table
        assert torch.equal(module(x), Told(table)(x))
    again = torchcache.mark(Told([*other] if isinstance(other, list) else other))
    assert torch.equal(again(x), Told(other)(x))


def test_a_table_that_is_written_in_place_counts_at_once():
    table = [(f"file {index}", index) for index in range(5000)]
    module, x = torchcache.mark(Told(table)), torch.arange(8.0)[:, None]
    for index in (None, 0, 4321, 4999):
        if index is not None:
            table[index] = ("another", index)
        assert torch.equal(module(x), Told(table)(x))


def test_an_object_that_makes_up_what_is_read_of_it_is_computed():
    class Logs(nn.Module):
        def __init__(self):
            super().__init__()
            self.log = mock.MagicMock()

        def forward(self, x):
            self.log.info("called")
            return x * 2

    module, x = torchcache.mark(Logs()), torch.arange(8.0)[:, None]
    for calls in range(1, 4):
        assert torch.equal(module(x), x * 2)
        assert module.log.info.call_count == calls
    assert torchcache.stats(module).bypasses == 24


INSTALLED = """
import sys, torch, torchcache, installed_elsewhere
from torch import nn
class Reads(nn.Module):
    def forward(self, x):
        return x * sys.modules[self.where].FACTOR
FACTOR, module = 2.0, Reads()
module.where = "__main__"
torchcache.mark(module, freeze=True, audit=0.0)
x = torch.randn(8, 4)
assert all(torch.equal(module(x), x * 2) for _ in range(4))
assert torchcache.stats(module).hits == 24, torchcache.stats(module)
"""
# An extension of C makes modules that have no file; what they hold cannot be read.
EXTENSION = """
import sys, types, zlib
inner = types.ModuleType("installed_elsewhere.inner")
inner.unreadable = zlib.compressobj()
sys.modules["installed_elsewhere.inner"] = inner
unreadable = zlib.compressobj()
"""


@pytest.mark.parametrize("folder", ["site-packages", "chosen"])
def test_what_is_installed_is_not_among_the_modules_of_the_user(folder, tmp_path):
    place = tmp_path / folder
    package, listed = place / "installed_elsewhere", place / "installed_elsewhere-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(EXTENSION)
    listed.mkdir()
    (listed / "RECORD").write_text("installed_elsewhere/__init__.py,,\n")
    path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", ""), ROOT])
    run = [sys.executable, "-c", INSTALLED]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


class Configured(nn.Module):
    """Reads its settings by what OmegaConf gives for that."""

    def __init__(self, read):
        super().__init__()
        self.lin, self.config, self.read = nn.Linear(3, 3), OmegaConf.create({"gain": 2.0, "more": [1.0]}), read

    def forward(self, x):
        return self.lin(x) * self.read(self.config)


@pytest.mark.parametrize(
    "read",
    [
        lambda config: OmegaConf.select(config, "gain"),
        lambda config: OmegaConf.create({"gain": config.gain}).gain,
        lambda config: OmegaConf.merge(config, {"other": 1.0}).gain,
        lambda config: OmegaConf.to_container(config)["gain"],
    ],
)
def test_what_reads_a_configuration_may_use_functions_of_its_library(read):
    module, x = torchcache.mark(Configured(read), freeze=True, audit=0), torch.randn(5, 3)
    for _ in range(5):
        torch.testing.assert_close(module(x), module.lin(x) * 2)
    assert torchcache.stats(module).hits
    module.config.gain = 3.0
    torch.testing.assert_close(module(x), module.lin(x) * 3)
