"""Functions that TorchScript compiled count by their graphs."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchcache

CODE = """
import torch

@torch.jit.script
def inner(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by

@torch.jit.script
def outer(x: torch.Tensor, often: int) -> torch.Tensor:
    for _ in range(often):
        if often > 1:
            x = inner(x, 0.5) # where
    return x + 1

held = torch.arange(4.0)
traced = torch.jit.trace(lambda x: x * held, torch.ones(4))

@torch.jit.ignore
def in_python(x: torch.Tensor) -> torch.Tensor:
    return x * 3

@torch.jit.script
def ignoring(x: torch.Tensor) -> torch.Tensor:
    return in_python(x)

@torch.jit.script
def custom(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.torchcache_scripted.times(x)
"""

times = torch.library.Library("torchcache_scripted", "DEF")
times.define("times(Tensor x) -> Tensor")
times.impl("times", lambda x: x * 2, "CPU")


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any], *given: Any) -> None:
        super().__init__()
        self.function, self.given = function, given

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.given)


@pytest.fixture
def module(tmp_path: Path) -> Callable[[str], Any]:
    """A Python module of a text, in a file of its own."""

    def load(text: str) -> Any:
        file = tmp_path / f"module_{len(list(tmp_path.glob('*.py')))}.py"
        file.write_text(textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location("scripted_functions", file)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return load


def hits(directory: Path, x: torch.Tensor, function: Callable[..., Any], *given: Any) -> int:
    calls = torchcache.mark(Calls(function, *given), persistent=True, persistent_cache_dir=directory)
    for _ in range(2):
        torch.testing.assert_close(calls(x), function(x, *given), rtol=0, atol=0)
    torchcache.flush()
    stats = torchcache.stats(calls)
    assert stats.hits >= len(x), stats
    return stats.hits - len(x)


CHANGES = {
    "a constant": ("outer", (2,), "x + 1", "x + 2"),
    "a constant of a function that it calls": ("outer", (2,), "0.5", "0.25"),
    "a comparison": ("outer", (2,), "often > 1", "often > 2"),
    "a tensor": ("traced", (), "arange(4.0)", "arange(4.0) + 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_holds_counts_and_its_place_does_not(change, module, tmp_path):
    name, given, before, after = CHANGES[change]
    x = torch.randn(3, 4)
    assert hits(tmp_path, x, getattr(module(CODE), name), *given) == 0
    moved = module("# a line more\n" + CODE.replace("# where", ""))
    assert hits(tmp_path, x, getattr(moved, name), *given) == len(x)
    assert hits(tmp_path, x, getattr(module(CODE.replace(before, after)), name), *given) == 0


def test_kernels_of_operators_in_a_graph_count(module, tmp_path):
    x = torch.randn(3, 4)
    function = module(CODE).custom
    assert hits(tmp_path, x, function) == 0
    assert hits(tmp_path, x, function) == len(x)
    times.impl("times", lambda x: x * 3, "CPU", allow_override=True)
    assert hits(tmp_path, x, function) == 0


def test_python_in_a_graph_is_not_read(module):
    calls = torchcache.mark(Calls(module(CODE).ignoring))
    x = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(calls(x), x * 3)
    (reason,) = torchcache.stats(calls).regions[0].reasons
    assert "prim::PythonOp" in reason
    assert not torchcache.stats(calls).hits


class Scripted(nn.Module):
    """A layer beside one that TorchScript compiled."""

    def __init__(self, compile: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.linear, self.compiled = nn.Linear(4, 4), compile(nn.Sequential(nn.Linear(4, 4), nn.Dropout()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compiled(self.linear(x))


@pytest.mark.parametrize("door", ["call", "transform", "eager", "torchcache"])
@pytest.mark.parametrize("compile", [torch.jit.script, lambda part: torch.jit.trace(part.eval(), torch.ones(2, 4))])
def test_modules_that_torchscript_compiled_are_computed_with_a_reason(compile, door):
    marked = torchcache.mark(Scripted(compile), freeze=True)
    model = nn.Sequential(marked, nn.Linear(4, 2))
    run = torchcache.transform(model) if door == "transform" else model
    if door not in ("call", "transform"):
        run = torch.compile(model, backend=door)
    x = torch.randn(3, 4)
    for _ in range(3):
        torch.testing.assert_close(run(x), model[1](Scripted.forward(marked.eval(), x)))
    (reason,) = torchcache.stats(model).regions[0].reasons
    assert "TorchScript" in reason
