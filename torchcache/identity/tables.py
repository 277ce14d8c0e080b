"""Tables of packages with an entry for the class of every model that was made: a program reads its own alone."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from torchcache.identity.homes import beneath_class

__all__ = ["OwnEntries"]

# Where each is. Its keys are texts of classes.
_TABLES = (("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY"),)


class OwnEntries:
    """What code of a module finds in such tables, whichever other models the process made.

    Parameters
    ----------
    module : nn.Module
        The root of the tree.
    """

    def __init__(self, module: nn.Module) -> None:
        self._classes = {str(beneath_class(type(inner))) for inner in nn.Module.modules(module)}
        self._found: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """A table of the same class with the module's own entries; anything else as it is."""
        if not any(_is_global(value, home, name) for home, name in _TABLES):
            return value
        own = self._found.get(id(value))
        if own is None:
            own = self._found[id(value)] = dict.__new__(type(value))
            dict.update(own, {key: entry for key, entry in dict.items(value) if key in self._classes})
        return own


def _is_global(value: Any, home: str, name: str) -> bool:
    module = sys.modules.get(home)
    return module is not None and isinstance(value, dict) and vars(module).get(name) is value
