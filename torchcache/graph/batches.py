"""Symbolic batches from the first trace on: one graph serves any number of rows, hits and misses alike.

Dynamo traces the sizes of its first call as constants. Where a marked call is met, the first dimensions of the
tensors that the frame was given are marked as varying, and the frame is traced again from its start.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["make_symbolic", "unmark_batches"]

_WEAK = "_dynamo_weak_dynamic_indices"
_STATIC = "_dynamo_static_indices"
_marked = threading.local()


def make_symbolic(frame: Any) -> None:
    """Have the batch dimensions of the frame's tensors traced as symbols.

    Parameters
    ----------
    frame : InstructionTranslator
        Of a marked call.

    Raises
    ------
    torch._dynamo.exc.RestartAnalysis
        Where they were not; Dynamo then traces the frame again.
    """
    config = torch._dynamo.config
    if not (config.automatic_dynamic_shapes and config.assume_static_by_default):
        return  # torch.compile was told dynamic=False, or makes every size a symbol by itself
    given = {id(tensor): tensor for tensor in _tensors(list(frame.output.root_tx.f_locals.values()))}
    fixed = [tensor for tensor in given.values() if _is_fixed(tensor)]
    if not fixed:
        return
    for tensor in fixed:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    _marked.tensors = [*getattr(_marked, "tensors", ()), *fixed]
    from torch._dynamo.exc import RestartAnalysis

    raise RestartAnalysis(restart_reason="torchcache: the batch of a marked call varies")


def unmark_batches() -> None:
    """Take the marks back that a trace on this thread made: the tensors are the user's."""
    for tensor in vars(_marked).pop("tensors", ()):
        getattr(tensor, _WEAK).discard(0)


def _is_fixed(tensor: torch.Tensor) -> bool:
    # Dynamo makes graphs of their own for batches of one and of none.
    return (
        tensor.ndim > 0
        and tensor.shape[0] > 1
        and 0 not in getattr(tensor, _WEAK, ())
        and 0 not in getattr(tensor, _STATIC, ())
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if not isinstance(value, torch.nn.Parameter):
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
