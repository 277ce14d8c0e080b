"""What stands in place of a marked function: a lookup, one opaque node where a graph is traced, or the original."""

from __future__ import annotations

import ctypes
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchcache import dynamo
from torchcache.batch import Given
from torchcache.call import Region
from torchcache.context import bypassed, inside_region, number_of_call
from torchcache.errors import NEEDED, Bypass
from torchcache.graph.traced import Traced
from torchcache.logging import inform_once
from torchcache.mark import Mark, and_then
from torchcache.modes import estimate, resume
from torchcache.op import NOTHING, RECORDING, opaque, subject_name
from torchcache.regions import note_reentry, region_of
from torchcache.trainable import FREEZE, trained
from torchcache.usefulness import note_call

_CONSTANTS = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout)
LOOKUP, APART, PART, OWN, PLAIN = "lookup", "apart", "part", "own", "plain"
WRITTEN = "code before it in the graph writes what it reads"


def door(mark: Mark, of: Callable[..., Any] | None = None) -> Any:
    """The function to call in place of what ``mark`` names.

    Parameters
    ----------
    mark : Mark
        The mark.
    of : callable or None
        What it looks like, where the mark itself does not say.
    """
    shown = mark.function if mark.function is not None else of
    base, name, own, output = mark.base, mark.name, mark.own, mark.output

    @dynamo.constant
    def torchcache_traced(address: int, gradients: bool, enabled: bool | None) -> str:
        module = ctypes.cast(address, ctypes.py_object).value if address else None  # its caller holds it
        return _traced(mark, module, gradients, enabled)

    @dynamo.constant
    def torchcache_inlined(address: int, needed: bool) -> bool:
        _note_inlined(mark, ctypes.cast(address, ctypes.py_object).value if address else None, needed)
        return True

    def opened(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():  # the other question is of all threads
            return _enter(mark, args, kwargs)
        module = args[0] if args and isinstance(args[0], nn.Module) else None
        gradients = torch.is_grad_enabled()
        enabled = getattr(module, "torchcache_enabled", None)  # Dynamo traces anew where it changed
        # Some releases hand only constants to what they run while they trace; the address is one, and guarded.
        address = 0 if module is None else id(module)
        # Dynamo guards no constant without a source: a new string has none.
        how, subject = f"{torchcache_traced(address, gradients, enabled)}".split(" ")
        if how == LOOKUP:
            given = args if module is None else args[1:]
            known, trains = _look(given, kwargs)
            if not known:
                return _enter(mark, args, kwargs)
            if not (gradients and trains):
                given, kwargs = pytree.tree_map(_passed, (given, kwargs))
                outputs = opaque(subject, given, kwargs)
                torchcache_trace_anew()
                outputs, structure = pytree.tree_flatten(outputs)
                return pytree.tree_unflatten(outputs, structure)  # with constants in the place of their stand-ins
        if how == APART:
            return _enter(mark, args, kwargs)
        torchcache_inlined(address, how == LOOKUP)
        original: Any = shown if base is None else _beneath(base, name)
        if how == OWN:
            original, args = getattr(module, own), args[1:]
        original = and_then(original, output)
        if how == PART:
            with torch.fx.traceback.annotate({"torchcache": subject}):
                return original(*args, **kwargs)
        return original(*args, **kwargs)

    if shown is not None:
        functools.update_wrapper(opened, shown)
        # Libraries that patch a forward follow it to take their patch off, and go too far.
        del opened.__wrapped__  # type: ignore[attr-defined]
        opened.__signature__ = inspect.signature(shown)  # type: ignore[attr-defined]
    opened.torchcache_function = shown  # type: ignore[attr-defined]
    opened.torchcache_mark = mark  # type: ignore[attr-defined]
    return opened


@dynamo.constant
def torchcache_trace_anew() -> bool:
    """Have a frame traced anew from its beginning, where the call before found that it must be."""
    dynamo.retrace()
    return True


def _beneath(base: type, name: str) -> Any:
    found = getattr(base, name)
    return getattr(found, "torchcache_function", found)


def _look(*values: Any) -> tuple[bool, bool]:
    """Whether arguments hold only what a graph can pass on, and whether a tensor among them needs a gradient."""
    trains = False
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            trains = trains or value.requires_grad
        elif isinstance(value, (tuple, list)):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif not (value is None or isinstance(value, _CONSTANTS)) or (isinstance(value, str) and value == NOTHING):
            return False, trains
    return True, trains


def _passed(leaf: Any) -> Any:
    """An argument as a call in a graph takes it: ``None`` is none of its types."""
    return NOTHING if leaf is None else leaf


def _traced(mark: Mark, module: nn.Module | None, gradients: bool, enabled: bool | None) -> str:
    """How a call is traced, and the subject's name in graphs. Dynamo asks once a trace, and guards who was called."""
    note_call()
    dynamo.nonstrict(opaque)
    dynamo.retrace()
    how = PLAIN
    if not (inside_region() or bypassed() or torch.compiler.is_exporting()) and mark.options_for(module).enabled:
        region = region_of(mark, module)
        resume(module)
        estimate(module)
        how = _how(region, module, gradients)
        dynamo.guard(_still(region, gradients, looked_up=how == LOOKUP))
        if how == PART:
            dynamo.vary_rows()
        if how == PART and not dynamo.is_ours():
            whole = module is not None and all(parameter.requires_grad for parameter in module.parameters())
            region.note(Bypass(f"it trains {trained(module)}", FREEZE) if whole else Bypass(*OF_OTHERS))
        if how == APART and region.subject.deferred is None:
            why = region.apart or f"torch {torch.__version__} cannot hold the frozen part of what is trained in one"
            inform_once(f"{region.name} is looked up between two graphs: {why}")
    name = subject_name(mark, module)
    if how == LOOKUP and gradients and region.subject.identity.asks_for_gradients:
        name += RECORDING
    if how not in (LOOKUP, APART) and module is not None and mark.own in vars(module):
        how = OWN
    return f"{how} {name}"


OF_OTHERS = (
    "it is partly trainable, and torch.compile caches the frozen part of it with backend=torchcache_backend only",
    "compile with that, or mark a part that is frozen as a whole",
)


def _note_inlined(mark: Mark, module: nn.Module | None, needed: bool) -> None:
    """Note that a call is a part of a graph, where nobody counts it; say so where that is for a gradient."""
    if not inside_region() and mark.options_for(module).enabled:
        region = region_of(mark, module)
        region.inlined = True
        if needed:
            region.note(Bypass(*NEEDED))


def _how(region: Region, module: nn.Module | None, gradients: bool) -> str:
    identity = region.subject.identity
    if identity.reads(*dynamo.pending_writes()):  # what was written does not show before the graph has run
        if not dynamo.is_whole():
            region.apart = WRITTEN
            return APART
        region.note(Bypass(WRITTEN, "set it outside of what is compiled, or leave fullgraph=True out"))
        return PLAIN
    if (exchange := identity.exchanges()) is not None:
        region.note(exchange)
        return PLAIN
    if ((gradients or region.partial) and identity.trains()) or _goes_by_parts(region):
        return PLAIN if module is None else PART if dynamo.names_parts() else APART
    if region.writes:
        return PLAIN
    if region.subject.deferred is not None:  # what is not built says nothing of its outputs
        return APART
    if region.apart:
        return PLAIN if dynamo.is_whole() else APART
    if (unreadable := identity.unreadable()) is not None:  # each call is computed
        region.note(unreadable)
        return PLAIN
    return LOOKUP


def _goes_by_parts(region: Region) -> bool:
    """Whether its frozen part is looked up elsewhere, and the whole changes as what trains does."""
    return region.partial and region.turnover.unsteady


def _still(region: Region, gradients: bool, *, looked_up: bool) -> Callable[[], bool]:
    """Tells later whether what decided how a call is traced is as it was, and what it returns looks as it did."""
    held, form = weakref.ref(region), None

    def now(reference: Region) -> tuple[bool, int, bool, bool, bool]:
        matters = gradients or reference.partial
        # Of what is looked up the form says what is trainable.
        trains = matters and not looked_up and reference.subject.identity.trains()
        return reference.writes, reference.traces, matters, trains, _goes_by_parts(reference)

    before = now(region)

    def holds() -> bool:
        nonlocal before, form
        reference = held()
        if reference is None:
            return False
        if looked_up and form is None:
            # When it was traced: a first call may set things up, and another call in the same frame may go by parts.
            form, before = reference.subject.identity.form(), (*before[:2], *now(reference)[2:])
        return now(reference) == before and (form is None or form())

    return holds


@dynamo.untraced
def _enter(mark: Mark, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A marked call outside of any trace."""
    module = args[0] if args and isinstance(args[0], nn.Module) else None
    inside = inside_region()
    if inside:
        note_reentry(mark, module)
    if inside or dynamo.is_scripted() or torch.compiler.is_exporting() or not mark.options_for(module).enabled:
        original = mark.original(module)
        return original(*args, **kwargs)
    region = region_of(mark, module)
    given = args if module is None else args[1:]
    if dynamo.is_watched():
        seen = Bypass("a mode or a function transform sees every operator", "", lasting=False, quiet=True)
        return region.compute(Given(region.subject, given, kwargs, number_of_call(region)), seen)
    if module is not None and vars(module).get("_is_replica"):
        replica = Bypass(
            "it is a replica of DataParallel, which makes one for every step",
            "use DistributedDataParallel",
            lasting=False,
        )
        return region.compute(Given(region.subject, given, kwargs, number_of_call(region)), replica)
    if module is not None and region.partly is None and region.subject.deferred is None:
        region.partly = Traced(mark, module, region)
    return region(*mark.without_defaults(module, given, kwargs))
