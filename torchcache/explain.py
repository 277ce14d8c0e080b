"""What would be cached in a model and what not, and why."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import fx, nn

from torchcache.graph.batches import unmark_batches
from torchcache.graph.cut import calls_of, cut_region
from torchcache.graph.frozen import Analysis, analyse, is_context_node, is_number, tensor_of
from torchcache.graph.marked import MarkedCall, outermost
from torchcache.graph.partition import partition
from torchcache.graph.sizes import hint
from torchcache.lookup.context import bypass
from torchcache.marks import marked_modules
from torchcache.modes import settle
from torchcache.tracing import trace_with

__all__ = ["Explanation", "LeftOut", "RegionPlanned", "explain"]


@dataclasses.dataclass(frozen=True)
class RegionPlanned:
    """A region that would be cached.

    Parameters
    ----------
    name : str
        Path and class of its marked modules.
    operators : int
        Nodes of the graph that it replaces.
    inputs, outputs : list of str
        Name, dtype and row shape of what it reads from the data, and of what it stores.
    row_bytes : int
        Bytes stored a row.
    state_bytes : int
        Bytes of frozen parameters and buffers that it reads.
    """

    name: str
    operators: int
    inputs: list[str]
    outputs: list[str]
    row_bytes: int
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A part of a mark that would not be cached.

    Parameters
    ----------
    name : str
        Path and class of the marked module.
    kind : str
        "trainable", "gradient", "random", "batch statistics", "mutation", "untraceable", "argument" or "graph break".
    reason : str
        What stands in the way, with the path of the module.
    source : str
        File and line, where known.
    operators : int
        Nodes left out for it.
    """

    name: str
    kind: str
    reason: str
    source: str
    operators: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; prints as tables.

    Parameters
    ----------
    regions : list of RegionPlanned
        What would be cached.
    left_out : list of LeftOut
        What would not, and why.
    """

    regions: list[RegionPlanned]
    left_out: list[LeftOut]
    _graphs: list[tuple[fx.Graph, set[fx.Node]]] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def __rich__(self) -> Group:
        cached = Table("region", "operators", "reads", "stores", "bytes a row", "frozen state", title="cached")
        for region in self.regions:
            sizes = (f"{region.row_bytes:,}", f"{region.state_bytes:,}")
            cached.add_row(
                region.name, str(region.operators), "\n".join(region.inputs), "\n".join(region.outputs), *sizes
            )
        left = Table("module", "kind", "reason", "source", "operators", title="not cached")
        for part in self.left_out:
            left.add_row(part.name, part.kind, part.reason, part.source, str(part.operators))
        return Group(cached, left)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160).print(self.__rich__())
        return text.getvalue().rstrip()

    def to_dot(self) -> str:
        """The traced graphs in Graphviz's language, cached nodes coloured."""
        lines = ["digraph torchcache {", "  rankdir=TB; node [shape=box, style=filled, fillcolor=white];"]
        for number, (graph, cached) in enumerate(self._graphs):
            for node in graph.nodes:
                if is_number(node) or is_context_node(node):
                    continue
                target = getattr(node.target, "__name__", str(node.target))
                label = f"{node.name}\\n{target}".replace('"', "'")
                colour = "palegreen" if node in cached else "lightgrey" if node.op == "placeholder" else "white"
                lines.append(f'  "{number}.{node.name}" [label="{label}", fillcolor={colour}];')
                lines += [
                    f'  "{number}.{source.name}" -> "{number}.{node.name}";'
                    for source in node.all_input_nodes
                    if not is_number(source) and not is_context_node(source)
                ]
        return "\n".join([*lines, "}"])


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Trace ``model`` on example inputs and say what would be cached; nothing is stored.

    Frozen parts of marks are put in eval mode, as ``transform`` does. The model runs once, uncached.

    Parameters
    ----------
    model : nn.Module or function
        A model with marks in it, transformed or not.
    *args, **kwargs
        Example inputs; two rows or more tell most.

    Returns
    -------
    Explanation
        With ``regions`` and ``left_out``; prints as tables, ``to_dot()`` draws.
    """
    found = Explanation([], [])
    seen: set[str] = set()
    model = getattr(model, "_orig_mod", model)

    def look(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        unmark_batches()
        _explain_graph(module, found, seen)
        return module.forward

    if isinstance(model, nn.Module):
        for _, marked, _ in marked_modules(model):
            settle(marked)
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    with bypass():
        trace_with(model, look)(*args, **kwargs)
    reasons = [text for text, n in torch._dynamo.utils.counters["graph_break"].items() if n > breaks.get(text, 0)]
    if isinstance(model, nn.Module):
        for path, marked, _ in marked_modules(model):
            name = f"{path} ({type(marked).__name__})"
            if path not in seen:
                reason = "does not trace as one graph; cached as a whole by its eager door"
                if reasons:
                    reason += f": {reasons[0].splitlines()[0]}"
                source = next(iter(re.findall(r'File "([^"]+)", line (\d+)', "\n".join(reasons))), None)
                found.left_out.append(LeftOut(name, "graph break", reason, ":".join(source) if source else "", 0))
    return found


def _explain_graph(module: fx.GraphModule, found: Explanation, seen: set[str]) -> None:
    calls = calls_of(module.graph.nodes)
    seen.update(call.path for call in calls)
    analysis = analyse(module.graph)
    cached: set[fx.Node] = set()
    for nodes in partition(module.graph, analysis):
        cut = cut_region(nodes, analysis)
        if cut is None:
            continue
        cached.update(cut.nodes)
        found.regions.append(_region(cut.nodes, cut.outputs, analysis))
    found._graphs.append((module.graph, cached))
    parts: dict[tuple[str, str, str], LeftOut] = {}
    for node in module.graph.nodes:
        call = outermost(node)
        if call is None or node in cached or node.op == "placeholder" or is_number(node) or is_context_node(node):
            continue
        part = _left_out(node, call, analysis)
        if part is not None:
            known = parts.setdefault((part.name, part.kind, part.reason), part)
            parts[part.name, part.kind, part.reason] = dataclasses.replace(known, operators=known.operators + 1)
    found.left_out.extend(parts.values())


def _left_out(node: fx.Node, call: MarkedCall, analysis: Analysis) -> LeftOut | None:
    if call.problem is not None:
        return LeftOut(call.describe(), "argument", call.problem, _source(node), 0)
    verdict = analysis.verdicts.get(node)
    if verdict is None:
        return None
    return LeftOut(call.describe(), verdict.kind, verdict.reason, verdict.source or _source(node), 0)


def _region(nodes: list[fx.Node], outputs: list[fx.Node], analysis: Analysis) -> RegionPlanned:
    inside = set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    data = [node for node in sources if node in analysis.varying and tensor_of(node) is not None]
    state = [tensor for node in sources if node in analysis.state and (tensor := tensor_of(node)) is not None]
    return RegionPlanned(
        name=" + ".join(dict.fromkeys(call.describe() for call in calls_of(nodes))),
        operators=len(nodes),
        inputs=[_shown(node) for node in data],
        outputs=[_shown(node) for node in outputs],
        row_bytes=sum(_row_bytes(node) for node in outputs),
        state_bytes=sum(tensor.numel() * tensor.dtype.itemsize for tensor in state),
    )


def _shown(node: fx.Node) -> str:
    tensor = tensor_of(node)
    assert tensor is not None
    dtype = str(tensor.dtype).replace("torch.", "")
    return f"{node.name}: {dtype} {tuple(hint(size) for size in tensor.shape[1:])}"


def _row_bytes(node: fx.Node) -> int:
    tensor = tensor_of(node)
    assert tensor is not None
    return tensor.dtype.itemsize * math.prod(hint(size) for size in tensor.shape[1:])


def _source(node: fx.Node) -> str:
    """File and line that a node was traced from."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""
