"""What a graph returns of a call: whether it can, and whether that looks as it was traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchcache import dynamo

_PASSED = (torch.Tensor, type(None), bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def not_passed(outputs: Any, given: Sequence[Any] | None) -> str:
    """Why a graph cannot return ``outputs``; empty where it can.

    Parameters
    ----------
    outputs : object
        What the original returned.
    given : sequence or None
        The leaves of its arguments, where sizes are traced as some that vary. What is said beside tensors and numbers
        may depend on them then, unless it was given.
    """
    inner = outputs if type(outputs) in (tuple, list) else [outputs]
    if not (all(isinstance(leaf, torch.Tensor) for leaf in inner) or dynamo.passes_structures()):
        return f"torch {torch.__version__} passes no more than tensors and tuples of them through a graph"
    for leaf in pytree.tree_leaves(outputs, is_leaf=lambda value: type(value) is torch.Size):
        if isinstance(leaf, nn.Parameter):
            return "its output holds a Parameter, and what an operator returns is none"
        if isinstance(leaf, _PASSED):
            continue
        known = given is None or any(type(one) is type(leaf) and one == leaf for one in given)
        if type(leaf) is torch.Size or not known:
            return "its output says more than numbers, which may depend on sizes"
    return ""


def looks_so(leaf: torch.Tensor, traced: tuple[torch.dtype, list[int | None]]) -> bool:
    """Whether an output has the dtype and, where they are fixed, the sizes that it was traced with."""
    dtype, sizes = traced
    if leaf.dtype != dtype or leaf.ndim != len(sizes):
        return False
    return all(known is None or size == known for size, known in zip(leaf.shape, sizes, strict=True))
