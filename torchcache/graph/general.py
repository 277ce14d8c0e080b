"""A graph that was traced for one number of rows as one for any number, where the shapes in it say that it is."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from torchcache import dynamo
from torchcache.dynamo import ENTER_AUTOCAST, EXIT_AUTOCAST, hint
from torchcache.graph.cut import dims_along
from torchcache.graph.fewest import operator_name

# Another number of rows: no size in a graph is a multiple of it by chance. Nothing but shapes is computed with it.
OTHER = 1_000_003
# Operators that take the sizes of what they make, and where among their arguments.
SIZED = dict.fromkeys("view reshape expand repeat new_zeros new_ones new_full".split(), 1)
SIZED |= dict.fromkeys("zeros ones full".split(), 0)
SHAPING = frozenset({"view", "reshape", "flatten", "unflatten"})
# Operators that make a tensor of each entry along a dimension, or of some, and where that is among their arguments.
SPLITTING = {"unbind": 1, "split": 2}
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


class _Unlike(Exception):  # noqa: N818 - an outcome
    """A graph that may compute something else with another number of rows."""


def generalised(
    original: fx.GraphModule, data: Sequence[torch.Tensor], others: Sequence[Any], first: int, fixed: int
) -> fx.GraphModule | None:
    """``original`` with its number of rows read off an input; ``None`` where it may compute something else then.

    With the traced number of rows it is what was traced. With another one every tensor has as many dimensions as
    before, of which at most one has grown, and one of each that follows from rows.

    Parameters
    ----------
    original : fx.GraphModule
        The graph of a region.
    data, others : sequence
        What it takes, as traced: first the data, then state and sizes.
    first : int
        The first of ``data`` that has rows.
    fixed : int
        The number of rows, as traced.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(original.graph, {}))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        size = graph.call_method("size", (inputs[first], 0))
    walk = _Walk(size, fixed)
    try:
        with _unheard(), dynamo.no_mode(), dynamo.FakeTensorMode(), torch.no_grad(), walk:
            for place, (node, value) in enumerate(zip(inputs, [*data, *others], strict=True)):
                walk.give(node, value, place < len(data))
            for node in graph.nodes:
                walk.visit(node)
    except Exception:  # whatever an operator raises on another number of rows
        return None
    if not size.users:
        graph.erase_node(size)
    return fx.GraphModule({}, graph, "Region")


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Have torch log no error of an operator that does not run on tensors without data: here it is an answer."""
    log = logging.getLogger(dynamo.FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _Walk(contextlib.ExitStack):
    """Runs a graph with two numbers of rows side by side, on tensors without data."""

    def __init__(self, size: fx.Node, fixed: int) -> None:
        super().__init__()
        self._size, self._fixed = size, fixed
        self._values: dict[fx.Node, tuple[Any, Any]] = {size: (fixed, OTHER)}
        # Of each node, which dimensions of its tensors have grown.
        self._grown: dict[fx.Node, set[tuple[int, ...]]] = {size: set()}
        self._entered: dict[fx.Node, contextlib.ExitStack] = {}

    def give(self, node: fx.Node, value: Any, has_rows: bool) -> None:
        """Take an input as traced."""
        if not isinstance(value, torch.Tensor):
            self._note(node, hint(value), hint(value))
            return
        shape, stride = [*map(hint, value.shape)], [*map(hint, value.stride())]
        shapes = [shape, [OTHER, *shape[1:]] if has_rows and shape and shape[0] == self._fixed else shape]
        self._note(node, *(torch.empty_strided(s, stride, dtype=value.dtype, device=value.device) for s in shapes))

    def visit(self, node: fx.Node) -> None:
        """Run a node; raises where what it makes of the two is not alike."""
        if node in self._values:
            return
        if node.op == "output":
            if not all(self._grown[source] == {(0,)} for source in node.all_input_nodes):
                raise _Unlike
        elif node.target is EXIT_AUTOCAST:
            self._entered.pop(node.all_input_nodes[0]).close()
        elif node.target is ENTER_AUTOCAST:
            self._entered[node] = self.enter_context(contextlib.ExitStack())
            self._entered[node].callback(EXIT_AUTOCAST, ENTER_AUTOCAST(*node.args))
        else:
            rows = any(dims for source in node.all_input_nodes for dims in self._grown[source])
            if rows and self._splits(node):  # as many tensors as there are rows take minutes
                raise _Unlike
            self._replace(node, rows)
            self._note(node, self._run(node, 0), self._run(node, 1))
            if rows and (() in self._grown[node] or self._meet(node)):
                raise _Unlike

    def _splits(self, node: fx.Node) -> bool:
        """Whether an operator takes rows apart, or goes through them one by one."""
        name, source = operator_name(node), node.all_input_nodes[0]
        tensor, place = self._values[source][0], SPLITTING.get(name)
        if place is None or not isinstance(tensor, torch.Tensor):
            return name in RECURRENT
        dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
        return not isinstance(dim, int) or any(dim % tensor.ndim in dims for dims in self._grown[source])

    def _meet(self, node: fx.Node) -> bool:
        """Whether an operator is known to have rows read each other, or to put them elsewhere."""
        source = node.all_input_nodes[0]
        if not isinstance(tensor := self._values[source][0], torch.Tensor):
            return False
        grown = {dim for dims in self._grown[source] for dim in dims}
        if any(not isinstance(dim, int) or dim % tensor.ndim in grown for dim in dims_along(node)):
            return True
        made = self._values[node][0]
        return operator_name(node) in SHAPING and self._before(node, made) != self._before(source, tensor)

    def _before(self, node: fx.Node, tensor: torch.Tensor) -> set[int]:
        """How many entries of each row lie in a row with those of others."""
        return {math.prod(tensor.shape[: dims[0]]) for dims in self._grown[node] if dims}

    def _replace(self, node: fx.Node, rows: bool) -> None:
        """Have a node that takes the number of rows for the first size read it off the input."""
        name, args = operator_name(node), [*node.args]
        place = SIZED.get(name)
        # Of what has no rows it is not their number that a view begins with; nor is it how often rows are repeated.
        if (
            place is None
            or len(args) <= place
            or (name in ("view", "reshape", "repeat") and rows == (name == "repeat"))
        ):
            return
        given = args[place]
        sizes = [*given] if isinstance(given, (tuple, list)) else [given]
        if sizes and type(sizes[0]) is int and sizes[0] == self._fixed:
            sizes[0] = self._size
            args[place] = tuple(sizes) if isinstance(given, (tuple, list)) else self._size
            node.args = tuple(args)

    def _run(self, node: fx.Node, which: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._values[source][which])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op != "call_function" or not callable(node.target):
            raise _Unlike
        return node.target(*args, **kwargs)

    def _note(self, node: fx.Node, one: Any, other: Any) -> None:
        self._values[node] = one, other
        self._grown[node] = {self._dims(*pair) for pair in _pairs(one, other)}

    def _dims(self, one: Any, other: Any) -> tuple[int, ...]:
        """Which dimensions have grown, each as the rows have: one at most."""
        if not isinstance(one, torch.Tensor):
            if one != other:
                raise _Unlike
            return ()
        dims = tuple(dim for dim, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if len({*sizes}) > 1)
        if len(dims) > 1 or any(one.shape[dim] * OTHER != other.shape[dim] * self._fixed for dim in dims):
            raise _Unlike
        return dims


def _pairs(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(one, (tuple, list)):
        for pair in zip(one, other, strict=True):
            yield from _pairs(*pair)
    else:
        yield one, other
