"""A partly trainable mark that is called directly: traced, its frozen part looked up and the rest run eagerly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
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
    hooks_of_saved,
    log_of_fakes,
    no_mode,
    takes_rows,
    tracing_failed,
    vary_rows,
)
from torchcache.errors import Bypass, Trains, Unreadable
from torchcache.graph.checkpoints import bodies, run_as_code
from torchcache.graph.parts import KEY
from torchcache.graph.rewrite import Outcome, cache_regions
from torchcache.graph.trial import Trial
from torchcache.identity.modules import backward_hooks
from torchcache.logging import logger, warn_once
from torchcache.mark import Mark, and_then
from torchcache.modes import estimate, resume, tell_of_eval
from torchcache.op import subject_name
from torchcache.quantity import names_text
from torchcache.trainable import frozen_parts, which_train

UNTRACED = (
    "Dynamo runs no trace of it: it leaves its code alone, as an expression that calls a recurrent layer, or took as "
    "many traces of it as it may",
    "call such a layer in a statement of its own, raise torch._dynamo.config.recompile_limit, or ",
)
LEFT = "it trains, and Dynamo leaves what is frozen of it out of its graphs, as it does recurrent layers"
SAVES = (
    "a checkpoint around it, or other hooks of saved tensors, would see other tensors where Dynamo traces it",
    "checkpoint parts of it, or mark the frozen part alone",
)
RESTLESS = "its program, or what of it trains, keeps changing", "mark a part that keeps no state"
# Traces that are kept of one mark.
MOST_TRACES = 16
# Traces that are made on trust, which lasts as long as one of them runs for so many calls now and then.
MOST_TRUSTED = 8
ENOUGH_CALLS = 8
# Programs without a trace whose calls are counted.
MOST_WANTED = 4
# A trace is tried again after so many calls, then after so many times as many, and so on; not with ``audit=0``.
LATER = 8

# Seconds of tracing after which it is told of, and no more traces are made on trust.
LONG = 20.0

Key = tuple[bytes, bytes, bool, tuple[int, ...]]


class Traced:
    """The original of a partly trainable mark, traced once for each program that it has, and what of this trains.

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
        self._mark = mark
        self._module = weakref.ref(module)
        self._owner = weakref.ref(region)
        self._traces: OrderedDict[Key, _Trace] = OrderedDict()
        self._trusted = MOST_TRUSTED
        self._wanted: dict[Key, int] = {}
        self._failed: Bypass | None = None
        self._seconds = self._unpaid = 0.0

    @property
    def graphs(self) -> list[fx.GraphModule]:
        """The rewritten graphs of the traces that are kept."""
        return [graph for trace in list(self._traces.values()) for graph in trace.graphs]

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
        if torch.compiler.is_compiling():  # guards of one thread do not hold while another traces
            elsewhere = Bypass("another thread traces a model at this time", lasting=False, quiet=True)
            return self._region.compute(given, elsewhere)
        try:
            trace = self._trace(module)
            if trace.failed is not None:
                raise trace.failed
            hooked = hooks_of_saved() is not None
            if hooked and trace.alike is False:
                raise Bypass(*SAVES)
            return self._run(trace, module, given, hooked)
        except Bypass as bypass:
            why, failed = bypass, self._failed
            if isinstance(bypass, Unreadable):  # to read it anew takes long
                self._region.rest.begin_after_some(bypass)
        except Exception as error:
            what = tracing_failed(error)
            if what is None:
                raise
            why = failed = Bypass(f"its frozen part cannot be traced ({what})", "mark a part that is frozen as a whole")
        finally:
            fix_rows()
        outputs = self._region.compute(given, why)
        self._failed = failed  # where the code fails as well, that says nothing of its traces
        return outputs

    def _run(self, trace: _Trace, module: nn.Module, given: Given, hooked: bool) -> Any:
        """The call, counted as computed where nothing in it is looked up; ``hooked`` says what is saved is hooked."""
        before, outer, known, began = trace.lookups, _running.call, len(trace.graphs), time.perf_counter()
        call = _Call(trace, functools.partial(self._trial, module, given))
        try:
            with call.hidden:
                # Backward may recompute calls that went by the trace: its code might save other tensors for them.
                if trace.due and not (hooked and trace.calls and trace.alike is None):
                    call.begin_trial()
                _running.call = call
                outputs = trace.compiled(module, *given.args, **given.kwargs)
        except BaseException:
            if call.trial is not None:
                call.trial.take_back(draws=trace.outcome.draws)
            raise
        finally:
            _running.call = outer
        left = [] if trace.outcome.frozen else frozen_parts(module)
        traced = len(trace.graphs) > known
        if traced:
            self._note_tracing(time.perf_counter() - began)
        elif not left:  # a first call may set things up, and be traced in other parts than those after it
            trace.outcome.tell_of_nothing()
        trace.note(call)
        if trace.calls == ENOUGH_CALLS:
            self._trusted, self._unpaid = MOST_TRUSTED, 0.0
        if trace.lookups == before:
            reasons = trace.outcome.reasons or ["it has no frozen part that gives rows"]
            bypass = Bypass(f"it trains, and {reasons[0]}", quiet=True)
            if left or not call.graphs:
                why, advice = (LEFT, "") if call.graphs else UNTRACED
                parts = names_text(left or frozen_parts(module)) or "the frozen part"
                bypass = Bypass(why, f"{advice}mark {parts} alone", quiet=traced)
            self._region.count(given, bypass)
        if call.trial is None:
            return outputs
        returned = [outputs]
        del outputs  # and all that it was computed from, before its code is run
        outputs, trace.failed = call.trial.outcome(returned, draws=trace.outcome.draws)
        alike = call.trial.saved.alike
        trace.alike = trace.alike if alike is None else alike
        trace.triable = call.trial.undone
        trace.due &= trace.triable
        if trace.failed is not None:
            self._region.note(trace.failed)
        return outputs

    def _note_tracing(self, seconds: float) -> None:
        """Take note of a call that was traced, and tell of it where such calls take long."""
        before, self._seconds = self._seconds, self._seconds + seconds
        self._unpaid += seconds
        if self._unpaid > LONG:
            self._trusted = 0
        if before <= LONG < self._seconds:
            warn_once(
                f"{self._region.name}: calls in which Dynamo traced it took {self._seconds:.0f} s so far: mark the "
                "frozen part alone, which is called and never traced. Where a loop runs longer with longer inputs, "
                "each length is traced: pad them to few"
            )

    def _trial(self, module: nn.Module, given: Given) -> Trial | None:
        """A trial; ``None`` where what it may write cannot be put back, as of a layer that has no shape yet."""
        try:
            given.load()
            return Trial(module, self._region.subject.identity, given, self._region.options)
        except Exception:
            logger.debug("a trace is not tried", exc_info=True)
            return None

    def _trace(self, module: nn.Module) -> _Trace:
        """The trace for the program as it is. The one that was used longest ago gives way to a new one."""
        if has_global_hooks():
            raise Bypass("hooks run with every module, and a trace does not call them", quiet=True)
        tell_of_eval(module)
        program = self._region.subject.identity.program()
        if program.problem is not None and self._region.options.persistent_module_hash is None:
            # It may decide that another trace is due, or be used up by a trial.
            advice = "mark the frozen part alone, or name program and weights yourself with persistent_module_hash"
            raise Unreadable(program.problem, advice)
        key = program.digest, which_train(program.tensors), torch.is_grad_enabled(), backward_hooks(module)
        trace = self._traces.get(key)
        if trace is None:
            if resume(module):
                return self._trace(module)
            if estimate(module):
                raise Bypass("statistics of a BatchNorm in it are taken anew", lasting=False, quiet=True)
            self._check_worth(key)
            function, audited = traceable(self._mark, module), bool(self._region.options.audit)
            trace = self._traces[key] = _Trace(function, subject_name(self._mark, module), audited)
            if len(self._traces) > MOST_TRACES:
                self._traces.popitem(last=False)
        else:
            self._traces.move_to_end(key)
        return trace

    def _check_worth(self, key: Key) -> None:
        """Raises where a trace may not pay: one takes as long as many calls, and some programs change with each."""
        if self._trusted:
            self._trusted -= 1
            return
        calls = self._wanted[key] = self._wanted.pop(key, 0) + 1
        if calls < ENOUGH_CALLS:
            if len(self._wanted) > MOST_WANTED:
                del self._wanted[next(iter(self._wanted))]
            raise Bypass(*RESTLESS)
        del self._wanted[key]


