"""A rewritten graph run as it is: operators eagerly, lookups as plain calls instead of through the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from torchcache.graph.feed import feed_state, lookups_in
from torchcache.graph.region import GraphRegion

__all__ = ["run_eagerly"]


def run_eagerly(module: fx.GraphModule, regions: Sequence[GraphRegion]) -> Callable[..., Any]:
    """What runs ``module``, a graph with lookups that is changed in place, as Dynamo calls it."""
    feed = feed_state(module, regions)
    # Who watches or transforms operators gets to see the op.
    watched, plain = _code_of(module), _code_of(_with_plain_calls(module, regions))
    modes, transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack

    def run(*args: Any) -> Any:
        feed(args)
        return watched(*args) if modes() or transforms() is not None else plain(*args)

    return run


def _with_plain_calls(module: fx.GraphModule, regions: Sequence[GraphRegion]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = fx.GraphModule(module, graph)
    for node, region in list(lookups_in(copy, regions)):
        node.target, node.args = region.__call__, node.args[:2]
    return copy


def _code_of(module: fx.GraphModule) -> Callable[..., Any]:
    """The forward that the graph's code defines, without what a ``GraphModule`` puts around it."""
    module.recompile()
    fx._lazy_graph_module._LazyGraphModule.force_recompile(module)
    forward: Callable[..., Any] = module.forward
    return forward
