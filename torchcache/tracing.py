"""A callable traced through Dynamo, its marked regions cached and the rest run eagerly."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from torchcache.errors import TorchcacheError
from torchcache.graph.region import GraphRegion
from torchcache.graph.rewrite import cache_regions
from torchcache.logging import logger, warn_once

__all__ = ["Traced", "start_tracer", "trace_with"]

_numbers = itertools.count()


class Traced:
    """``function`` with its marked regions cached.

    Traced at its first call, with the first dimension of every tensor argument symbolic, and again when
    Dynamo's guards say so. Where Dynamo fails, ``function`` runs as it is, and marked modules are cached eagerly.

    Parameters
    ----------
    function : callable
        What to trace.
    name : str
        For messages.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.regions: list[GraphRegion] = []
        self._function = function
        self._name = name
        self._compiled: Callable[..., Any] | None = None
        self._broken = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``function`` returns."""
        if self._broken:
            return self._function(*args, **kwargs)
        if self._compiled is None:
            self._compiled = trace_with(self._function, self._backend)
        from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError

        try:
            return self._compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            cause = error.inner_exception
            if isinstance(cause, TorchcacheError):
                raise cause from None
            self._give_up(cause)
        except InternalTorchDynamoError as error:
            self._give_up(error)
        return self._function(*args, **kwargs)

    def _backend(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.regions.extend(cache_regions(module))
        self.graphs.append(module)
        return module.forward

    def _give_up(self, error: BaseException) -> None:
        self._broken = True
        warn_once(f"{self._name} cannot be traced ({type(error).__name__}); its marked modules are cached one by one")
        logger.info("tracing %s failed: %s", self._name, error)


@functools.cache
def start_tracer() -> None:
    """Have Dynamo load what it loads at its first trace, once a process: first steps then pay for their own alone."""
    trace_with(lambda x: torch.relu(x) + 1, lambda module, example_inputs: module.forward)(torch.ones(2, 2))


def trace_with(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, its graphs handed to ``backend``, with the first dimension of every tensor argument symbolic."""
    compiled = torch.compile(_own_frame(function), backend=backend)

    def traced(*args: Any, **kwargs: Any) -> Any:
        _mark_batches((args, kwargs))
        return compiled(*args, **kwargs)

    return traced


def _own_frame(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``function`` and has a code object of its own, by which Dynamo keeps its caches."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = traced.__code__.replace(co_name=f"traced_{next(_numbers)}")
    return types.FunctionType(code, globals(), code.co_name, None, traced.__closure__)


def _mark_batches(value: Any) -> None:
    for tensor in _tensors(value):
        if tensor.ndim and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
