"""Marks as data, and which nodes of a graph came from which marked call.

While Dynamo traces a marked call, two hooks run at trace time: ``enter`` describes the call (its module and its
non-tensor arguments), ``leave`` writes that description on every node traced in between.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from torchcache.errors import ArgumentError
from torchcache.graph.batches import make_symbolic
from torchcache.graph.guards import asked_of
from torchcache.graph.pending import pending_write
from torchcache.lookup.constants import constant_bytes
from torchcache.lookup.rows import flatten_arguments
from torchcache.options import NAMES, CacheOptions

__all__ = ["Mark", "MarkedCall", "enter", "graph_break", "leave", "outermost", "register_door", "traced_from"]

META = "torchcache"
OPEN = "_torchcache_open"
ROOT = "_torchcache_root"
GUARDED = "_torchcache_guarded"


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """The wish that calls of a function or a module's forward be cached.

    Parameters
    ----------
    function : callable
        The original: a function of tensors, or a forward that takes the module first.
    options : CacheOptions
        Its options.
    of_module : bool
        Whether the first argument is a module.
    """

    function: Callable[..., Any]
    options: CacheOptions
    of_module: bool

    def options_for(self, module: nn.Module | None) -> CacheOptions:
        """The options, with the instance's own ``torchcache_<option>`` attributes applied."""
        if module is None:
            return self.options
        members = vars(module)
        if _OVERRIDING.isdisjoint(members):  # almost always
            return self.options
        return self.options.replace({name: members[key] for name, key in _OVERRIDES.items() if key in members})

    def signature(self) -> inspect.Signature:
        """The original's signature, the module included."""
        return _signature(self)


_OVERRIDES = {name: f"torchcache_{name}" for name in NAMES}
_OVERRIDING = frozenset(_OVERRIDES.values())
_signatures: weakref.WeakKeyDictionary[Mark, inspect.Signature] = weakref.WeakKeyDictionary()


def _signature(mark: Mark) -> inspect.Signature:
    signature = _signatures.get(mark)
    if signature is None:
        signature = _signatures[mark] = inspect.signature(mark.function)
    return signature


@dataclasses.dataclass(frozen=True, eq=False)
class MarkedCall:
    """One call of a mark inside a traced graph.

    Parameters
    ----------
    mark : Mark
        The mark.
    module : weakref to nn.Module, or None
        The marked module; ``None`` for a function.
    path : str
        Where the module is in the traced model, or the function's name.
    constants : bytes
        Canonical bytes of the non-tensor arguments.
    problem : str or None
        Why the call cannot be cached, if so.
    source : torch._guards.Source or None
        By which way Dynamo found the module.
    written : str
        What the frame wrote to the module before the call, if anything.
    """

    mark: Mark
    module: weakref.ReferenceType[nn.Module] | None
    path: str
    constants: bytes
    problem: str | None = None
    source: Any = None
    written: str = ""

    @property
    def subject(self) -> Any:
        """What was called: equal for calls of one mark on one module."""
        return self.mark, self.module

    @property
    def options(self) -> CacheOptions:
        """The options in force for this call."""
        return self.mark.options_for(self.subject_module)

    @property
    def subject_module(self) -> nn.Module | None:
        """The marked module, if it is one and still lives."""
        return self.module() if self.module is not None else None

    def describe(self) -> str:
        """Path and class, for people."""
        module = self.subject_module
        return self.path if module is None else f"{self.path} ({type(module).__name__})"


_doors: dict[types.CodeType, weakref.ReferenceType[Mark]] = {}
_breaks: weakref.WeakKeyDictionary[Mark, str] = weakref.WeakKeyDictionary()


def register_door(code: types.CodeType, mark: Mark) -> None:
    """Say which mark the door function with this code object belongs to."""
    _doors[code] = weakref.ref(mark, lambda _: _doors.pop(code, None))


def outermost(node: torch.fx.Node) -> MarkedCall | None:
    """The outermost marked call that ``node`` was traced in."""
    calls = node.meta.get(META)
    return calls[-1] if calls else None


def enter(context: Any) -> None:
    """Run by Dynamo where a marked call begins: describe it.

    Where the call is the root of the trace and could not be traced whole, the frame is skipped, so that it
    runs eagerly and is cached as one module.
    """
    frame = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    reference = _doors.get(frame.f_code)
    mark = reference() if reference is not None else None
    failed = next((entry for entry in frame.speculation_log.entries if _failed(entry)), None)
    if frame.parent is None and failed is not None:
        from torch._dynamo.exc import SkipFrame

        if mark is not None:
            _breaks[mark] = _why(failed)
        raise SkipFrame("torchcache: a marked module that does not trace as one graph is cached as a whole")
    make_symbolic(frame)
    graph = frame.output.current_tracer.graph
    call = _describe(mark, frame) if mark is not None else None
    vars(graph)[ROOT] = frame.output.root_tx.f_code
    opened = graph.__dict__.setdefault(OPEN, [])
    opened.append((call, next(iter(reversed(graph.nodes)), None)))


def leave(context: Any) -> None:
    """Run by Dynamo where a marked call ends: write its description on the nodes traced since ``enter``."""
    frame = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    graph = frame.output.current_tracer.graph
    opened = graph.__dict__.get(OPEN)
    if not opened:
        return
    call, last = opened.pop()
    if call is None:
        return
    for node in reversed(graph.nodes):
        if node is last:
            break
        if node.op != "placeholder":
            node.meta[META] = [*node.meta.get(META, ()), call]


