"""The graphs under activation checkpointing in a graph of Dynamo's: found, and run as their code is.

A compiler gives what is computed again the random numbers of the first time; what Dynamo puts into a graph does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.utils.checkpoint import checkpoint


def bodies(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graphs under checkpointing, the innermost first; their inputs known by what the outer graph passes."""
    for node in _calls(module):
        body = node.args[0] if node.args else None
        inner = getattr(module, str(body.target), None) if isinstance(body, fx.Node) and body.op == "get_attr" else None
        if not isinstance(inner, fx.GraphModule):
            continue
        placeholders = [found for found in inner.graph.nodes if found.op == "placeholder"]
        for placeholder, given in zip(placeholders, node.args[1:], strict=False):
            if isinstance(given, fx.Node) and given.op == "placeholder" and "grapharg" in given.meta:
                placeholder.meta.setdefault("grapharg", given.meta["grapharg"])
        yield from bodies(inner)
        yield inner


def run_as_code(module: fx.GraphModule) -> None:
    """Have a graph that runs as it is, with those in it, checkpoint as its code does."""
    for graph in (*bodies(module), module):
        calls = _calls(graph)
        for node in calls:
            node.target = _checkpoint
        if calls:
            graph.recompile()


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return [node for node in nodes if "checkpoint" in getattr(node.target, "__name__", "")]


def _checkpoint(body: fx.GraphModule, *args: Any, **settings: Any) -> Any:
    contexts = body.meta.get("_checkpoint_context_fn")  # where Dynamo keeps what a graph cannot hold
    settings |= {"use_reentrant": False} | ({"context_fn": contexts} if contexts is not None else {})
    return checkpoint(body, *args, **settings)
