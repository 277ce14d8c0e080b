"""Marked and frozen nodes to regions: connected, convex, one set of options each.

Convex means that no path leaves a region and comes back, also not through other regions run as one step, so that each
can run at one point of the graph. Nodes are taken in the graph's order and join the regions of their inputs, unless
one of their other inputs depends on that region.
"""

from __future__ import annotations

from torch import fx

from torchcache.graph.frozen import Analysis, tensor_of
from torchcache.graph.parts import Part, part_of
from torchcache.options import CacheOptions


class _Group:
    """A region in the making.

    Parameters
    ----------
    options : CacheOptions
        The options of every mark in it.
    """

    def __init__(self, options: CacheOptions) -> None:
        self.options = options
        self.nodes: list[fx.Node] = []
        self.outside: set[_Group] = set()
        self._merged_into: _Group | None = None

    def root(self) -> _Group:
        """The group that this one is part of by now."""
        group = self
        while group._merged_into is not None:
            group = group._merged_into
        return group

    def merge(self, other: _Group) -> None:
        """Take ``other`` in."""
        self.nodes += other.nodes
        self.outside |= other.outside
        other._merged_into = self


def partition(graph: fx.Graph, analysis: Analysis) -> list[list[fx.Node]]:
    """The regions of a graph, each as its nodes in the graph's order; the regions in the order of their first nodes."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    member: dict[fx.Node, _Group] = {}
    outside: dict[fx.Node, set[_Group]] = {}
    groups: list[_Group] = []
    for node in graph.nodes:
        sources = node.all_input_nodes
        behind = {group.root() for source in sources for group in outside[source]}
        feeding = list(dict.fromkeys(member[source].root() for source in sources if source in member))
        if analysis.cacheable(node) and not _feeds_functorch(node, analysis):
            group = _choose(node, feeding, behind)
            if group not in groups:
                groups.append(group)
            group.nodes.append(node)
            member[node] = group
            behind |= {other.root() for other in feeding} - {group}
            group.outside |= behind
        else:
            behind |= set(feeding)
        outside[node] = behind
    found = _join([group for group in groups if group.root() is group], analysis)
    return sorted((sorted(group.nodes, key=order.__getitem__) for group in found), key=lambda nodes: order[nodes[0]])


def _feeds_functorch(node: fx.Node, analysis: Analysis) -> bool:
    """Whether ``node``, the same in every call, leads to a functorch block: it would cut its region in two."""
    if node in analysis.varying or any(source in analysis.state for source in node.all_input_nodes):
        return False
    return any(
        (user in analysis.verdicts and analysis.verdicts[user].kind == "functorch") or _feeds_functorch(user, analysis)
        for user in node.users
    )


def _choose(node: fx.Node, feeding: list[_Group], behind: set[_Group]) -> _Group:
    """The group that ``node`` joins: those of its inputs, merged as far as they may be, or a new one."""
    part = part_of(node)
    assert part is not None
    options = part.options
    chosen: _Group | None = None
    for group in feeding:
        if group.options != options or group in _closure(behind | (set(feeding) - {group})):
            continue
        if chosen is None:
            chosen = group
        elif _independent(chosen, group):
            chosen.merge(group)
    return chosen if chosen is not None else _Group(options)


def _closure(groups: set[_Group]) -> set[_Group]:
    """``groups`` and all that they depend on."""
    found: set[_Group] = set()
    pending = [group.root() for group in groups]
    while pending:
        group = pending.pop()
        if group not in found:
            found.add(group)
            pending += [other.root() for other in group.outside]
    return found


def _independent(first: _Group, second: _Group) -> bool:
    return first not in _closure(second.outside) and second not in _closure(first.outside)


def _join(groups: list[_Group], analysis: Analysis) -> list[_Group]:
    """Put parts of one mark that read the same data together; calls of one module with other data stay apart."""
    joined: list[_Group] = []
    for group in groups:
        for other in joined:
            shared = _reads(other, analysis) & _reads(group, analysis)
            if other.options == group.options and shared and _independent(other, group):
                other.merge(group)
                break
        else:
            joined.append(group)
    return joined


def _reads(group: _Group, analysis: Analysis) -> set[tuple[Part | None, fx.Node]]:
    inside = set(group.nodes)
    return {
        (part_of(node), source)
        for node in group.nodes
        for source in node.all_input_nodes
        if source not in inside and source not in analysis.state and tensor_of(source) is not None
    }
