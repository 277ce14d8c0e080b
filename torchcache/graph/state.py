"""The state that a region reads, found in its marked module at every call, so that compiled graphs need not pass it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence

import torch
from torch import fx, nn

from torchcache.dynamo import source_of

__all__ = ["ModuleState", "Paths", "find_state"]

Paths = tuple[tuple[str, ...], ...]

_STEP = re.compile(r"_(modules|parameters|buffers)\['([^']+)'\]")


class ModuleState:
    """Parameters and buffers of a module, found by their paths: whoever replaces one is followed.

    Parameters
    ----------
    module : nn.Module or None
        The module, held weakly; ``None`` where there are no paths.
    paths : tuple of tuple of str
        For each tensor the names that lead to it, its own last.
    """

    def __init__(self, module: nn.Module | None, paths: Paths) -> None:
        self._module = weakref.ref(module) if module is not None else None
        places: dict[tuple[str, ...], int] = {(): 0}
        # Each module is found once, through the one that holds it.
        self._steps: list[tuple[int, str]] = []
        for path in paths:
            for end in range(1, len(path)):
                if path[:end] not in places:
                    places[path[:end]] = len(places)
                    self._steps.append((places[path[: end - 1]], path[end - 1]))
        self._held = [(places[path[:-1]], path[-1]) for path in paths]

    def tensors(self) -> list[torch.Tensor]:
        """The tensors as they are; none where the module is gone.

        Raises
        ------
        LookupError
            Where one is not there any more.
        """
        module = self._module() if self._module is not None else None
        if module is None:
            return []
        modules = [module]
        for place, name in self._steps:
            modules.append(modules[place]._modules[name])  # type: ignore[arg-type]
        found = []
        for place, name in self._held:
            holder = modules[place]
            tensor = holder._parameters.get(name)
            found.append(holder._buffers[name] if tensor is None else tensor)
        return found  # type: ignore[return-value]


def find_state(nodes: Sequence[fx.Node], module: nn.Module | None) -> dict[fx.Node, tuple[str, ...]]:
    """Those of the graph's inputs ``nodes`` that ``module`` holds, with their paths in it."""
    if module is None:
        return {}
    held: dict[int, list[tuple[str, ...]]] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        held.setdefault(id(tensor), []).append(tuple(name.split(".")))
    found = {}
    for node in nodes:
        source = source_of(node)
        if source is None:
            continue
        way = tuple(name for _, name in _STEP.findall(source.name))
        # Of a tensor with several names it is the one by which the graph knows it.
        for path in held.get(id(source.example), ()):
            if way[-len(path) :] == path:
                found[node] = path
    return found
