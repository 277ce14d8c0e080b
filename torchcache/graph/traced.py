"""A partly trainable mark that is called directly: traced, its frozen part looked up and the rest run eagerly."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from torchcache.batch import Given
from torchcache.call import Region
from torchcache.dynamo import (
    compile_with,
    constant,
    fix_rows,
    forget_originals,
    guard,
    has_global_hooks,
    takes_rows,
    tracing_failed,
    vary_rows,
)
from torchcache.errors import Bypass, Trains
from torchcache.graph.parts import KEY
from torchcache.graph.rewrite import Outcome, cache_regions
from torchcache.mark import Mark, and_then
from torchcache.op import subject_name

UNTRACED = (
    "Dynamo runs no trace of it: it leaves its code alone, or models of its classes took all traces that there may be",
    "call torch.compiler.reset() between models, or mark a part that Dynamo traces",
)
# A mark whose program changes more often than this is not traced for each change.
MOST_PROGRAMS = 8


class Traced:
    """The original of a partly trainable mark, traced once for each program that it has.

    Traced for any number of rows, and again when Dynamo's guards say so. Where Dynamo fails, or finds nothing to look
    up, the original is computed, with a reason.

    Parameters
    ----------
    mark : Mark
        The mark.
    module : nn.Module
        The marked module, which it does not keep alive.
    region : Region
        Its region, which owns this.
    """

    def __init__(self, mark: Mark, module: nn.Module, region: Region) -> None:
        self.graphs: list[fx.GraphModule] = []
        self._mark = mark
        self._module = weakref.ref(module)
        self._owner = weakref.ref(region)
        self._subject = subject_name(mark, module)
        self._programs: dict[bytes, Callable[..., Any]] = {}
        self._failed: Bypass | None = None
        self._outcome = Outcome()

    @property
    def _region(self) -> Region:
        region = self._owner()
        assert region is not None
        return region

    def __call__(self, given: Given, trains: Trains) -> Any:
        """What the original returns; computed for ``trains`` where nothing in it is frozen."""
        module = self._module()
        assert module is not None
        if self._failed is not None:
            return self._region.compute(given, self._failed)
        if all(parameter.requires_grad for parameter in module.parameters()):
            return self._region.compute(given, trains)
        try:
            return self._run(self._compiled(module), module, given)
        except Bypass as bypass:
            return self._region.compute(given, bypass)
        except Exception as error:
            why = tracing_failed(error)
            if why is None:
                raise
            self._failed = Bypass(f"its frozen part cannot be traced ({why})", "mark a part that is frozen as a whole")
            return self._region.compute(given, self._failed)
        finally:
            fix_rows()

    def _run(self, compiled: Callable[..., Any], module: nn.Module, given: Given) -> Any:
        """The call, counted as computed where nothing in it is looked up."""
        before, outer = self._lookups(), _running.call
        call = _running.call = _Call(self)
        try:
            outputs = compiled(module, *given.args, **given.kwargs)
        finally:
            _running.call = outer
        if self._lookups() == before:
            reasons = self._outcome.reasons or ["it has no frozen part that gives rows"]
            bypass = Bypass(f"it trains, and {reasons[0]}", quiet=True)
            self._region.count(given, bypass if call.graphs else Bypass(*UNTRACED))
        return outputs

    def _lookups(self) -> int:
        return sum(regions.calls for regions in self._outcome.regions)

    def _compiled(self, module: nn.Module) -> Callable[..., Any]:
        """The trace for the program as it is."""
        if has_global_hooks():
            raise Bypass("hooks run with every module, and a trace does not call them", quiet=True)
        program = self._region.subject.identity.program()
        compiled = self._programs.get(program.digest)
        if compiled is None:
            if len(self._programs) >= MOST_PROGRAMS:
                raise Bypass("its program keeps changing", "mark a part that keeps no state")
            function = traceable(self._mark, module)
            compiled = self._programs[program.digest] = compile_with(function, _backend_of(self))
        return compiled

    def cache(self, graph: fx.GraphModule) -> Callable[..., Any]:
        """A graph of Dynamo's, with its frozen part looked up."""
        for node in graph.graph.nodes:
            if node.op not in ("placeholder", "output"):  # marks inside it have named theirs
                node.meta.setdefault("custom", {}).setdefault(KEY, self._subject)
        found = cache_regions(graph)
        self._outcome.regions += [regions for regions in found.regions if regions not in self._outcome.regions]
        self._outcome.reasons = found.reasons
        self.graphs.append(graph)

        def run(*args: Any) -> Any:
            if _running.call is not None:
                _running.call.graphs += 1
            return graph.forward(*args)

        return run


@dataclasses.dataclass
class _Call:
    """A call that runs, and how many of its graphs ran so far."""

    traced: Traced
    graphs: int = 0


class _Running(threading.local):
    """The call that runs on a thread."""

    call: _Call | None = None


_running = _Running()


def _backend_of(traced: Traced) -> Callable[..., Any]:
    """The backend for its traces. Dynamo keeps it with the code of modules, and is not to keep a module with it."""
    reference = weakref.ref(traced)

    @takes_rows
    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # Where there are many traces of one code, Dynamo runs any of them that fits, whoever had it made.
        guard(lambda: _running.call is not None and _running.call.traced is reference())
        here = reference()
        run = here.cache(graph) if here is not None else graph.forward
        forget_originals(graph.graph)
        return run

    return backend


def traceable(mark: Mark, module: nn.Module) -> Callable[..., Any]:
    """The original of ``mark``, taking its module first."""
    own, output = mark.own, mark.output
    original = mark.original(module) if own not in vars(module) else None

    def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _prepare_trace()
        if original is None:
            return and_then(getattr(module, own), output)(*args, **kwargs)
        return original(module, *args, **kwargs)

    return function


@constant
def _prepare_trace() -> None:
    vary_rows()


def traced_in(region: Region) -> list[fx.GraphModule]:
    """The rewritten graphs of a region that is partly trainable."""
    return region.partly.graphs if isinstance(region.partly, Traced) else []
