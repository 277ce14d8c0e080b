"""Which nodes may be cached, and the reason when not.

A marked node may be cached unless it reads trainable state, draws random numbers, normalises over the batch, writes
to something that outlives it, or depends on a node that does, or on an input that needs a gradient. What an
operator does is read off the aten operators it runs, found by running it once on fake tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from torchcache import dynamo
from torchcache.checks.chance import TRAINING, arguments_of, draws
from torchcache.dynamo import ENTER_AUTOCAST, EXIT_AUTOCAST, FakeTensor, TorchDispatchMode, source_of, storage_of
from torchcache.graph.parts import part_of
from torchcache.mark import Mark
from torchcache.op import RECORDING, subject_of
from torchcache.regions import region_of

# What forward itself has need a gradient, of which nothing before needs one.
MADE = "made to need a gradient"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why a node may not be cached.

    Parameters
    ----------
    kind : str
        "trainable", "random", "batch statistics", "mutation", "gradient", "functorch", "marked", "untraceable" or
        ``MADE``.
    reason : str
        The reason with its cause, for people.
    source : str
        File and line of the node that it began with, where known.
    """

    kind: str
    reason: str
    source: str = ""


@dataclasses.dataclass
class Analysis:
    """What is known of every node of one graph.

    Parameters
    ----------
    verdicts : dict of Node to Verdict
        Why a node may not be cached; a marked node that is absent may be.
    state : set of Node
        Placeholders that carry parameters, buffers and other tensors that modules hold.
    scalars : set of Node
        Placeholders that carry Python numbers wrapped as tensors.
    varying : set of Node
        Nodes whose value depends on the data of the call.
    contexts : dict of Node to tuple of Node
        The autocast blocks around each node, outermost first, as the nodes that enter them.
    written : dict of Node to set of int
        Storages that a node, cached or not, writes to in place.
    stirred : set of int
        Storages that were written to with what varies.
    harmless : set of str
        Operators with their settings that draw, normalise and write nothing, whatever tensors they are given.
    draws : bool
        Whether anything draws random numbers, cached or not, or may.
    """

    verdicts: dict[fx.Node, Verdict] = dataclasses.field(default_factory=dict)
    state: set[fx.Node] = dataclasses.field(default_factory=set)
    scalars: set[fx.Node] = dataclasses.field(default_factory=set)
    varying: set[fx.Node] = dataclasses.field(default_factory=set)
    contexts: dict[fx.Node, tuple[fx.Node, ...]] = dataclasses.field(default_factory=dict)
    written: dict[fx.Node, set[int]] = dataclasses.field(default_factory=dict)
    stirred: set[int] = dataclasses.field(default_factory=set)
    harmless: set[str] = dataclasses.field(default_factory=set)
    draws: bool = False

    def cacheable(self, node: fx.Node) -> bool:
        """Whether ``node`` is marked and may be cached."""
        part = part_of(node)
        return (
            part is not None
            and part.options.enabled
            and node.op in ("call_function", "call_method")
            and node not in self.verdicts
            and not is_number(node)
            and not is_context_node(node)
        )


def is_context_node(node: fx.Node) -> bool:
    """Whether ``node`` only changes the ambient mode: autocast, grad mode, functorch levels."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    name = getattr(node.target, "__name__", "")
    return name.startswith(("_enter_", "_exit_", "_set_grad_enabled", "set_grad_enabled", "_vmap_", "_functorch"))


def is_number(node: fx.Node) -> bool:
    """Whether ``node`` produces a size or another number: regions copy those, or take them as inputs."""
    value = node.meta.get("example_value")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool, torch.Size))


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that ``node`` produces, if it produces one."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def reads_frozen(graph: fx.Graph) -> bool:
    """Whether a Dynamo graph is given a parameter that is not trainable, or looks up what a mark has."""
    given = [node.meta.get("example_value") for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    frozen = any(isinstance(value, nn.Parameter) and not value.requires_grad for value in given)
    return frozen or any(_looked_up(node) is not None for node in graph.nodes)


def analyse(graph: fx.Graph) -> Analysis:
    """Look at every node of a Dynamo graph, in order."""
    analysis = Analysis()
    entered: list[fx.Node] = []
    live: dict[fx.Node, Any] = {}
    levels = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(lambda: [EXIT_AUTOCAST(mode) for mode in reversed(list(live.values()))])
        for node in graph.nodes:
            if node.target is ENTER_AUTOCAST:
                entered.append(node)
                live[node] = ENTER_AUTOCAST(*node.args)
            elif node.target is EXIT_AUTOCAST and node.args[0] in live:
                entered.remove(node.args[0])
                EXIT_AUTOCAST(live.pop(node.args[0]))
            name = getattr(node.target, "__name__", "")
            levels += name.endswith("increment_nesting") - name.endswith("decrement_nesting")
            analysis.contexts[node] = tuple(entered)
            _classify(node, analysis)
            inherited = _inherited(node, analysis)
            verdict = inherited or _own(node, analysis, levels)
            if inherited is not None or part_of(node) is None:
                _note_writes(node, analysis)
            if node in analysis.varying:
                analysis.stirred |= analysis.written.get(node, set())
            if verdict is not None:
                analysis.verdicts[node] = verdict if verdict.source else _sourced(verdict, node)
    return analysis


def _sourced(verdict: Verdict, node: fx.Node) -> Verdict:
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return dataclasses.replace(verdict, source=":".join(frames[-1])) if frames and node.op != "placeholder" else verdict


def _classify(node: fx.Node, analysis: Analysis) -> None:
    if node.op == "placeholder":
        kind = _placeholder_kind(node)
        if kind == "state":
            analysis.state.add(node)
        elif kind == "scalar":
            analysis.scalars.add(node)
        elif kind == "data":
            analysis.varying.add(node)
    elif node.op == "get_attr":
        analysis.state.add(node)
    elif any(source in analysis.varying or _is_stirred(source, analysis) for source in node.all_input_nodes):
        analysis.varying.add(node)


def _is_stirred(node: fx.Node, analysis: Analysis) -> bool:
    tensor = tensor_of(node) if analysis.stirred else None
    return tensor is not None and storage_of(tensor) in analysis.stirred


def _placeholder_kind(node: fx.Node) -> str:
    """What a placeholder carries: "state", "scalar", "size" or "data"."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return "size"
    source = source_of(node)
    if isinstance(value, nn.Parameter) or source is None:
        return "state" if isinstance(value, nn.Parameter) else "data"
    if source.example is None:
        return "scalar"
    places = ("_parameters[", "_buffers[", "_modules[", "__closure__", "cell_contents")
    held = source.name.startswith("G[") or any(place in source.name for place in places)
    return "state" if held or source.in_module else "data"


