"""Whole shapes in a graph as the sizes that they hold: of each it can be said what it follows from."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate


def spread_shapes(graph: fx.Graph) -> None:
    """Have what reads the whole shape of a tensor that is computed read its sizes: numbers where they are fixed."""
    known: dict[fx.Node, Any] = {}

    def put(value: Any) -> Any:
        return known.get(value, value) if isinstance(value, fx.Node) else value

    for node in list(graph.nodes):
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0] in known:
            known[node] = known[node.args[0]][node.args[1]]
        elif any(source in known for source in node.all_input_nodes):
            node.args, node.kwargs = map_aggregate(node.args, put), map_aggregate(node.kwargs, put)
        elif _is_whole(node) and all(_takes_sizes(user, node) for user in node.users):
            known[node] = _sizes(graph, node)
    for node in reversed(known):
        graph.erase_node(node)


def _is_whole(node: fx.Node) -> bool:
    """Whether a node gives the whole shape of a tensor that is computed."""
    source = node.args[0] if node.op == "call_method" and node.target == "size" and len(node.args) == 1 else None
    computed = isinstance(source, fx.Node) and source.op not in ("placeholder", "get_attr")
    return computed and not node.kwargs and isinstance(node.meta.get("example_value"), torch.Size)


def _takes_sizes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a tuple of sizes does as well for what reads a shape."""
    if user.target is operator.getitem:
        return type(user.args[1]) is int
    of_torch = user.op == "call_method" or str(getattr(user.target, "__module__", "")).partition(".")[0] == "torch"
    return of_torch and not (user.op == "call_method" and user.args[0] is node)


def _sizes(graph: fx.Graph, node: fx.Node) -> tuple[Any, ...]:
    found: list[Any] = []
    with graph.inserting_after(node):
        for dim, size in enumerate(node.meta["example_value"]):
            if isinstance(size, torch.SymInt):
                made = graph.call_method("size", (node.args[0], dim))
                made.meta = {**node.meta, "example_value": size}
                found.append(made)
            else:
                found.append(int(size))
    return tuple(found)
