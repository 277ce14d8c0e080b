"""What a chain of names in code stands for, without importing anything."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from typing import Any

from torchcache.identity.homes import is_installed, is_named, module_of
from torchcache.identity.reads import Chain

MISSING = object()


class Resolved:
    """What a chain of names stands for in a scope.

    Attributes
    ----------
    value : Any
        The object, or ``MISSING``.
    rest : tuple of str
        Names that are taken from it and that modules do not resolve.
    bindings : list of (dict, str)
        Namespaces that were asked on the way, and for which name.
    """

    __slots__ = ("bindings", "rest", "value")

    def __init__(self) -> None:
        self.value: Any = MISSING
        self.rest: tuple[str, ...] = ()
        self.bindings: list[tuple[dict[str, Any], str]] = []


def resolve(chain: Chain, scope: dict[str, Any]) -> Resolved:
    """What ``chain`` stands for where ``scope`` holds the globals. Nothing is imported.

    What installed code takes from a module that imports on demand is ``MISSING``: others may have asked for it.
    """
    found = Resolved()
    names = list(chain.names)
    if chain.module:
        name = _absolute(chain.module, scope)
        found.bindings.append((sys.modules, name))
        value: Any = sys.modules.get(name, MISSING)
    else:
        found.bindings.append((scope, names[0]))
        value = scope.get(names[0], MISSING)
        if value is MISSING:
            builtin = scope.get("__builtins__")
            outer = builtin if isinstance(builtin, dict) else vars(sys.modules["builtins"])
            found.bindings.append((outer, names[0]))
            value = outer.get(names[0], MISSING)
        names.pop(0)
    installed = is_installed(str(scope.get("__name__") or ""))
    while names and isinstance(value, types.ModuleType):
        if installed and _imports_on_demand(value):
            return found
        members = object.__getattribute__(value, "__dict__")
        found.bindings.append((members, names[0]))
        inner = members.get(names[0], MISSING)
        if inner is MISSING:
            name = f"{members.get('__name__', '')}.{names[0]}"
            found.bindings.append((sys.modules, name))
            inner = sys.modules.get(name, MISSING)
            if inner is MISSING:
                if not is_named(str(members.get("__name__", ""))) and "__getattr__" in members:
                    inner = members["__getattr__"]
                else:
                    break
        value = inner
        names.pop(0)
    found.value, found.rest = value, tuple(names)
    return found


def _imports_on_demand(module: types.ModuleType) -> bool:
    """Whether a module is of a class that finds names when they are asked for; not torch's operators."""
    return hasattr(type(module), "__getattr__") and not is_named(module_of(type(module)))


def _absolute(name: str, scope: Mapping[str, Any]) -> str:
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    package = str(scope.get("__package__") or str(scope.get("__name__") or "").rpartition(".")[0])
    base = package.rsplit(".", level - 1)[0] if level > 1 else package
    rest = name[level:]
    return f"{base}.{rest}" if rest else base
