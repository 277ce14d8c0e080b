"""``nn.Module``s and tensors of a program as nodes."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from torchcache.identity.exchange import is_sharded
from torchcache.identity.homes import beneath_class, is_class, named_class
from torchcache.identity.libraries import only_checks
from torchcache.identity.node import Check, Node, Space
from torchcache.identity.objects import NOTES, is_noted, member_space, names_of_class, slots_of
from torchcache.identity.per_class import once_per_class

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

# What every module keeps for itself: described apart below, or without a say in what forward computes.
KEPT = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
# Where a module keeps what it holds, and what that is.
GROUPS = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "child"}
# Names by which a whole tree of modules is read at once, and Python modules whose functions do.
TREE = frozenset(
    "parameters named_parameters buffers named_buffers children named_children modules named_modules state_dict "
    "_parameters _buffers _modules get_submodule get_parameter get_buffer named_members apply".split()
)
TREE_HOMES = ("torch.func", "torch._functorch", "torch.nn.utils", "torch.export", "torch.fx", "torch.jit")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
_FUNCTIONS = (types.FunctionType, types.MethodType)


def backward_hooks(module: nn.Module) -> tuple[int, ...]:
    """The numbers of the hooks that run with the backward of any part of a module: torch gives no number twice."""
    return tuple([number for part in module.modules() for group in _BACKWARD_HOOKS for number in vars(part)[group]])


class GlobalHooks:
    """The hooks that run with every module's forward, as one value of a program."""


def describe_module(value: nn.Module, hooked: bool = True) -> Node:
    """The node of a module; its hooks always belong to it if it is ``hooked``, all else where its name is read."""
    members = vars(value)
    kind = beneath_class(type(value))
    node = Node(value, ("nn.Module",), [("", kind)], kind="module")
    node.checks += [Check("kind", value), Check("members", value)]
    if isinstance(value, torch.jit.ScriptModule):
        node.problem = "is compiled by TorchScript and cannot be read"
        return node
    node.problem = getattr(kind, "torchcache_problem", "")
    if slots := _slots(kind):
        node.problem = f"keeps {slots[0]} in __slots__, and not where modules keep attributes"
    if is_sharded(value):
        node.problem = "is sharded: each process has a part of its weights"
        return node
    leave = KEPT | NOTES if is_noted(kind) else KEPT
    node.spaces.append(member_space("attribute", members, leave))
    for group, kind_of in GROUPS.items():
        live = members.get(group)
        if live is not None:
            node.spaces.append(member_space(kind_of, live, ordered=kind_of == "child"))
    node.names, node.whole = names_of_class(kind)
    if not hooked:
        return node
    # They are given the module, and torch's own read what they were told to: weight_g, weight_mask.
    hooks = [hook for group in _HOOKS for hook in (members.get(group) or {}).values()]
    node.whole |= any(named_class(type(hook)) for hook in hooks if not isinstance(hook, _FUNCTIONS))
    for group in _HOOKS:
        _hooks(node, members.get(group) or {}, members.get(f"{group}_with_kwargs") or {}, group)
        if members.get(group) is not None:
            node.checks.append(Check("mapping", members[group]))
    return node


@once_per_class
def _slots(kind: type) -> list[str]:
    """The names of attributes that are in slots."""
    return [name for name, _ in slots_of(kind)]


def describe_hooks(value: type[GlobalHooks]) -> Node:
    """The node of the hooks that torch runs with every module."""
    node = Node(value, ("hooks",))
    for group in _HOOKS:
        hooks = getattr(torch_module, f"_global{group}", {})
        _hooks(node, hooks, getattr(torch_module, f"_global{group}_with_kwargs", {}), f"_global{group}")
        node.checks.append(Check("mapping", hooks))
    return node


def _hooks(node: Node, hooks: Mapping[int, Any], with_keywords: Mapping[int, bool], group: str) -> None:
    for number, hook in hooks.items():
        if only_checks(hook):
            continue
        node.head += (f"{group} with keywords" if number in with_keywords else group,)
        node.parts.append((f".{group}[...]", hook))


def describe_tensor(value: torch.Tensor) -> Node:
    """The node of a tensor: its class, and its own attributes where their names are read; no contents."""
    node = Node(value, ("tensor",), kind="tensor")
    if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        node.problem = "is not initialised yet: run one batch through the module first"
        return node
    if type(value) not in (torch.Tensor, nn.Parameter):
        node.parts.append(("", type(value)))
        node.whole = not named_class(type(value))
    node.checks.append(Check("kind", value))
    members = vars(value)
    if members:
        node.spaces.append(member_space("attribute", members, NOTES))
    else:
        node.spaces.append(Space("attribute", members, {}))
    return node


def is_module_class(value: Any) -> bool:
    """Whether a value is a class of modules: those that are stored somewhere are to be compared with, not called."""
    return is_class(value) and nn.Module in value.__mro__
