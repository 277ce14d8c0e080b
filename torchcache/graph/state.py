"""The state that a region reads, found in its marked module at every call, so that compiled graphs need not pass it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from torchcache.digest.cpu import digest_bytes
from torchcache.dynamo import source_of
from torchcache.identity.state import State

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


class Places:
    """Where modules hold the state of a region: what tells it from others where the user's own name stands for both.

    Parameters
    ----------
    modules : sequence of (nn.Module or None)
        The modules, held weakly.
    """

    def __init__(self, modules: Sequence[nn.Module | None]) -> None:
        self._modules = [weakref.ref(module) for module in modules if module is not None]
        self._given: list[int] = []
        self._held: list[tuple[ModuleState, list[int]]] = []
        self._text = ""
        self._elsewhere: list[int] = []
        self._rest = State()

    def digest(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """16 bytes that name the places of ``tensors``, and the contents of those that no module holds."""
        if [*map(id, tensors)] != self._given or self.gone():
            self._find(tensors)
        rest = self._rest.current([tensors[index] for index in self._elsewhere]) if self._elsewhere else b""
        return digest_bytes(self._text.encode("utf-8", "surrogatepass") + rest)

    def names(self, tensors: Sequence[torch.Tensor]) -> list[str]:
        """What people call those of ``tensors`` that a module holds."""
        modules = [reference() for reference in self._modules]
        held = [pair for module in modules if module is not None for pair in _named(module)]
        found = {id(tensor): ".".join(path) for path, tensor in held}
        return [found[id(tensor)] for tensor in tensors if id(tensor) in found]

    def gone(self) -> bool:
        """Whether there are other tensors in those places by now."""
        try:
            return any([*map(id, held.tensors())] != ids for held, ids in self._held)
        except LookupError:
            return True

    def _find(self, tensors: Sequence[torch.Tensor]) -> None:
        self._given = [*map(id, tensors)]
        modules = [reference() for reference in self._modules]
        homes: dict[int, tuple[int, tuple[str, ...]]] = {}
        for number, module in enumerate(modules):
            for path, tensor in _named(module) if module is not None else ():
                homes.setdefault(id(tensor), (number, path))
        found = [homes.get(tensor) for tensor in self._given]
        self._text = repr(found)
        self._elsewhere = [index for index, home in enumerate(found) if home is None]
        self._held = []
        for number, module in enumerate(modules):
            here = {
                home[1]: tensor for home, tensor in zip(found, self._given, strict=True) if home and home[0] == number
            }
            self._held.append((ModuleState(module, tuple(here)), [*here.values()]))


def _named(module: nn.Module) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """The tensors that a module holds, each under all of its paths."""
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            yield tuple(name.split(".")), tensor


def find_state(nodes: Sequence[fx.Node], module: nn.Module | None) -> dict[fx.Node, tuple[str, ...]]:
    """Those of the graph's inputs ``nodes`` that ``module`` holds, with their paths in it."""
    if module is None:
        return {}
    held: dict[int, list[tuple[str, ...]]] = {}
    for path, tensor in _named(module):
        held.setdefault(id(tensor), []).append(path)
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
