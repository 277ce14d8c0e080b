"""Door 2: a ``torch.compile`` backend that caches the marked regions and hands the rest to another backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torchcache import dynamo
from torchcache.dynamo import takes_rows
from torchcache.errors import TorchcacheError
from torchcache.graph.frozen import is_number
from torchcache.graph.rewrite import cache_regions


@takes_rows
def torchcache_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    inner: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    compile_misses: bool | None = None,
    options: Mapping[str, Any] | None = None,
    **inner_options: Any,
) -> Callable[..., Any]:
    """Cache the frozen parts of marked modules in a graph and compile the rest.

    Used as ``torch.compile(model, backend=torchcache_backend)``, or by name as ``backend="torchcache"``.

    Parameters
    ----------
    module : torch.fx.GraphModule
        The graph that Dynamo traced.
    example_inputs : sequence
        Its inputs, as Dynamo gives them.
    inner : str or callable
        The backend for the rest: "inductor", "aot_eager", "eager", any registered name, or a callable.
    mode : str or None
        The inner backend's mode, as ``torch.compile`` takes it.
    compile_misses : bool or None
        Compile the cached part as well, before its first miss; ``None`` does so for Inductor only.
    options : mapping or None
        The options above by name, and beside them those of the inner backend.

    **inner_options
        The same, as keywords.

    Returns
    -------
    callable
        The compiled graph.

    Raises
    ------
    TorchcacheError
        When a mark cannot work; Dynamo passes it on inside its own error.
    """
    given = {**inner_options, **(options or {})}
    inner = given.pop("inner", inner)
    mode = given.pop("mode", mode)
    compile_misses = given.pop("compile_misses", compile_misses)
    if compile_misses is None:
        compile_misses = inner == "inductor"
    compile_graph = functools.partial(_compile, inner=inner, mode=mode, options=given)
    # A region's original is compiled when it first runs, for any number of rows.
    outcome = cache_regions(module, functools.partial(torch.compile, backend=compile_graph) if compile_misses else None)
    outcome.tell_of_nothing()
    smaller, kept = _without_unused_inputs(module)
    compiled = compile_graph(smaller, [example_inputs[position] for position in kept])
    dynamo.forget_originals(module.graph, smaller.graph)

    def run(*args: Any) -> Any:
        return compiled(*[args[position] for position in kept])

    return run


def _without_unused_inputs(module: fx.GraphModule) -> tuple[fx.GraphModule, list[int]]:
    """A copy of ``module`` without tensor inputs that no node reads, and the positions of those that stay.

    The graph itself keeps them: Dynamo reads from it what to pass.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    kept = [index for index, node in enumerate(inputs) if node.users or is_number(node)]
    for index in set(range(len(inputs))) - set(kept):
        copies[inputs[index]].meta = {}  # the graph keeps what is erased, and is to keep no input with it
        graph.erase_node(copies[inputs[index]])
    output = next(iter(reversed(graph.nodes)))
    output.meta = dict(next(iter(reversed(module.graph.nodes))).meta)
    copy = fx.GraphModule(module, graph)
    copy.meta.update(module.meta)
    return copy, kept


def _compile(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, inner: Any, mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    if callable(inner):
        compiled: Callable[..., Any] = inner(module, example_inputs, **options)
        return compiled
    if inner == "inductor":
        compiled = dynamo.inductor(mode, options)(module, example_inputs)
        return compiled
    backend = dynamo.backend_named(inner)
    if backend is None:
        raise TorchcacheError(f"torchcache: inner={inner!r} is none of torch.compiler.list_backends()")
    compiled = backend(module, list(example_inputs), **options)
    return compiled
