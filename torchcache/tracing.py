"""A callable traced through Dynamo, its marked regions cached and the rest run eagerly."""

from __future__ import annotations

import functools
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module

from torchcache.errors import TorchcacheError
from torchcache.graph.feed import feed_state
from torchcache.graph.marked import MarkedCall
from torchcache.graph.region import GraphRegion, program_now
from torchcache.graph.rewrite import cache_regions
from torchcache.graph.trust import Owned, trust_programs
from torchcache.logging import logger, warn_once
from torchcache.lookup.fingerprint import Program
from torchcache.lookup.stamps import Looks

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
        from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError, TorchRuntimeError

        try:
            return self._variant().compiled(*args, **kwargs)
        except TorchRuntimeError as error:  # it does not run on fake tensors of these shapes, such as an empty batch
            logger.info("tracing %s failed for one call: %s", self._name, error)
        except BackendCompilerFailed as error:
            cause = error.inner_exception
            if isinstance(cause, TorchcacheError):
                raise cause from None
            self._give_up(cause)
        except InternalTorchDynamoError as error:
            self._give_up(error)
        return self._function(*args, **kwargs)

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
        self.compiled = trace_with(function, self._backend)
        self._trusting = trusting
        self._regions: list[GraphRegion] = []  # the graphs refer to them by name only
        self._calls: dict[Any, MarkedCall] = {}
        self._programs: dict[Any, Program] = {}
        self._owned: list[Owned] = []
        self._state: list[torch.Tensor] = []
        self._looks = Looks(())
        self._module = weakref.ref(module) if module is not None else None
        self._note_hooks()

    def is_current(self) -> bool:
        """Whether tracing again would give the same."""
        if any(self._unhooked) or [*map(tuple, self._hooked)] != self._hooks:
            return False
        known = self._programs
        programs = {subject: program_now(call) for subject, call in self._calls.items()}
        if not all(map(operator.is_, programs.values(), known.values())):
            trusted = {call.subject for owned in self._owned for call in owned.region.plan.calls}
            if any(programs[subject].digest != known[subject].digest for subject in known) or not all(
                programs[subject].watched for subject in trusted
            ):
                return False
            self._use(programs)
        return self._looks.hold(self._state)

    def _backend(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        regions = cache_regions(graph)
        owned = trust_programs(graph, regions) if self._trusting else []
        self.graphs.append(graph)
        self._regions.extend(regions)
        self._owned.extend(owned)
        for call in itertools.chain.from_iterable(region.plan.calls for region in regions):
            if call.options.persistent_module_hash is None:
                self._calls.setdefault(call.subject, call)
        self._use({subject: program_now(call) for subject, call in self._calls.items()})
        self._looks = Looks(self._state)
        self._note_hooks()
        feed, run = feed_state(graph, regions), graph.forward

        def fed(*args: Any) -> Any:
            feed(args)
            return run(*args)

        return fed

    def _use(self, programs: dict[Any, Program]) -> None:
        self._programs = programs
        self._state = [tensor for owned in self._owned for tensor in owned.hand_over(programs)]

    def _note_hooks(self) -> None:
        """Remember the keys of all hooks that run with a forward; a key is never used twice."""
        module = self._module() if self._module is not None else None
        groups: list[Any] = [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
        for inner in module.modules() if module is not None else ():
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


def _own_frame(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``function`` and has a code object of its own, by which Dynamo keeps its caches."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = traced.__code__.replace(co_name=f"traced_{next(_numbers)}")
    return types.FunctionType(code, globals(), code.co_name, None, traced.__closure__)
