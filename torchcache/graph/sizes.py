"""Symbolic sizes: what they were in the call that was traced, and how they follow the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

__all__ = ["BatchSymbol", "evaluate", "expression_of", "hint", "same_shape"]


class BatchSymbol:
    """How the size inputs of a graph follow the number of rows.

    Parameters
    ----------
    inputs : sequence of torch.Tensor
        The graph's tensor inputs, as traced.
    sizes : sequence of (int or SymInt)
        Its size inputs, as traced; they come after the tensors.
    row : int
        Which tensor input has the rows.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], sizes: Sequence[Any], row: int) -> None:
        self._row = row
        self._tensors = len(inputs)
        traced = inputs[row].shape[0]
        expression = expression_of(traced)
        # Sizes that happened to be equal get one symbol: where other dimensions have it too, it does not mean rows.
        others = [size for fake in inputs for size in fake.shape[1:]]
        shared = any(expression in expression_of(size).free_symbols for size in others)
        self._symbol = expression if isinstance(expression, sympy.Symbol) and not shared else None
        self._sizes = [expression_of(size) for size in sizes]

    @property
    def known(self) -> bool:
        """Whether the graph takes any number of rows."""
        return self._symbol is not None

    def follow(self, module: fx.GraphModule) -> fx.GraphModule:
        """A copy of the graph's module that reads the batch size from its row input and not from its size inputs.

        It is made outside the trace: Dynamo leaves code untraced that was made while it ran.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(module.graph, copies))
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_after(placeholders[-1]):
            count = graph.call_method("size", (placeholders[self._row], 0))
        for node, expression in zip(placeholders[self._tensors :], self._sizes, strict=True):
            if expression == self._symbol:
                node.replace_all_uses_with(count)
        return fx.GraphModule(module, graph, "Region")

    def fit(self, count: int, full: int, sizes: list[int]) -> tuple[int, list[int]]:
        """The rows to run for ``count`` rows, and the size inputs for that many.

        A graph with a symbolic batch runs any number from two on (one is specialised by Dynamo);
        one traced at a fixed batch runs only that.
        """
        if count == full:
            return full, sizes
        if self._symbol is None:
            return full, sizes
        run = max(count, 2)
        known = {self._symbol: run}
        fitted = []
        for size, expression in zip(sizes, self._sizes, strict=True):
            symbols = expression.free_symbols
            if self._symbol not in symbols:
                fitted.append(size)
            elif symbols == {self._symbol}:
                fitted.append(int(expression.xreplace(known)))
            else:
                return full, sizes
        return run, fitted

    @staticmethod
    def bind(inputs: Sequence[torch.Tensor], traced: Sequence[torch.Tensor]) -> dict[Any, int]:
        """The value of each symbol that is a dimension of an input."""
        known: dict[Any, int] = {}
        for given, fake in zip(inputs, traced, strict=True):
            for size, expected in zip(given.shape, fake.shape, strict=True):
                expression = expression_of(expected)
                if isinstance(expression, sympy.Symbol):
                    known[expression] = size
        return known


def expression_of(size: Any) -> Any:
    """The sympy expression of a traced size."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def hint(size: Any) -> int:
    """A traced size as it was in the call that was traced."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def evaluate(size: Any, known: dict[Any, int]) -> int:
    """The value of a traced size, given those of its symbols."""
    return int(expression_of(size).xreplace(known))


def same_shape(given: torch.Tensor, traced: torch.Tensor) -> bool:
    """Whether shapes are the very same, as expressions: nothing here may add a guard."""
    return [_origin(size) for size in given.shape] == [_origin(size) for size in traced.shape]


def _origin(size: Any) -> tuple[Any, int]:
    return expression_of(size), id(size.node.shape_env) if isinstance(size, torch.SymInt) else 0
