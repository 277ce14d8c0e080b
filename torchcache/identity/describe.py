"""The node of an object of any kind: each kind has a file that describes it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from torchcache.identity.callables import describe_code
from torchcache.identity.homes import is_class
from torchcache.identity.libraries import imports_when_asked
from torchcache.identity.modules import GlobalHooks, describe_hooks, describe_module, describe_tensor
from torchcache.identity.node import Node
from torchcache.identity.switches import Switch, describe_switch
from torchcache.identity.values import describe_value

# Those of the process, which whoever draws moves on: what draws from them is not cached.
_GENERATORS = (*(getattr(draw, "__self__", None) for draw in (random.random, np.random.rand)), torch.default_generator)


def describe(value: Any, bare: int = 0) -> Node:
    """The node of an object that is no atom; of the module with the id ``bare`` hooks are no part."""
    if any(value is generator for generator in _GENERATORS):
        return Node(value, ("generator", type(value).__qualname__))
    if value is GlobalHooks:
        return describe_hooks(value)
    if type(value) is Switch:
        return describe_switch(value)
    if imports_when_asked(type(value)):
        return Node(value, parts=[("", type(value))])
    if is_class(value):
        return describe_code(value) or describe_value(value)
    if torch.Tensor in type(value).__mro__:
        return describe_tensor(value)
    if nn.Module in type(value).__mro__:
        return describe_module(value, hooked=id(value) != bare)
    return describe_code(value) or describe_value(value)