def _inherited(node: fx.Node, analysis: Analysis) -> Verdict | None:
    for source in node.all_input_nodes:
        verdict = analysis.verdicts.get(source)
        # What runs under a functorch transform cannot be copied into a region, nor what a mark in this one looks up;
        # the result of either can be an input of a region.
        taken_apart = node.target is operator.getitem and tensor_of(source) is None
        if verdict is not None and verdict.kind != "functorch" and (verdict.kind != "marked" or taken_apart):
            return verdict
    return None


def _own(node: fx.Node, analysis: Analysis, levels: int) -> Verdict | None:
    value = tensor_of(node)
    if value is not None and _is_leaf(value) and _is_computed(node, value):
        why = "made to need a gradient, as gradient_checkpointing_enable() of transformers does with embeddings"
        advice = "call disable_input_require_grads() after that, for a Trainer in a callback's on_train_begin"
        return Verdict(MADE, f"what it computes is {why}: {advice}")
    if node.op == "placeholder":
        if value is None or not value.requires_grad or node not in analysis.state:
            return None
        return Verdict("trainable", f"reads the trainable parameter {_source_name(node)}")
    if node.op not in ("call_function", "call_method", "call_module") or is_context_node(node):
        return None
    if levels:
        return Verdict("functorch", f"{_where(node)} runs under a functorch transform")
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in _leaves(node.meta.get("example_value"))):
        return Verdict("gradient", f"{_where(node)} computes from an input that needs a gradient")
    inner = _looked_up(node)
    if inner is not None:
        name = region_of(*inner).name
        return Verdict("marked", f"{name} in it has a mark of its own: unmark that, and only what is read is stored")
    if part_of(node) is None:
        return None  # upstream of a mark, dropout and the like only make the mark's input different every time
    return _operator_verdict(node, analysis)


def _is_leaf(value: torch.Tensor) -> bool:
    """Whether gradients end at ``value``; a view that is taken without recording of what needs one says so, too."""
    base = value._base
    return value.requires_grad and value.is_leaf and (base is None or not base.requires_grad)


def _is_computed(node: fx.Node, value: torch.Tensor) -> bool:
    """Whether what a node holds was computed, in this graph or in one before it."""
    source = source_of(node) if node.op == "placeholder" and not isinstance(value, nn.Parameter) else None
    return node.op in ("call_function", "call_method") or (source is not None and "___stack" in source.name)


def _looked_up(node: fx.Node) -> tuple[Mark, nn.Module | None] | None:
    """The mark that a node looks up as one call, and its module."""
    names = [name.removesuffix(RECORDING) for name in node.args if isinstance(name, str)]
    return next(filter(None, map(subject_of, names)), None)