class _Trace:
    """One trace of a mark. Dynamo lets go of its own part as soon as this is dropped.

    Parameters
    ----------
    function : callable
        What is traced: it takes the module first.
    subject : str
        The mark's name in graphs.
    audited : bool
        Whether it is tried again later.

    Attributes
    ----------
    graphs : list of GraphModule
        Its graphs as they were rewritten.
    outcome : Outcome
        What became of them.
    calls : int
        How often it ran.
    triable, due : bool
        Whether what a run does can be undone, and whether the next call is to be a trial.
    alike : bool or None
        Whether it saves for backward what its code saves; ``None`` where no hooks of a caller asked so far.
    failed : Bypass or None
        Why it is not to run any more.
    """

    def __init__(self, function: Callable[..., Any], subject: str, audited: bool) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.outcome = Outcome()
        self.calls = 0
        self.due = self.triable = True
        self.alike: bool | None = None
        self.failed: Bypass | None = None
        self._subject, self._next = subject, LATER if audited else 0
        self.compiled = compile_with(function, _backend_of(self))

    @property
    def lookups(self) -> int:
        """Batches that were looked up."""
        return sum(regions.calls for regions in self.outcome.regions)

    def note(self, call: _Call) -> None:
        """Take note of a call that ran."""
        self.calls += 1
        # What is added to zeros at first, as adapters are, shows later; and code may look at the data.
        again = self.calls == self._next
        self._next *= LATER if again else 1
        self.due = self.triable and (call.untried or again)

    def cache(self, graph: fx.GraphModule) -> Callable[..., Any]:
        """A graph of Dynamo's, with its frozen part looked up."""
        for node in (node for each in (*bodies(graph), graph) for node in each.graph.nodes):
            if node.op not in ("placeholder", "output"):  # marks inside it have named theirs
                node.meta.setdefault("custom", {}).setdefault(KEY, self._subject)
        found = cache_regions(graph)
        run_as_code(graph)
        self.outcome.regions += [regions for regions in found.regions if regions not in self.outcome.regions]
        self.outcome.reasons = found.reasons
        self.outcome.nothing |= found.nothing
        self.outcome.draws |= found.draws
        self.outcome.frozen |= found.frozen
        self.graphs.append(graph)

        def run(*args: Any) -> Any:
            if _running.call is not None:
                _running.call.graphs += 1
            return graph.forward(*args)

        return run


