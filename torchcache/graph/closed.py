"""Whether graph and state alone say what a region computes: it calls nothing but torch's own operators on tensors."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torchcache import dynamo
from torchcache.identity.homes import home_of
from torchcache.identity.program import Program

_NAMESPACES = frozenset({"aten", "prims"})
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, dynamo.FakeTensor})
_HOMES = ("torch", "torch.nn.functional", "torch._C._nn", "torch.special", "torch.linalg", "torch.fft")


def is_closed(graph: fx.Graph, data: Sequence[torch.Tensor]) -> bool:
    """Whether all that a graph calls is torch's, or Python's arithmetic, and is found there under its name.

    Parameters
    ----------
    graph : fx.Graph
        The graph.
    data : sequence of torch.Tensor
        Its data, as traced: other classes of tensors have code of their own run.
    """
    called = (node for node in graph.nodes if node.op not in ("placeholder", "output"))
    return are_plain(data) and all(node.op == "call_method" or _is_torchs(node) for node in called)


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are of torch's own classes, in which no code of others runs."""
    return _PLAIN.issuperset(map(type, tensors))


def of_torch() -> Program:
    """What was put into torch: patches, kernels, hooks of all modules. It is the whole program of a closed graph."""
    global _torch
    if _torch is None or not _torch.unchanged():
        _torch = Program(None, "torch")
    return _torch


_torch: Program | None = None


def _is_torchs(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, dynamo.OPERATORS):
        return str(target).partition(".")[0].partition("::")[0] in _NAMESPACES
    if node.op != "call_function" or type(target) not in (types.FunctionType, types.BuiltinFunctionType):
        return False
    home = home_of(target) if type(target) is types.FunctionType else str(target.__module__ or "torch")
    if home.partition(".")[0] not in ("torch", "_operator", "builtins", "math"):
        return False
    homes = [sys.modules[path] for path in (home, *_HOMES) if path in sys.modules]
    return any(vars(found).get(target.__name__) is target for found in homes)
