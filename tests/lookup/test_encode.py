"""Identity of programs: equal where they are equal, in every process; different where anything differs."""

import copy
import functools
import logging
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from torchcache.errors import FingerprintError
from torchcache.lookup.constants import constant_bytes
from torchcache.lookup.encode import Encoder

SCALE = 2


def helper(x):
    return x * SCALE


class Config:
    def __init__(self):
        self.sizes = [1, 2]
        self.names = {"b", "a", "c"}
        self.nested = {"x": {"y": (1, None, 2.5)}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.config = Config()
        self.activation = functools.partial(helper)
        self.dtype = torch.float32

    def forward(self, x):
        return self.activation(self.linear(x))


def digest(value):
    encoder = Encoder("value")
    encoder.value(value)
    return encoder.digest()


def test_copies_and_pickles_are_the_same_program():
    net = Net()
    assert digest(net) == digest(copy.deepcopy(net)) == digest(pickle.loads(pickle.dumps(net))) == digest(Net())


def test_every_process_computes_the_same_identity():
    script = "import test_encode as t; print(t.digest(t.Net()).hex())"
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.path.dirname(__file__)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_sharing_equal_values_makes_no_difference():
    pair = (1, 2)
    assert digest([pair, pair]) == digest([(1, 2), eval("(1, 2)")])


def test_any_difference_is_seen():
    def changed(change):
        net = Net()
        change(net)
        return digest(net)

    def rescaled(x):
        return x * 3

    changes = [
        lambda net: None,
        lambda net: setattr(net.config, "sizes", [1, 3]),
        lambda net: net.config.sizes.append(3),
        lambda net: net.config.names.add("d"),
        lambda net: net.config.nested["x"].update(y=(1, None, 2.50001)),
        lambda net: setattr(net, "activation", functools.partial(rescaled)),
        lambda net: setattr(net, "dtype", torch.float64),
        lambda net: setattr(net.linear, "extra", True),
        lambda net: setattr(net.linear, "training", False),
        lambda net: net.linear.register_forward_hook(lambda *args: None),
        lambda net: net.linear.register_forward_hook(lambda *args: args),
        lambda net: net.add_module("other", nn.ReLU()),
        lambda net: net.register_buffer("table", torch.zeros(2)),
        lambda net: setattr(net, "flag", 1),
        lambda net: setattr(net, "flag", 1.0),
        lambda net: setattr(net, "flag", "1"),
        lambda net: setattr(net, "flag", True),
    ]
    found = [changed(change) for change in changes]
    assert len(set(found)) == len(changes)


def test_code_is_followed_through_what_it_names():
    def build(scale=2, power=2, default=1):
        source = (
            f"SCALE = {scale}\n"
            "class Helper:\n"
            f"    def apply(self, x):\n        return x ** {power}\n"
            "def helper(x):\n    return Helper().apply(x) * SCALE\n"
            f"def features(x, k={default}):\n    return helper(x) + k\n"
        )
        scope = {}
        exec(source, scope)
        return digest(scope["features"])

    assert build() == build()
    assert len({build(), build(scale=3), build(power=3), build(default=2)}) == 4


def test_global_values_are_part_of_it(monkeypatch):
    before = digest(helper)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 5)
    assert digest(helper) != before


def test_cycles_loggers_locks_and_modules_are_no_obstacle():
    net = Net()
    net.config.owner = net
    net.config.log = logging.getLogger("x")
    net.config.lock = threading.Lock()
    net.config.library = os.path
    assert digest(net) == digest(net)


def test_what_has_no_identity_is_an_error_that_names_its_path():
    net = Net()
    net.config.stream = (number for number in range(3))
    with pytest.raises(FingerprintError, match=r"config\.stream.*generator"):
        digest(net)


def test_constants_differ_by_type_and_value():
    values = [
        None,
        0,
        1,
        1.0,
        True,
        False,
        "1",
        b"1",
        1j,
        torch.float32,
        torch.device("cpu"),
        slice(1),
        (1,),
        ((1,),),
        {},
    ]
    values += [{"a": 1}, {"a": 2}, {1}, frozenset(), "", -0.0, 0.0]
    assert len({constant_bytes(value) for value in values}) == len(values)
    assert constant_bytes({"a": 1, "b": 2}) == constant_bytes({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="object"):
        constant_bytes(object())


def test_packages_of_an_environment_beneath_count_as_installed(tmp_path):
    """As in a virtual environment that sees the packages of its system, torch often among them."""
    package = tmp_path / "site-packages" / "farpackage"
    package.mkdir(parents=True)
    held = 'import re\n__version__ = "1"\nPATTERN = re.compile("a")\ndef scale(x):\n    return PATTERN and 2 * x\n'
    (package / "__init__.py").write_text(held)
    script = (
        "import farpackage, torch, torchcache\n"
        "f = torchcache.torchcache(lambda x: farpackage.scale(x))\n"
        "f(torch.ones(2, 2)), f(torch.ones(2, 2))\n"
        "print(torchcache.stats(f).hits)"
    )
    paths = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
