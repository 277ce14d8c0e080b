"""What of a module trains, and whether a call of it is to go by what does not."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn

from torchcache.quantity import names_text

# What to do where something trains that is not to.
FREEZE = "freeze what is not to train with requires_grad_(False), or all with mark(module, freeze=True)"
_requires_grad = operator.attrgetter("requires_grad")


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of ``module`` is trainable."""
    return not any(map(_requires_grad, module.parameters()))


def part_with_weights(module: nn.Module) -> str:
    """The smallest part that holds all parameters of a module, as ``path (class)``; empty where that is the module."""
    path: list[str] = []
    part = module
    while next(part.parameters(recurse=False), None) is None:
        children = [
            (name, child) for name, child in part.named_children() if next(child.parameters(), None) is not None
        ]
        if len(children) != 1:
            break
        (name, part), *_ = children
        path.append(name)
    return f"{'.'.join(path)} ({type(part).__name__})" if path else ""


def frozen_parts(module: nn.Module, path: str = "") -> list[str]:
    """The paths of the largest parts of a module that have parameters, none of which is trainable."""
    found: list[str] = []
    for name, child in module.named_children():
        if next(child.parameters(), None) is not None:
            found += [path + name] if is_frozen(child) else frozen_parts(child, f"{path}{name}.")
    return found


def which_train(tensors: Sequence[torch.Tensor]) -> bytes:
    """One byte for each tensor: 1 where it is trainable."""
    return bytes(map(_requires_grad, tensors))


def trained(module: nn.Module | None) -> str:
    """The parameters of ``module`` that are trainable, for people."""
    found = [name for name, held in module.named_parameters() if held.requires_grad] if module is not None else []
    return names_text(found) or "a tensor that it reads"


def goes_by_parts(state: Sequence[torch.Tensor], *, partial: bool, unsteady: bool) -> bool:
    """Whether a call is to look up what is frozen of a module, and not the whole.

    Parameters
    ----------
    state : sequence of torch.Tensor
        What the module reads.
    partial : bool
        Whether that was done before.
    unsteady : bool
        Whether it can be done where nothing shows that the module trains, and the whole changed as if it did.
    """
    if partial and unsteady:  # without its adapters, a model is frozen for one call
        return True
    training = partial or torch.is_grad_enabled()
    if not (training or unsteady) or not any(map(_requires_grad, state)):
        return False
    # A copy with averaged weights trains in name only.
    return training or any(isinstance(tensor, nn.Parameter) and not tensor.requires_grad for tensor in state)
