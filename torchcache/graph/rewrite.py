"""Regions to lookup nodes: a region's own graph, its identity, and the node put in its place."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from torchcache.errors import ArgumentError
from torchcache.graph.batches import unmark_batches
from torchcache.graph.cut import Cut, batch_of, calls_of, cut_region, has_rows
from torchcache.graph.frozen import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    Analysis,
    analyse,
    is_number,
)
from torchcache.graph.marked import outermost
from torchcache.graph.partition import partition
from torchcache.graph.region import GraphRegion, Original, RegionPlan, lookup_for
from torchcache.logging import logger
from torchcache.lookup.digest import digest_bytes
from torchcache.lookup.op import LOOKUP, name_region

__all__ = ["cache_regions"]


def cache_regions(
    module: fx.GraphModule, compile_original: Callable[[fx.GraphModule], Original] | None = None
) -> list[GraphRegion]:
    """Replace every marked, frozen region of a Dynamo graph by a lookup, in place.

    Parameters
    ----------
    module : fx.GraphModule
        As Dynamo gives it to a backend.
    compile_original : callable or None
        How to compile a region's original, for its misses; ``None`` runs it eagerly.

    Returns
    -------
    list of GraphRegion
        The regions, which the caller keeps as long as the graph.
    """
    unmark_batches()
    graph = module.graph
    regions = [region for body in _checkpoint_bodies(module) for region in cache_regions(body, compile_original)]
    calls = calls_of(graph.nodes)
    if not calls:
        return regions
    for call in calls:
        if call.problem is not None and call.options.enabled:
            raise ArgumentError(call.problem)
    analysis = analyse(graph)
    for nodes in partition(graph, analysis):
        cut = cut_region(nodes, analysis)
        if cut is None:
            continue
        region = _replace(graph, cut, analysis, compile_original)
        if region is None:
            continue
        regions.append(region)
        for node in reversed(nodes):  # what only the region read, and what nobody reads
            if not node.users and (node not in analysis.written or node in cut.nodes):
                graph.erase_node(node)
    _tell(graph, analysis, regions)
    _pin_numbers(regions)
    if regions:
        graph.lint()
        module.recompile()
    return regions


def _pin_numbers(regions: Sequence[GraphRegion]) -> None:
    """Have Dynamo run graphs with numbers from attributes for the modules that they were traced with alone.

    Such a graph is right for any value, but when it changes it is this module that the fingerprint asks.
    """
    from torch._dynamo.guards import GuardBuilder

    tracing = torch._guards.TracingContext.try_get()
    for call in (call for region in regions if region.plan.positions("scalar") for call in region.plan.calls):
        if tracing is not None and call.source is not None:
            tracing.guards_context.dynamo_guards.add(call.source.make_guard(GuardBuilder.ID_MATCH))


def _replace(
    graph: fx.Graph,
    cut: Cut,
    analysis: Analysis,
    compile_original: Callable[[fx.GraphModule], Original] | None,
) -> GraphRegion | None:
    inside = set(cut.nodes)
    order = {node: position for position, node in enumerate(graph.nodes)}
    extracted = _extract(cut, analysis)
    tensors, sizes = extracted.tensors, extracted.sizes
    outside = inside - set(cut.recomputed)
    readers = [user for node in cut.outputs for user in node.users if user not in inside]
    readers += [user for node in cut.recomputed for user in node.users if user not in inside]
    given = [*tensors, *sizes]
    after = max(given, key=order.__getitem__)
    first_reader = min(readers, key=order.__getitem__)
    if order[first_reader] <= order[after]:
        logger.info("a region of %s is read before its inputs are ready; it is not cached", calls_of(cut.nodes)[0].path)
        return None
    batch = batch_of(dict.fromkeys(cut.nodes), cut.outputs, analysis)
    plan = RegionPlan(
        module=extracted.module,
        roles=tuple(_role(node, batch, analysis) for node in tensors),
        sizes=tuple(node.meta["example_value"] for node in sizes),
        inputs=tuple(node.meta["example_value"] for node in tensors),
        outputs=tuple(node.meta["example_value"] for node in cut.outputs),
        calls=tuple(calls_of(cut.nodes)),
        identity=_identity(extracted.module.graph, len(tensors)),
    )
    if "row" not in plan.roles:
        return None
    region = GraphRegion(plan, lookup_for(plan.calls, plan.identity), compile_original)
    name = region.name = name_region(f"{plan.calls[0].path}/{_signature(plan).hex()[:8]}", region)
    last = cut.nodes[-1]
    anchor = last.next if order[last] < order[first_reader] else first_reader
    with graph.inserting_before(anchor):
        lookup = graph.call_function(LOOKUP, (list(tensors), list(sizes), name))
        lookup.meta["example_value"] = list(plan.outputs)
        replacements = {}
        for index, node in enumerate(cut.outputs):
            item = graph.call_function(operator.getitem, (lookup, index))
            item.meta = {key: value for key, value in node.meta.items() if key != "torchcache"}
            replacements[node] = item
            analysis.varying.add(item)
            analysis.contexts[item] = analysis.contexts[node]
    for node, item in replacements.items():
        for user in list(node.users):
            if user not in outside and user is not lookup:
                user.replace_input_with(node, item)
    at = next(reversed(replacements.values()))
    for node in cut.recomputed:
        if order[node] < order[anchor]:
            at.append(node)
            at = node
    return region


def _role(node: fx.Node, batch: Any, analysis: Analysis) -> str:
    if node in analysis.scalars:
        return "scalar"
    if node in analysis.state:
        return "state"
    return "row" if node in analysis.varying and has_rows(node, batch) else "shared"


@dataclasses.dataclass
class _Extracted:
    """A region's own graph, and the nodes of the outer graph that feed it."""

    module: fx.GraphModule
    tensors: list[fx.Node]
    sizes: list[fx.Node]


