"""What an ``nn.Module`` consists of: its class, attributes, hooks, and where its tensors and submodules are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from torchcache.lookup.parts import NOTES, Describing, Parts, ignored

__all__ = ["parts_of_global_hooks", "parts_of_module"]

# What every module keeps for itself: described apart below, or without a say in what forward computes.
_KEPT = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def parts_of_module(module: nn.Module, encoder: Describing) -> Parts:
    """Parts of a module tree. Its tensors are parts without their contents."""
    members = vars(module)
    encoder.watch.kind(module)
    encoder.watch.namespace(members)
    yield "module"
    yield "", type(module)
    for name in sorted(members):
        if name in _KEPT or name in NOTES or ignored(name):
            continue
        value = members[name]
        if type(value).__module__.partition(".")[0] == "torchcache":
            value = _beneath(value)
            if value is None:
                continue
        yield f"attribute {name}"
        yield name, value
    for group in _HOOKS:
        yield from _hooks(members[group], members[f"{group}_with_kwargs"], group, encoder)
    for group in ("_parameters", "_buffers"):
        encoder.watch.namespace(members[group])
        for name, tensor in sorted(members[group].items()):
            yield f"{group} {name}"
            yield name, tensor
    encoder.watch.ordered(members["_modules"])
    for name, child in members["_modules"].items():
        yield f"child {name}"
        yield name, child


def parts_of_global_hooks(encoder: Describing) -> Parts:
    """Hooks that run with every module's forward."""
    for group in _HOOKS:
        group = f"_global{group}"
        marked = getattr(torch_module, f"{group}_with_kwargs", {})
        yield from _hooks(getattr(torch_module, group), marked, group, encoder)


def _hooks(
    hooks: Mapping[int, Callable[..., Any]], with_keywords: Mapping[int, bool], group: str, encoder: Describing
) -> Parts:
    encoder.watch.ordered(hooks)
    for number, hook in hooks.items():
        yield f"{group} with keywords" if number in with_keywords else group
        yield group, hook


def _beneath(value: Any) -> Any:
    """What a ``forward`` or ``train`` of ours on an instance stands before, if that was the instance's own."""
    while type(value).__module__.partition(".")[0] == "torchcache":
        value = getattr(value, "previous", None) or getattr(value, "inner", None)
    return value