def _operator_verdict(node: fx.Node, analysis: Analysis) -> Verdict | None:
    settings = _act(node)
    if settings in analysis.harmless:
        return None
    if not _is_known(node):
        analysis.draws = True
        return Verdict("untraceable", f"{_where(node)} is a function that torch does not define")
    try:
        recorder = _record(node)
    except _NestedError:
        analysis.draws = True
        return Verdict("untraceable", f"{_where(node)} calls a nested graph")
    except Exception as error:  # whatever an operator raises on fake tensors
        analysis.draws = True
        return Verdict("untraceable", f"{_where(node)} cannot be analysed ({type(error).__name__})")
    if recorder.random:
        analysis.draws = True
        return Verdict("random", f"{_where(node)} draws random numbers ({recorder.random})")
    if recorder.statistics and not _is_instance_norm(node):
        return Verdict("batch statistics", f"{_where(node)} normalises over the batch ({recorder.statistics})")
    if not recorder.written:
        analysis.harmless.add(settings)
        return None
    outliving = {
        storage_of(value)
        for source in analysis.contexts
        if (value := tensor_of(source)) is not None
        and (source.op in ("placeholder", "get_attr") or part_of(source) is None)
    }
    analysis.written[node] = recorder.written
    if recorder.written & outliving:
        return Verdict("mutation", f"{_where(node)} writes to an input or a buffer in place")
    return None


def _note_writes(node: fx.Node, analysis: Analysis) -> None:
    """Note what a node that is not cached writes to: a region that reads it must keep its place in the order."""
    settings = _act(node)
    if node.op not in ("call_function", "call_method") or is_context_node(node) or settings in analysis.harmless:
        return
    try:
        recorder = _record(node)
    except Exception:  # nested graphs, and whatever an operator raises on fake tensors
        analysis.draws = True
        return
    analysis.draws |= bool(recorder.random)
    if recorder.written:
        analysis.written[node] = recorder.written
    elif not (recorder.random or recorder.statistics):
        analysis.harmless.add(settings)


def _record(node: fx.Node) -> _Recorder:
    """What a node does, from running it on fake tensors."""
    recorder = _Recorder()
    arguments = fx.map_arg((node.args, node.kwargs), _example)
    # What makes a tensor from a size has the mode of others: outside of it the size would become a constant.
    examples = itertools.chain(_leaves(arguments), (other.meta.get("example_value") for other in node.graph.nodes))
    fake = next((leaf for leaf in examples if isinstance(leaf, FakeTensor)), None)
    with contextlib.nullcontext() if fake is None else fake.fake_mode, dynamo.symbolic_sizes(), recorder:
        _run(node, *arguments)
    return recorder


def _is_known(node: fx.Node) -> bool:
    """Whether the target's name says what it does: a function that a graph calls without being traced need not."""
    if node.op == "call_method":
        return True
    package = str(getattr(node.target, "__module__", None) or "builtins").partition(".")[0]
    return package in _KNOWN or isinstance(node.target, dynamo.OPERATORS)


_KNOWN = ("torch", "_operator", "operator", "math", "builtins")


def _act(node: fx.Node) -> str:
    """A node's operator and settings: nodes that agree in these act alike."""
    return f"{node.op} {node.target} {_settings(node.args)} {_settings(node.kwargs)}"


def _settings(value: Any) -> str:
    """The arguments of a node, tensors left out."""
    return str(fx.map_arg(value, lambda node: type(node.meta.get("example_value")).__name__))


class _NestedError(Exception):
    """A node that takes a graph or a module as its argument."""


def _example(node: fx.Node) -> Any:
    if "example_value" not in node.meta:
        raise _NestedError
    value = node.meta["example_value"]
    if isinstance(value, nn.Module):
        raise _NestedError
    return value


def _leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, (tuple, list)):
        for item in arguments:
            yield from _leaves(item)
    elif isinstance(arguments, dict):
        yield from _leaves(list(arguments.values()))
    else:
        yield arguments


def _run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        raise _NestedError
    assert callable(node.target)
    return node.target(*args, **kwargs)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what the aten operators run inside it draw, normalise and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random = ""
        self.statistics = ""
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = arguments_of(func, args, kwargs)
        if draws(func, given):
            self.random = str(func)
        if "batch_norm" in func._schema.name and any(given.get(name) is True for name in TRAINING):
            self.statistics = str(func)
        self.written.update(map(storage_of, dynamo.written(func, args, kwargs)))
        return func(*args, **kwargs)


def _is_instance_norm(node: fx.Node) -> bool:
    """Instance norm runs batch norm on reshaped rows: per sample, unless it keeps running statistics."""
    if getattr(node.target, "__name__", "") != "instance_norm":
        return False
    return len(node.args) < 2 or node.args[1] is None


def _where(node: fx.Node) -> str:
    """Module path and operator of a node, for people."""
    stack = node.meta.get("nn_module_stack") or {}
    found = list(stack.values())[-1][0] if stack else ""
    path = re.sub(r"^[LG]\['\w+'\]\.?", "", str(found)) if isinstance(found, str) else ""
    name = getattr(node.target, "__name__", str(node.target))
    return f"{path or 'the model'}: {name}"


def _source_name(node: fx.Node) -> str:
    source = source_of(node)
    found = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", source.name) if source is not None else []
    return ".".join(found) or node.name
