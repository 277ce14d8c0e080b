"""Batches that their loader cannot write into: of memory that it gives away for good, or copied."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch.utils import data

from torchcache.errors import Bypass
from torchcache.lazy.tensor import LazyTensor
from torchcache.loading.fetch import is_default
from torchcache.loading.loader import DataLoader

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device})
_CONTAINERS = frozenset({list, tuple, dict, collections.OrderedDict, collections.defaultdict})
_PASSES = (data.DataLoader.__iter__, DataLoader.__iter__)
# A copy has gaps where the tensor has some, up to so many times the memory of its elements.
MOST_GAPS = 16


def gives_new_memory(loader: Any) -> bool:
    """Whether nobody writes into a batch that ``loader`` gave when it is asked for the next.

    A list runs no code, what comes from workers was made for this process, and PyTorch's ``default_collate`` makes new
    memory. Anything else may write over its batches, one or several later.
    """
    if type(loader) in (list, tuple):
        return True
    if not isinstance(loader, data.DataLoader) or type(loader).__iter__ not in _PASSES:
        return False
    return loader.num_workers > 0 or is_default(loader.collate_fn)


def owned(batch: Any, device: torch.device | None = None) -> Any:
    """A copy of ``batch`` that is like it in all but where it lies.

    Parameters
    ----------
    batch : object
        As a loader gave it.
    device : torch.device, optional
        Where it goes next: what is copied on the way there is not copied before.

    Raises
    ------
    Bypass
        For a batch with anything in it of which it is not known what belongs to it.
    """
    copies: dict[int, Any] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            if id(value) not in copies:
                copies[id(value)] = _copied(value, device)
            return copies[id(value)]
        if type(value) in _PLAIN or isinstance(value, np.generic):
            return value
        raise Bypass(_described(value))

    return mapped(batch, leaf, known_only=True)


def mapped(value: Any, leaf: Callable[[Any], Any], *, known_only: bool = False) -> Any:
    """``value`` with what ``leaf`` makes of all that is no container.

    With ``known_only`` a container that may hold more than its items is none.
    """
    if known_only and not _is_known(value):
        return leaf(value)
    if isinstance(value, MutableMapping) and type(value) is not dict:
        made = copy.copy(value)
        made.update({name: mapped(item, leaf, known_only=known_only) for name, item in value.items()})
        return made
    if isinstance(value, Mapping):
        return {name: mapped(item, leaf, known_only=known_only) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [mapped(item, leaf, known_only=known_only) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return leaf(value)


def _is_known(value: Any) -> bool:
    named = isinstance(value, tuple) and hasattr(value, "_fields") and not hasattr(value, "__dict__")
    return type(value) in _CONTAINERS or named or isinstance(value, collections.UserDict)


def _copied(value: Any, device: torch.device | None) -> Any:
    if type(value) is LazyTensor:
        return value.clone()
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.copy(order="K")
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.requires_grad or value.__dict__:
        raise Bypass(_described(value))
    pinned = value.is_cpu and value.is_pinned()
    if device is not None and device.type != "cpu" and value.is_cpu and not pinned:
        return value  # sent through memory of ours
    if value.is_quantized or value.is_conj() or value.is_neg():
        raise Bypass(_described(value))
    steps = [(size - 1, step) for size, step in zip(value.shape, value.stride(), strict=True) if size > 1]
    extent = 1 + sum(last * step for last, step in steps)
    if value.numel() and not (all(step for _, step in steps) and value.numel() <= extent <= MOST_GAPS * value.numel()):
        raise Bypass(f"a tensor of shape {tuple(value.shape)} with strides {value.stride()}")
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device, pin_memory=pinned)
    return made.copy_(value)


def _described(value: Any) -> str:
    kind = type(value)
    return f"an object of class {kind.__module__}.{kind.__qualname__}"
