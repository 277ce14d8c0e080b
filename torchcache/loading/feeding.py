"""From a batch of a data loader to a call of a model: what is passed, and how."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from torchcache.errors import ArgumentError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Feeder:
    """Turns batches into arguments for ``model``, by the rule in ``warm``'s documentation.

    Parameters
    ----------
    model : callable
        A module or a function.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", repr(model))
        forward = model.forward if isinstance(model, nn.Module) else model
        parameters = list(inspect.signature(forward).parameters.values())
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        self._names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._required = sum(p.default is p.empty for p in positional)
        self._most = float("inf") if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)

    def __call__(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments for ``batch``.

        Raises
        ------
        ArgumentError
            When it is not clear which items of a tuple the model takes.
        """
        if isinstance(batch, Mapping):
            taken = {name: value for name, value in batch.items() if self._any_name or name in self._names}
            return ((), taken) if taken else ((batch,), {})
        if not isinstance(batch, (tuple, list)) or len(batch) <= max(self._required, 1):
            return as_given(batch)
        if self._required == self._most:
            return tuple(batch[: self._required]), {}
        raise ArgumentError(
            f"torchcache.warm: a batch has {len(batch)} items, and {self._name} takes {self._required} to "
            f"{self._most} of them: say which with batch_to_inputs=lambda batch: batch[:1]"
        )


def as_given(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` as arguments: a mapping by name, a tuple or list by position, anything else as the only one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor inside tuples, lists and dicts on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [moved(item, device) for item in value]
    return value
