"""What a region takes and gives: a partition shrunk until its outputs are rows, without what is cheap to redo."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from torchcache.dynamo import expression_of, storage_of
from torchcache.graph.frozen import Analysis, is_number, tensor_of
from torchcache.graph.parts import part_of, parts_of

__all__ = ["Cut", "batch_of", "cut_region", "has_rows"]

# Operators so cheap that their results are recomputed rather than stored.
CHEAP = frozenset(
    """
    view reshape transpose permute unsqueeze squeeze expand expand_as flatten unflatten contiguous t getitem getattr to
    float half bfloat16 bool int long type type_as clone detach size eq ne lt le gt ge and_ or_ not_ invert logical_not
    logical_and logical_or neg sub rsub add mul truediv masked_fill where zeros ones full zeros_like ones_like full_like
    arange tensor empty split chunk unbind cat stack dropout identity
    """.split()
)


@dataclasses.dataclass
class Cut:
    """A region about to be cut out.

    Parameters
    ----------
    nodes : list of Node
        The nodes copied into the region's graph, in order.
    outputs : list of Node
        Those among them whose values are stored.
    recomputed : list of Node
        Those that are cheap to compute from the stored ones, and are read outside: in order.
    """

    nodes: list[fx.Node]
    outputs: list[fx.Node]
    recomputed: list[fx.Node]


def cut_region(nodes: list[fx.Node], analysis: Analysis) -> Cut | None:
    """Shrink a partition until each of its outputs has the batch as first dimension; ``None`` if nothing is left."""
    members = dict.fromkeys(nodes)
    while members:
        outputs = _outputs(members, analysis)
        if not outputs:
            return None
        batch = batch_of(members, outputs, analysis)
        bad = [node for node in outputs if not has_rows(node, batch)]
        if not bad:
            outputs, recomputed = _spare(outputs, members, analysis)
            needed = _ancestors(outputs, members, analysis)
            kept = [node for node in members if node in needed]
            if not _worthwhile(kept, nodes, analysis) or not _orderly(kept, outputs, analysis):
                return None
            return Cut(kept, outputs, [node for node in members if node in recomputed])
        for node in _descendants(bad, members):
            members.pop(node, None)
    return None


def _outputs(members: dict[fx.Node, None], analysis: Analysis) -> list[fx.Node]:
    """The members read outside that must be stored: not what is the same for all rows, nor what is cheap to redo."""
    outputs = []
    for node in members:
        if all(user in members for user in node.users) or node not in analysis.varying:
            continue
        if not _is_cheap_from_inputs(node, members, analysis):
            outputs.append(node)
    return outputs


def _is_cheap_from_inputs(node: fx.Node, members: dict[fx.Node, None], analysis: Analysis) -> bool:
    """Whether ``node`` follows from the region's inputs by cheap operators alone, while others in it do more."""
    closure = _ancestors([node], members, analysis)
    if len(closure) == len(members) or any(member in analysis.written for member in closure):
        return False
    return all(_is_cheap(member, analysis) for member in closure)


def _spare(
    outputs: list[fx.Node], members: dict[fx.Node, None], analysis: Analysis
) -> tuple[list[fx.Node], set[fx.Node]]:
    """The outputs that must be stored, and the nodes that lead from them to those that need not be."""
    stored = list(outputs)
    recomputed: set[fx.Node] = set()
    for output in reversed(outputs):
        others = set(stored) - {output}
        path: set[fx.Node] = set()
        pending = [output]
        reached = False
        while pending:
            node = pending.pop()
            if node in others:
                reached = True
            elif node in members and node not in path:
                path.add(node)
                pending.extend(node.all_input_nodes)
        if reached and all(_is_light(node, analysis) for node in path):
            stored.remove(output)
            recomputed |= path
    return stored, recomputed


