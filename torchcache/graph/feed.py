"""Frozen state goes past the compiled graph: a graph's caller hands it to the regions directly.

Compilers pay for every input of a graph in every call, and a backbone has hundreds of parameters that only its
region reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from torchcache.graph.region import GraphRegion
from torchcache.lookup.op import LOOKUP

__all__ = ["feed_state", "lookups_in", "static_state"]

Feed = Callable[[Sequence[Any]], None]


def feed_state(module: fx.GraphModule, regions: Sequence[GraphRegion]) -> Feed:
    """Take state that is an input of the graph out of the arguments of its lookups.

    Parameters
    ----------
    module : fx.GraphModule
        A graph with lookups, changed in place; its inputs stay the same.
    regions : sequence of GraphRegion
        What they call.

    Returns
    -------
    callable
        To be called with the graph's inputs before each call of the graph, on the same thread.
    """
    position = {node: index for index, node in enumerate(module.graph.find_nodes(op="placeholder"))}
    fed: list[GraphRegion] = []
    for node, region in lookups_in(module, regions):
        taken = static_state(region, node, position)
        if taken:
            sources = [position[node.args[0][index]] for index in taken]
            region.take_state(node, taken, sources)
            fed.append(region)
    if fed:
        module.recompile()

    def feed(arguments: Sequence[Any]) -> None:
        for region in fed:
            region.feed(arguments)

    return feed


def lookups_in(module: fx.GraphModule, regions: Sequence[GraphRegion]) -> Iterator[tuple[Any, GraphRegion]]:
    """The lookup nodes of a graph, with their regions."""
    named = {region.name: region for region in regions}
    for node in module.graph.find_nodes(op="call_function", target=LOOKUP):
        yield node, named[node.args[2]]


def static_state(region: GraphRegion, node: Any, inputs: Collection[fx.Node]) -> list[int]:
    """Which inputs of a region its lookup ``node`` gets from ``inputs`` and are state of fixed shapes."""
    given = dict(zip(region.given, node.args[0], strict=True))
    held = [index for index in region.plan.positions("state") if index in given and given[index] in inputs]
    return [index for index in held if not _varies(region.plan.inputs[index])]


def _varies(state: torch.Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for size in state.shape)
