"""Door 1: a model whose marks are checked, put in eval mode where they are frozen, and cached at every call."""

from __future__ import annotations

from typing import TypeVar

from torch import fx, nn

from torchcache.errors import MarkError
from torchcache.graph.traced import traced_in
from torchcache.marks import marked_modules
from torchcache.modes import settle
from torchcache.regions import name_module, regions_in
from torchcache.store.connect import check_version
from torchcache.usefulness import note_mark
from torchcache.values.constants import type_name

M = TypeVar("M", bound=nn.Module)


def transform(model: M) -> M:
    """Cache the marked modules of ``model``, in place; call it once, before training.

    A mark that is frozen as a whole is looked up at every call. A mark that is partly trainable is traced at its first
    call with gradients, and its frozen part is looked up; where no gradients are recorded, all of it is, as is a mark
    in which nothing is frozen. The rest of the model runs as it is.

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
        When nothing is marked.
    StoreVersionError
        When a mark's cache directory was written by a newer torchcache.
    """
    if not isinstance(model, nn.Module):
        raise MarkError(f"torchcache.transform takes an nn.Module, not {type_name(model)}")
    marks = list(marked_modules(model))
    if not marks:
        raise MarkError(
            f"nothing in {type(model).__name__} is marked: decorate a class with @torchcache, or call "
            "torchcache.mark(model.backbone, freeze=True), before transform"
        )
    for path, module, mark in marks:
        directory = mark.options_for(module).directory
        if directory is not None:
            check_version(directory)
        name_module(module, path)
        note_mark(module, mark.name, path)
        settle(module)
    return model


def graphs(model: nn.Module) -> list[fx.GraphModule]:
    """The graphs of partly trainable marks, as far as these were called with gradients outside of ``torch.compile``.

    Parameters
    ----------
    model : nn.Module
        A model with marked modules in it, or a marked module.

    Returns
    -------
    list of torch.fx.GraphModule
        One for each time that a mark was traced; ``print(g.graph)`` shows the lookups.
    """
    return [graph for region in regions_in(model) for graph in traced_in(region)]
