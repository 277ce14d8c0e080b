"""What a call saves for backward, in a trial: not to be seen by hooks of the caller, which a checkpoint has, twice."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from torchcache.dynamo import hooks_of_saved


class Saved:
    """The tensors that a trace saves, which are hidden, and those that its code saves after it.

    A checkpoint around the call runs it again in backward, and compares what is saved then: a trace may run in the
    place of its code if it saves the same, in the same order.
    """

    def __init__(self) -> None:
        self._hooks = hooks_of_saved()
        self._trace: list[Any] = []
        self._code: list[Any] = []

    @property
    def alike(self) -> bool | None:
        """Whether both saved the same, as far as hooks can compare it; ``None`` where the caller has none."""
        return self._trace == self._code if self._hooks is not None else None

    def hide(self) -> contextlib.AbstractContextManager[Any]:
        """What is saved within this block is kept as it is, and noted."""
        return _hooks(lambda tensor: _noted(tensor, self._trace), lambda tensor: tensor)

    def show(self) -> contextlib.AbstractContextManager[Any]:
        """What is saved within this block is the caller's, and noted where the caller has hooks."""
        if self._hooks is None:
            return contextlib.nullcontext()
        pack, unpack = self._hooks
        return _hooks(lambda tensor: pack(_noted(tensor, self._code)), unpack)


def _hooks(pack: Any, unpack: Any) -> contextlib.AbstractContextManager[Any]:
    stack = contextlib.ExitStack()
    with contextlib.suppress(RuntimeError):  # functorch forbids such hooks, so there are none
        stack.enter_context(saved_tensors_hooks(pack, unpack))
    return stack


def _noted(tensor: torch.Tensor, where: list[Any]) -> torch.Tensor:
    where.append((tensor.shape, tensor.dtype, tensor.device))
    return tensor
