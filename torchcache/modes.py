"""Which parts of a marked module stay in eval mode: the subtrees that hold parameters, all of them frozen."""

from __future__ import annotations

from torch import nn

__all__ = ["is_frozen", "settle"]


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of ``module`` is trainable."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def settle(module: nn.Module) -> None:
    """Put ``module`` in eval mode if it is frozen, else those of its subtrees that hold frozen parameters only.

    A subtree without parameters, such as a dropout beside trainable layers, keeps its mode.
    """
    if is_frozen(module):
        for part in module.modules():
            if part.training:  # a write costs those who watch the module a closer look
                part.training = False
        return
    for child in module.children():
        if next(child.parameters(), None) is not None:
            settle(child)
