"""A callable traced through Dynamo, its marked regions cached and the rest run eagerly."""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module

from torchcache.errors import TorchcacheError
from torchcache.graph.direct import run_eagerly
from torchcache.graph.marked import MarkedCall
from torchcache.graph.region import GraphRegion, program_now
from torchcache.graph.rewrite import cache_regions
from torchcache.graph.trust import Trust, trust_programs
from torchcache.logging import logger, warn_once

__all__ = ["Traced", "start_tracer", "trace_with"]

_numbers = itertools.count()

# A function whose program changes more often than this is not traced for each change.
VARIANTS = 16


class Traced:
    """``function`` with its marked regions cached.

    Traced at its first call, for any number of rows, and again when Dynamo's guards say so. What Dynamo does not guard
    is watched here: the programs of the marked calls (classes and functions patched, values equal but of another
    type) and the hooks of all modules. Where Dynamo fails, ``function`` runs as it is, and marked modules are cached
    eagerly.

    Parameters
    ----------
    function : callable
        What to trace.
    name : str
        For messages.
    module : nn.Module or None
        Whose hooks run within.
    """

    def __init__(self, function: Callable[..., Any], name: str, module: nn.Module | None) -> None:
        self._function = function
        self._name = name
        self._module = weakref.ref(module) if module is not None else None
        self._variants: list[_Variant] = []
        self._broken = False

    @property
    def graphs(self) -> list[fx.GraphModule]:
        """The rewritten graphs, one for each time the function was traced."""
        return [graph for variant in self._variants for graph in variant.graphs]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``function`` returns."""
        if self._broken:
            return self._function(*args, **kwargs)
        try:
            return self._variant().compiled(*args, **kwargs)
        except Exception as error:
            self._forgive(error)
        return self._function(*args, **kwargs)

    def _forgive(self, error: Exception) -> None:
        """Raise ``error`` again, unless it says that Dynamo cannot trace the function."""
        from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError, TorchRuntimeError

        if isinstance(error, TorchRuntimeError):  # for fake tensors of these shapes, such as an empty batch
            logger.info("tracing %s failed for one call: %s", self._name, error)
        elif isinstance(error, BackendCompilerFailed):
            cause = error.inner_exception
            if isinstance(cause, TorchcacheError):
                raise cause from None
            self._give_up(cause)
        elif isinstance(error, InternalTorchDynamoError):
            self._give_up(error)
        else:
            raise error

    def _variant(self) -> _Variant:
        """The trace that is right for the programs and hooks as they are now."""
        known = self._variants
        if not known or not (len(known) > VARIANTS or known[-1].is_current()):
            found = next((variant for variant in known if variant.is_current()), None)
            if found is None:
                module = self._module() if self._module is not None else None
                found = _Variant(self._function, module, trusting=len(known) < VARIANTS)
            else:
                known.remove(found)
            known.append(found)
            if len(known) > VARIANTS:
                warn_once(
                    f"{self._name} was traced {VARIANTS} times because its marked modules or its hooks keep changing; "
                    "from now on only what torch.compile guards is looked at"
                )
        return known[-1]

    def _give_up(self, error: BaseException) -> None:
        self._broken = True
        warn_once(f"{self._name} cannot be traced ({type(error).__name__}); its marked modules are cached one by one")
        logger.info("tracing %s failed: %s", self._name, error)


class _Variant:
    """One compiled form of a function, and what it was traced with.

    Parameters
    ----------
    function : callable
        What to trace.
    module : nn.Module or None
        Whose hooks run within.
    trusting : bool
        Whether what is in watched marks is not guarded.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module | None, trusting: bool) -> None:
        self.graphs: list[fx.GraphModule] = []
        own = _own_frame(function)
        self._code = own.__code__
        self.compiled = torch.compile(own, backend=self._backend)
        self._trusting = trusting
        self._regions: list[GraphRegion] = []  # the graphs refer to them by name only
        self._trusts: list[Trust] = []
        self._calls: dict[Any, MarkedCall] = {}
        self._digests: list[bytes] = []
        self._module = weakref.ref(module) if module is not None else None
        self._note_hooks()

    def is_current(self) -> bool:
        """Whether tracing again would give the same."""
        return (
            not any(self._unhooked)
            and [*map(tuple, self._hooked)] == self._hooks
            and [program_now(call).digest for call in self._calls.values()] == self._digests
            and all(trust.holds() for trust in self._trusts)
        )

    def _backend(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        regions = cache_regions(graph)
        trust = trust_programs(graph, regions, self._code) if self._trusting else None
        if trust is not None:
            self._trusts.append(trust)
        self.graphs.append(graph)
        self._regions.extend(regions)
        for call in itertools.chain.from_iterable(region.plan.calls for region in regions):
            if call.options.persistent_module_hash is None and (trust is None or call.subject not in trust.subjects):
                self._calls.setdefault(call.subject, call)
        self._digests = [program_now(call).digest for call in self._calls.values()]
        self._note_hooks()
        return run_eagerly(graph, regions)

    def _note_hooks(self) -> None:
        """Remember the keys of all hooks that run with a forward; a key is never used twice."""
        module = self._module() if self._module is not None else None
        groups: list[Any] = [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
        trusted = [call.subject_module for trust in self._trusts for call in trust.subjects.values()]
        watched = {inner for marked in trusted if marked is not None for inner in marked.modules()}
        for inner in module.modules() if module is not None else ():
            if inner not in watched:
                groups += (inner._forward_pre_hooks, inner._forward_hooks)
        self._unhooked = [group for group in groups if not group]
        self._hooked = [group for group in groups if group]
        self._hooks = [*map(tuple, self._hooked)]


@functools.cache
def start_tracer() -> None:
    """Have Dynamo load what it loads at its first trace, once a process: first steps then pay for their own alone."""
    trace_with(lambda x: torch.relu(x) + 1, lambda module, example_inputs: module.forward)(torch.ones(2, 2))


def trace_with(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, its graphs handed to ``backend``."""
    return torch.compile(_own_frame(function), backend=backend)


def _own_frame(function: Callable[..., Any]) -> types.FunctionType:
    """A function that calls ``function`` and has a code object of its own, by which Dynamo keeps its caches."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = traced.__code__.replace(co_name=f"traced_{next(_numbers)}")
    return types.FunctionType(code, globals(), code.co_name, None, traced.__closure__)
