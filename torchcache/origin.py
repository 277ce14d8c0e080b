"""Whether the ids of a block name what a marked call is given."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchcache.context import number_of_call, was_there
from torchcache.lazy.tensor import LazyTensor

__all__ = ["number_named"]


def number_named(owner: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Which call of ``owner`` within a block with ids this is, from 1; 0 outside, and where ids do not name its input.

    They name what was there when the block began. What was computed since may be another for the same sample, where
    layers have changed.

    Parameters
    ----------
    owner : object
        The region.
    args, kwargs
        The arguments.
    """
    number = number_of_call(owner)
    if not number:
        return 0
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return number if all(type(leaf) is LazyTensor or was_there(leaf) for leaf in tensors) else 0