@dataclasses.dataclass
class _Call:
    """A call that runs.

    Parameters
    ----------
    trace : _Trace
        What runs.
    begin : callable
        Begins a trial of it.
    trial : Trial or None
        The trial that this call is.
    hidden : ExitStack
        Ends with the run of the trace.
    graphs : int
        How many of its graphs ran so far.
    untried : bool
        Whether anything was traced that no trial saw.
    """

    trace: _Trace
    begin: Callable[[], Trial | None]
    trial: Trial | None = None
    hidden: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    graphs: int = 0
    untried: bool = False

    def begin_trial(self) -> None:
        """Make this call a trial, where it can be undone."""
        self.trial = self.begin()
        if self.trial is not None:
            self.hidden.enter_context(self.trial.saved.hide())

    def traced(self) -> None:
        """Something is traced anew: try it, if nothing of this call ran yet."""
        if self.trial is None and not self.graphs and not self.untried and self.trace.triable:
            with no_mode():
                self.begin_trial()
        self.untried |= self.trial is None


class _Running(threading.local):
    """The call that runs on a thread."""

    call: _Call | None = None


_running = _Running()
# What fails in a trace fails in its code as well, or is told of.
log_of_fakes.addFilter(lambda _: _running.call is None)


def _backend_of(trace: _Trace) -> Callable[..., Any]:
    """The backend for a trace. Dynamo keeps it with the code of modules, and is not to keep a module with it."""
    reference = weakref.ref(trace)

    @takes_rows
    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        here = reference()
        # Where there are many traces of one code, Dynamo runs any of them that fits, whoever had it made.
        guard(lambda: _running.call is not None and _running.call.trace is reference(), here)
        if _running.call is not None:
            _running.call.traced()
        run = here.cache(graph) if here is not None else graph.forward
        forget_originals(graph.graph)
        return run

    return backend


def traceable(mark: Mark, module: nn.Module) -> Callable[..., Any]:
    """The original of ``mark``, taking its module first."""
    own, output = mark.own, mark.output
    original = mark.original(module) if own not in vars(module) else None

    def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        torchcache_prepare_trace()
        if original is None:
            return and_then(getattr(module, own), output)(*args, **kwargs)
        return original(module, *args, **kwargs)

    return function


@constant
def torchcache_prepare_trace() -> None:
    """Have what is traced hold for any number of rows."""
    vary_rows()


def traced_in(region: Region) -> list[fx.GraphModule]:
    """The rewritten graphs of a region that is partly trainable."""
    return region.partly.graphs if isinstance(region.partly, Traced) else []