def _is_light(node: fx.Node, analysis: Analysis) -> bool:
    """Whether computing ``node`` again costs about as much as reading it: no weights, no products of matrices."""
    name = getattr(node.target, "__name__", str(node.target))
    heavy = any(
        part in name for part in ("matmul", "mm", "conv", "linear", "attention", "einsum", "lstm", "gru", "fft")
    )
    reads_state = any(source in analysis.state for source in node.all_input_nodes)
    return not heavy and not reads_state and node not in analysis.written


def _is_cheap(node: fx.Node, analysis: Analysis) -> bool:
    name = getattr(node.target, "__name__", str(node.target)).strip("_")
    return name in CHEAP and not any(source in analysis.state for source in node.all_input_nodes)


def batch_of(members: dict[fx.Node, None], outputs: Sequence[fx.Node], analysis: Analysis) -> Any:
    """The batch size, as traced: dim 0 of the first varying input that an output shares, else of the first at all."""
    sources = dict.fromkeys(source for node in members for source in node.all_input_nodes if source not in members)
    tensors = [tensor for source in sources if source in analysis.varying and (tensor := tensor_of(source)) is not None]
    batches = [expression_of(tensor.shape[0]) for tensor in tensors if tensor.ndim]
    given = {
        expression_of(tensor.shape[0]) for node in outputs if (tensor := tensor_of(node)) is not None and tensor.ndim
    }
    return next((batch for batch in batches if batch in given), batches[0] if batches else None)


def has_rows(node: fx.Node, batch: Any) -> bool:
    """Whether ``node`` is a tensor whose first dimension is the batch."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.ndim > 0 and expression_of(tensor.shape[0]) == batch


def _ancestors(nodes: Iterable[fx.Node], members: dict[fx.Node, None], analysis: Analysis) -> set[fx.Node]:
    """``nodes`` and the members they follow from, in-place writes to any of them included."""
    needed: set[fx.Node] = set()
    writers = [member for member in members if member in analysis.written]
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in needed or node not in members:
            continue
        needed.add(node)
        pending.extend(node.all_input_nodes)
        tensor = tensor_of(node)
        if tensor is not None and writers:
            pending.extend(writer for writer in writers if storage_of(tensor) in analysis.written[writer])
    return needed


def _descendants(nodes: Iterable[fx.Node], members: dict[fx.Node, None]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found and node in members:
            found.add(node)
            pending.extend(node.users)
    return found


def _worthwhile(kept: list[fx.Node], nodes: list[fx.Node], analysis: Analysis) -> bool:
    """Whether the region does more than rearrange, unless it is all there is of its marks."""
    if not all(_is_cheap(node, analysis) for node in kept):
        return True
    parts = set(parts_of(kept))
    everything = [
        node
        for node in nodes[0].graph.nodes
        if part_of(node) in parts and not is_number(node) and node.op not in ("placeholder", "get_attr")
    ]
    return len(everything) <= len(nodes)


def _orderly(kept: list[fx.Node], outputs: list[fx.Node], analysis: Analysis) -> bool:
    """Whether in-place writes keep their order when the region runs at one point of the graph."""
    inside = set(kept)
    written = set().union(*(analysis.written.get(node, set()) for node in kept))
    elsewhere = {node: storages for node, storages in analysis.written.items() if node not in inside}
    if not written and not elsewhere:
        return True
    order = {node: position for position, node in enumerate(kept[0].graph.nodes)}
    first, last = order[kept[0]], order[kept[-1]]
    inputs = {source for node in kept for source in node.all_input_nodes if source not in inside}
    touched = {storage_of(tensor) for node in [*kept, *inputs] if (tensor := tensor_of(node)) is not None}
    if any(storages & touched and first < order[node] < last for node, storages in elsewhere.items()):
        return False
    for node in outputs:
        tensor = tensor_of(node)
        assert tensor is not None
        # A reader outside sees the value after every write of the region, so none may come before one.
        readers = [order[user] for user in node.users if user not in inside]
        writers = [order[member] for member in kept if storage_of(tensor) in analysis.written.get(member, ())]
        if writers and min(readers) < max(writers):
            return False
    return True