def traced_from(graph: torch.fx.Graph) -> types.CodeType | None:
    """The code of the frame that Dynamo wrote ``graph`` for, as it met marked calls; ``None`` for parts and copies."""
    return vars(graph).get(ROOT)


def graph_break(mark: Mark) -> str | None:
    """Why calls of ``mark`` did not trace as one graph, and where; ``None`` if that is not known."""
    return _breaks.get(mark)


def _why(entry: Any) -> str:
    place = f"{entry.filename}:{entry.lineno}"
    reason = getattr(entry, "reason", None)
    stack = getattr(reason, "user_stack", None)
    if stack:
        place = f"{stack[-1].filename}:{stack[-1].lineno}"
    text = str(getattr(reason, "reason", "") or "graph break").strip().splitlines()[0]
    return f"{text} ({place})"


def _failed(entry: Any) -> bool:
    return bool(getattr(entry, "_failed", False))


def _describe(mark: Mark, frame: Any) -> MarkedCall:
    symbols = frame.symbolic_locals
    arguments = list(symbols["args"].realize().items)
    named = {key.vt.as_python_constant(): value for key, value in symbols["kwargs"].realize().items.items()}
    module, source, path = None, None, getattr(mark.function, "__qualname__", "function")
    if mark.of_module:
        tracker = arguments[0].realize()
        module, source = tracker.value, getattr(tracker, "source", None)
        path = _path(source) or type(module).__name__
    problem, constants = None, b""
    try:
        bound = mark.signature().bind(*arguments, **named)
        bound.apply_defaults()
        parts = dict(bound.arguments)
        if mark.of_module:
            parts.pop(next(iter(parts)))
        constants = b"".join(b"".join(_constants(value, f" {name!r}", path, frame)) for name, value in parts.items())
    except ArgumentError as error:
        problem = str(error)
    except TypeError as error:
        problem = f"{path}: {error}"
    subject = mark.function if module is None else (module, mark.function)
    written = pending_write(frame.output.side_effects, subject, path)
    reference = weakref.ref(module) if module is not None else None
    guarded = vars(frame.output.current_tracer.graph).setdefault(GUARDED, set())
    if source is not None and (mark, source) not in guarded:
        guarded.add((mark, source))
        _guard_options(mark, module, source)
    return MarkedCall(mark, reference, path, constants, problem, source, written)


def _guard_options(mark: Mark, module: Any, source: Any) -> None:
    """Have Dynamo trace again for a module with other options: instances of a class share its traces."""
    from torch._dynamo.guards import install_guard

    reference, options = weakref.ref(mark), mark.options_for(module)

    def has_same(value: nn.Module) -> bool:
        live = reference()
        return live is not None and live.options_for(value) == options

    install_guard(source.make_guard(asked_of(has_same, "has the options that were traced")))


def _constants(value: Any, argument: str, where: str, frame: Any) -> Iterator[bytes]:
    """Canonical bytes of an argument that Dynamo traces, with a placeholder for each tensor."""
    from torch._dynamo.variables import ConstDictVariable, ListVariable, TensorVariable, TupleVariable
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.tensor import SymNodeVariable

    if isinstance(value, VariableTracker):
        value = value.realize()
    if isinstance(value, TensorVariable):
        yield b"T"
    elif isinstance(value, SymNodeVariable):
        # An argument's value is part of the key, so each value gets a graph of its own.
        yield constant_bytes(value.evaluate_expr(frame.output))
    elif isinstance(value, (ListVariable, TupleVariable, tuple, list)):
        items = value.items if isinstance(value, VariableTracker) else value
        yield b"("
        for index, item in enumerate(items):
            yield from _constants(item, f"{argument}[{index}]", where, frame)
            yield b";"
        yield b")"
    elif isinstance(value, dict) or type(value) is ConstDictVariable:
        yield from _constant_items(value, argument, where, frame)
    elif isinstance(value, VariableTracker):
        yield _plain(value, argument, where)
    else:
        yield flatten_arguments({argument: value}, where)[1].constants


def _constant_items(value: Any, argument: str, where: str, frame: Any) -> Iterator[bytes]:
    pairs = value.items() if isinstance(value, dict) else value.items.items()
    named = {(key.vt.as_python_constant() if hasattr(key, "vt") else key): item for key, item in pairs}
    yield b"{"
    for key in sorted(named, key=lambda name: (type(name).__name__, str(name))):
        yield constant_bytes(key) + b"="
        yield from _constants(named[key], f"{argument}[{key!r}]", where, frame)
        yield b";"
    yield b"}"


def _plain(value: Any, argument: str, where: str) -> bytes:
    try:
        constant = value.as_python_constant()
    except Exception:  # whatever Dynamo raises for what is no constant
        constant = getattr(value, "value", value)
    return flatten_arguments({argument: constant}, where)[1].constants


def _path(source: Any) -> str:
    """``backbone.layers.0`` from the source by which Dynamo found the module."""
    name = getattr(source, "name", "")
    name = name() if callable(name) else name
    return ".".join(re.findall(r"_modules\['([^']+)'\]", str(name)))
