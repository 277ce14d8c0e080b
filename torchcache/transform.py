"""Door 1: a model whose marked regions are cached and whose rest runs eagerly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx, nn

from torchcache.eager import traced_parts
from torchcache.errors import FingerprintError, MarkError
from torchcache.graph.marked import Mark
from torchcache.lookup.fingerprint import program_of
from torchcache.marks import marked_modules, resemble
from torchcache.modes import settle
from torchcache.store.connect import check_version
from torchcache.tracing import Traced, start_tracer

__all__ = ["graphs", "transform"]

M = TypeVar("M", bound=nn.Module)


def transform(model: M) -> M:
    """Cache the marked, frozen regions of ``model``, in place; call it once, before training.

    Marked modules are put in eval mode where they are frozen. The model is traced at its first call; torch's tracer
    is started here, which takes the best part of a second, once a process.

    Parameters
    ----------
    model : nn.Module
        A model with marked modules in it, or a marked module.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    MarkError
        When nothing is marked, when a mark has no frozen parameter, or when a mark's program has no identity;
        all problems of all marks in one message.
    StoreVersionError
        When a mark's cache directory was written by a newer torchcache.
    """
    if not isinstance(model, nn.Module):
        raise MarkError(f"torchcache.transform takes an nn.Module, not {model!r}")
    marks = list(marked_modules(model))
    if not marks:
        raise MarkError(
            f"nothing in {type(model).__name__} is marked: decorate a class with @torchcache, or call "
            "torchcache.mark(model.backbone, freeze=True), before transform"
        )
    problems = [problem for path, module, mark in marks if (problem := _problem(path, module, mark))]
    if problems:
        raise MarkError("\n".join(problems))
    for _, module, mark in marks:
        directory = mark.options_for(module).directory
        if directory is not None:
            check_version(directory)
        settle(module)
    start_tracer()
    holder = vars(model).get("forward")
    previous = holder.previous if isinstance(holder, TransformedForward) else holder
    vars(model)["forward"] = TransformedForward(model, previous)
    return model


def graphs(model: nn.Module) -> list[fx.GraphModule]:
    """The rewritten graphs of a transformed model or of a partly trainable marked module, as far as it was called.

    Parameters
    ----------
    model : nn.Module
        What ``transform`` returned, or a marked module.

    Returns
    -------
    list of torch.fx.GraphModule
        One for each time the model was traced; ``print(g.graph)`` shows the lookups.
    """
    found: list[fx.GraphModule] = []
    for module in model.modules():
        holder = vars(module).get("forward")
        if isinstance(holder, TransformedForward):
            found.extend(holder.traced.graphs)
        for traced in traced_parts(module):
            found.extend(traced.graphs)
    return found


class TransformedForward:
    """The ``forward`` of a transformed model.

    It refers to its module and nothing else, so that copies and pickles of the model are transformed themselves.
    """

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None) -> None:
        self.module = module
        self.previous = previous
        self._prepare()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        return self.traced(*args, **kwargs)

    @property
    def torchcache_function(self) -> Callable[..., Any]:
        """What runs beneath."""
        return type(self.module).forward if self.previous is None else self.previous

    @property
    def __signature__(self) -> inspect.Signature:
        if self.previous is not None:
            return inspect.signature(self.previous)
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "previous": self.previous}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _prepare(self) -> None:
        self.traced = Traced(self._plain, type(self.module).__name__, self.module)
        resemble(self, self.torchcache_function)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def _problem(path: str, module: nn.Module, mark: Mark) -> str | None:
    """Why a mark can never work, if so."""
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if trainable and len(trainable) == sum(1 for _ in module.parameters()):
        shown = ", ".join(trainable[:5]) + (f" and {len(trainable) - 5} more" if len(trainable) > 5 else "")
        return (
            f"{path} is marked, but nothing in it is frozen: trainable are {shown}. Call requires_grad_(False) on what "
            "you do not train, or torchcache.mark(module, freeze=True)"
        )
    if mark.options_for(module).persistent_module_hash is None:
        try:
            program_of(module, mark.function, path)
        except FingerprintError as error:
            return str(error)
    return None
