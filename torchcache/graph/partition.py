"""Marked and frozen nodes to regions: connected, convex, one set of options each."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

from torch import fx
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from torchcache.graph.frozen import Analysis, tensor_of
from torchcache.graph.marked import MarkedCall, outermost
from torchcache.options import CacheOptions

__all__ = ["partition"]


class _Frozen(OperatorSupportBase):
    """Who may join a region of these options."""

    def __init__(self, analysis: Analysis, options: CacheOptions) -> None:
        self._analysis = analysis
        self._options = options

    def is_node_supported(self, submodules: Mapping[str, object], node: fx.Node) -> bool:
        call = outermost(node)
        return call is not None and self._analysis.cacheable(node) and call.options == self._options


def partition(module: fx.GraphModule, analysis: Analysis) -> list[list[fx.Node]]:
    """The regions of a graph, each as its nodes in the graph's order; the regions in the order of their first nodes."""
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    choices: list[CacheOptions] = []
    for node in module.graph.nodes:
        call = outermost(node)
        if call is not None and analysis.cacheable(node) and call.options not in choices:
            choices.append(call.options)
    regions = []
    for options in choices:
        with _quiet():
            partitioner = CapabilityBasedPartitioner(
                module, _Frozen(analysis, options), allows_single_node_partition=True
            )
            proposed = partitioner.propose_partitions()
        groups = _joined([sorted(group.nodes, key=order.__getitem__) for group in proposed])
        _add_items(groups, module, analysis, options)
        for nodes in groups:
            regions.extend(_components(sorted(nodes, key=order.__getitem__)))
    return sorted(regions, key=lambda nodes: order[nodes[0]])


def _add_items(groups: list[list[fx.Node]], module: fx.GraphModule, analysis: Analysis, options: CacheOptions) -> None:
    """Give indexing of inputs back to the groups that read it: the partitioner moves it to its producer's partition."""
    owner = {node: group for group in groups for node in group}
    support = _Frozen(analysis, options)
    for node in reversed(module.graph.nodes):
        if node in owner or not support.is_node_supported({}, node):
            continue
        for user in node.users:
            group = owner.get(user)
            if group is not None and _convex([*group, node]):
                group.append(node)
                owner[node] = group
                break


def _joined(groups: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Partitions that hold parts of the same call, put together where nothing runs between them."""
    joined: list[list[fx.Node]] = []
    for group in groups:
        calls = set(map(outermost, group))
        partner = next(
            (other for other in joined if calls & set(map(outermost, other)) and _convex([*other, *group])), None
        )
        if partner is None:
            joined.append(list(group))
        else:
            partner.extend(group)
    return joined


def _convex(nodes: list[fx.Node]) -> bool:
    """Whether no path leaves ``nodes`` and comes back."""
    inside = set(nodes)
    after = {user for node in nodes for user in node.users if user not in inside}
    pending = list(after)
    while pending:
        for user in pending.pop().users:
            if user in inside:
                return False
            if user not in after:
                after.add(user)
                pending.append(user)
    return True


def _components(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """The parts of ``nodes`` that belong together: connected ones, and parts of one call that read the same input.

    The partitioner also joins nodes that only stand side by side; two calls of one module stay two regions.
    """
    inside = set(nodes)
    leader = {node: node for node in nodes}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    readers: dict[tuple[MarkedCall | None, fx.Node], fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source in inside:
                leader[find(node)] = find(source)
            elif tensor_of(source) is not None:
                first = readers.setdefault((outermost(node), source), node)
                leader[find(node)] = find(first)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's partitioner prints whole graphs at INFO."""
    logger = logging.getLogger("torch.fx.passes.infra.partitioner")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