def _extract(cut: Cut, analysis: Analysis) -> _Extracted:
    """Copy a region into a graph of its own, within the autocast blocks that its nodes were traced in."""
    inside = set(cut.nodes)
    tensors: list[fx.Node] = []
    sizes: list[fx.Node] = []

    def collect(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in inside:
                continue
            if is_number(source) and source.op != "placeholder" and _follows(source, inside, analysis):
                collect(source)
            elif is_number(source):
                sizes.append(source) if source not in sizes else None
            elif source not in tensors:
                tensors.append(source)

    for node in cut.nodes:
        collect(node)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in [*tensors, *sizes]:
        copies[source] = graph.placeholder(source.name)
        copies[source].meta = dict(source.meta)

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copy_of)
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
    graph.output(tuple(copies[node] for node in cut.outputs))
    owner = cut.nodes[0].graph.owning_module
    return _Extracted(fx.GraphModule(owner if owner is not None else {}, graph, "Region"), tensors, sizes)


def _follows(node: fx.Node, inside: set[fx.Node], analysis: Analysis) -> bool:
    """Whether a number can be recomputed inside the region: from its tensors, from wrapped numbers, from sizes."""
    return all(
        source in inside
        or source in analysis.scalars
        or (source.op == "placeholder" and not (is_number(node) and source in analysis.varying and _reads_data(node)))
        or (is_number(source) and _follows(source, inside, analysis))
        for source in node.all_input_nodes
    )


def _reads_data(node: fx.Node) -> bool:
    return node.target in ("item", "tolist")


def _identity(graph: fx.Graph, tensors: int) -> bytes:
    """Which part of its marks a region is: operators, wiring and plain flags.

    Numbers are left out: they are sizes that differ between batches and between static and dynamic traces, or
    come from code, attributes and arguments, which the fingerprint covers.
    """
    numbers: dict[fx.Node, int] = {}
    lines = []
    for position, node in enumerate(graph.nodes):
        if node.op == "placeholder":
            if position < tensors and not all(map(is_number, node.users)):
                numbers[node] = len(numbers)
            continue
        if is_number(node):
            continue
        numbers[node] = len(numbers)
        arguments = (_abstract(node.args, numbers), _abstract(node.kwargs, numbers))
        lines.append(f"{node.op} {_target_name(node.target)} {arguments}")
    return digest_bytes("\n".join(lines).encode())


def _checkpoint_bodies(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graphs under activation checkpointing, their inputs known by what the outer graph passes."""
    for node in module.graph.nodes:
        if node.op != "call_function" or "checkpoint" not in getattr(node.target, "__name__", ""):
            continue
        body = node.args[0] if node.args else None
        inner = getattr(module, str(body.target), None) if isinstance(body, fx.Node) and body.op == "get_attr" else None
        if not isinstance(inner, fx.GraphModule):
            continue
        placeholders = [found for found in inner.graph.nodes if found.op == "placeholder"]
        for placeholder, given in zip(placeholders, node.args[1:], strict=False):
            if isinstance(given, fx.Node) and given.op == "placeholder" and "grapharg" in given.meta:
                placeholder.meta.setdefault("grapharg", given.meta["grapharg"])
        yield inner


def _signature(plan: RegionPlan) -> bytes:
    """What a compiler that finds code by the text of the outer graph must see of a region: what it returns."""
    outputs = [(str(leaf.dtype), str(leaf.device), str(leaf.shape), str(leaf.stride())) for leaf in plan.outputs]
    return digest_bytes(plan.identity + repr(outputs).encode())


def _target_name(target: Any) -> str:
    if isinstance(target, str):
        return target
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", str(target))
    return f"{getattr(target, '__module__', '')}.{name}"


def _abstract(value: Any, numbers: dict[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}" if value in numbers else "#"
    if isinstance(value, (tuple, list)):
        items = [_abstract(item, numbers) for item in value]
        # A shape is a tuple of numbers in a static trace, and may be a single node in a dynamic one.
        return "#" if items and set(items) == {"#"} else "(" + ",".join(items) + ")"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_abstract(value[key], numbers)}" for key in sorted(value)) + "}"
    if isinstance(value, slice):
        return _abstract((value.start, value.stop, value.step), numbers)
    if isinstance(value, bool) or value is None or isinstance(value, (str, torch.dtype)):
        return repr(value)
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, (int, float, complex)):
        return "#"
    return type(value).__name__


def _tell(graph: fx.Graph, analysis: Analysis, regions: Sequence[GraphRegion]) -> None:
    """Log what was cached, and for marks with nothing or only a part cached, why."""
    for region in regions:
        logger.info("cached: %s, %d operators", region.lookup.name, len(region.plan.module.graph.nodes))
    reasons: dict[str, str] = {}
    for node, verdict in analysis.verdicts.items():
        call = outermost(node)
        if call is not None:
            reasons.setdefault(call.describe(), verdict.reason)
    for name, reason in reasons.items():
        logger.info("%s is not cached from here on: %s", name, reason)
