"""A region's own graph, and the digest of all that is written in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from torchcache import dynamo
from torchcache.digest.cpu import digest_bytes
from torchcache.dynamo import ENTER_AUTOCAST, EXIT_AUTOCAST
from torchcache.graph.cut import Cut
from torchcache.graph.frozen import Analysis, is_number, tensor_of
from torchcache.graph.sizes import Rows, Unfit


@dataclasses.dataclass
class Inputs:
    """The nodes of a graph that feed a region.

    Parameters
    ----------
    data, state, sizes : list of Node
        Tensors that differ between calls, tensors that modules hold, numbers.
    """

    data: list[fx.Node]
    state: list[fx.Node]
    sizes: list[fx.Node]


def inputs_of(cut: Cut, analysis: Analysis) -> Inputs:
    """What a region reads and cannot compute for itself.

    Raises
    ------
    Unfit
        When it reads a number that is no size.
    """
    inside = set(cut.nodes)
    tensors: dict[fx.Node, None] = {}
    sizes: dict[fx.Node, None] = {}

    def collect(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in inside:
                continue
            computed = is_number(source) and source.op != "placeholder" and not _gives_rows(source, cut.batch, inside)
            if computed and _follows(source, inside, analysis):
                collect(source)
            else:
                (sizes if is_number(source) else tensors)[source] = None

    for node in cut.nodes:
        collect(node)
    if any(not isinstance(node.meta["example_value"], (int, torch.SymInt)) for node in sizes):
        raise Unfit("it reads a number that is no size")
    if any(tensor_of(node) is None for node in tensors):
        raise Unfit("it reads something that is neither a tensor nor a number")
    state = [node for node in tensors if node in analysis.state]
    return Inputs([node for node in tensors if node not in analysis.state], state, list(sizes))


def extract(cut: Cut, analysis: Analysis, inputs: Inputs, rows: Rows) -> fx.GraphModule:
    """Copy a region into a graph of its own, within the autocast blocks that its nodes were traced in.

    It takes data, state, and those sizes that are not the number of an input's rows. The first dimension of what it
    gives is that of the rows. Dropout that drops nothing is left out: how much it would drop is no part of the region.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    counts = {node: place for node, place in zip(inputs.sizes, rows.counts, strict=True) if place is not None}
    for source in [*inputs.data, *inputs.state, *inputs.sizes]:
        if source not in counts:
            copies[source] = graph.placeholder(source.name)
    for source, place in counts.items():
        copies[source] = graph.call_method("size", (copies[inputs.data[place]], 0))

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            passed = _passed_on(node)
            copies[node] = graph.node_copy(node, copy_of) if passed is None else copy_of(passed)
        return copies[node]

    blocks: list[tuple[fx.Node, fx.Node]] = []
    for node in cut.nodes:
        wanted = analysis.contexts[node]
        while len(blocks) > len(wanted) or any(a is not b for (a, _), b in zip(blocks, wanted, strict=False)):
            graph.call_function(EXIT_AUTOCAST, (blocks.pop()[1],))
        for block in wanted[len(blocks) :]:
            blocks.append((block, graph.call_function(ENTER_AUTOCAST, block.args)))
        copy_of(node)
    while blocks:
        graph.call_function(EXIT_AUTOCAST, (blocks.pop()[1],))
    for node, count in zip(cut.outputs, cut.entries, strict=True):
        if count > 1:
            copies[node] = graph.call_method("unflatten", (copies[node], 0, (-1, count)))
    graph.output(tuple(copies[node] for node in cut.outputs))
    for node in graph.nodes:  # notes of the trace, which keep alive what they are about
        node.meta = {}
    return fx.GraphModule({}, graph, "Region")


def _passed_on(node: fx.Node) -> fx.Node | None:
    """What a dropout that drops nothing returns; ``None`` of other nodes."""
    if node.target not in _DROPOUTS:
        return None
    training = node.kwargs.get("training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else None))
    given = node.args[0] if node.args else node.kwargs.get("input")
    return given if training is False and isinstance(given, fx.Node) else None


_DROPOUTS = frozenset(
    getattr(home, f"{kind}dropout{dims}")
    for home in (torch, torch.nn.functional)
    for kind in ("", "alpha_", "feature_", "feature_alpha_")
    for dims in ("", "1d", "2d", "3d")
    if hasattr(home, f"{kind}dropout{dims}")
)


def _gives_rows(node: fx.Node, batch: Any, inside: set[fx.Node]) -> bool:
    """Whether a number is that of the rows, computed from what is outside: a region reads it off one of its tensors."""
    value = node.meta["example_value"]
    computed = isinstance(value, torch.SymInt) and not (batch.is_Symbol or batch.is_Integer)
    return computed and bool(dynamo.expression_of(value) == batch) and inside.isdisjoint(node.all_input_nodes)


def _follows(node: fx.Node, inside: set[fx.Node], analysis: Analysis) -> bool:
    """Whether a number can be computed again inside the region: from its tensors, wrapped numbers and sizes."""
    reads_data = node.target in ("item", "tolist")
    return all(
        source in inside
        or source in analysis.scalars
        or (source.op == "placeholder" and not (reads_data and source in analysis.varying))
        or (is_number(source) and _follows(source, inside, analysis))
        for source in node.all_input_nodes
    )


def graph_digest(graph: fx.Graph, *about: Any) -> bytes:
    """16 bytes over operators, wiring, every number, dtype and flag in a region's graph.

    Parameters
    ----------
    graph : fx.Graph
        The graph.
    *about
        Plain values that say what its inputs are.

    Raises
    ------
    Unfit
        When something among the arguments of its operators has no text that says all of it.
    """
    numbers = {node: position for position, node in enumerate(graph.nodes)}
    lines = [repr(about)]
    for node in graph.nodes:
        if node.op != "placeholder":
            arguments = f"{_text(node.args, numbers)} {_text(node.kwargs, numbers)}"
            lines.append(f"{node.op} {_target_text(node.target)} {arguments}")
    return digest_bytes("\n".join(lines).encode())


def _target_text(target: Any) -> str:
    if isinstance(target, (str, *dynamo.OPERATORS)):
        return str(target)
    # Several of torch's share one of the two.
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')} {target.__name__}"


def _text(value: Any, numbers: dict[fx.Node, int]) -> str:
    """What an argument is, without the names that a trace happened to give."""
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, (tuple, list)):
        return f"({','.join(_text(item, numbers) for item in value)})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key!r}:{_text(value[key], numbers)}' for key in sorted(value))}}}"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), numbers)}"
    if isinstance(value, torch.device):
        return value.type
    if value is None or value is ... or type(value) in _PLAIN:
        return repr(value)
    raise Unfit(f"an operator in it takes a {type(value).__name__}")


_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format)
