"""Frozen state goes past the compiled graph: a graph's caller hands it to the regions directly.

Compilers pay for every input of a graph in every call, and a backbone has hundreds of parameters that only its
region reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from torchcache.graph.region import GraphRegion
from torchcache.lookup.op import LOOKUP

__all__ = ["feed_state"]

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
    named = {region.name: region for region in regions}
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    position = {node: index for index, node in enumerate(inputs)}
    fed: list[GraphRegion] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is not LOOKUP:
            continue
        tensors, sizes, name = node.args
        region = named[name]
        held = [index for index in region.plan.positions("state") if tensors[index] in position]
        taken = [index for index in held if _is_static(region.plan.inputs[index])]
        if taken:
            region.take_state(taken, [position[tensors[index]] for index in taken])
            node.args = ([tensor for index, tensor in enumerate(tensors) if index not in set(taken)], sizes, name)
            fed.append(region)
    if fed:
        module.recompile()

    def feed(arguments: Sequence[Any]) -> None:
        for region in fed:
            region.feed(arguments)

    return feed


def _is_static(state: torch.Tensor) -> bool:
    return not any(isinstance(size, torch.SymInt) for size in state.shape)
