"""Whose code a module is, and which names a piece of code reads."""

from __future__ import annotations

import dataclasses
import dis
import functools
import os
import sys
import sysconfig
import types
from typing import Any

__all__ = ["Name", "installed", "is_installed_class", "is_machinery", "names_read"]

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not in C


def _installation_folders() -> tuple[str, ...]:
    """Those of Python's own environment, and of others it reaches: a base environment's, the user's, a system's."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib")}
    folders.update(path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages"))
    return tuple(sorted(os.path.realpath(path) + os.sep for path in folders))


_INSTALLED = _installation_folders()


@functools.lru_cache(maxsize=4096)
def installed(module: str) -> bool:
    """Whether ``module`` belongs to an installed package or to Python, so that a version names its code."""
    if module == "torchcache" or module.startswith("torchcache."):
        return True
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None)
    if file is None:
        return module in sys.builtin_module_names or module == "builtins"
    package = sys.modules.get(module.partition(".")[0])
    inside = os.path.realpath(file).startswith(_INSTALLED)
    standard = module.partition(".")[0] in sys.stdlib_module_names
    return inside and (standard or isinstance(getattr(package, "__version__", None), str))


@dataclasses.dataclass(frozen=True, order=True)
class Name:
    """Something that code reads by name from outside itself.

    Parameters
    ----------
    module : str
        The module it imports for that, with its leading dots where it is relative; empty for a global name.
    chain : tuple of str
        The names in turn: the global or imported one, then the attributes taken from it.
    """

    module: str
    chain: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def names_read(code: types.CodeType) -> tuple[Name, ...]:
    """The globals that ``code`` reads and what it imports itself, nested code included."""
    found: set[Name] = set()
    imported: dict[str, Name] = {}
    constants: list[Any] = [0, None]
    module, whole = "", False
    chain: Name | None = None
    bound: Name | None = None
    for instruction in dis.get_instructions(code):
        operation, argument = instruction.opname, instruction.argval
        if operation in ("CACHE", "PUSH_NULL"):
            continue
        if chain is not None:
            if operation in ("LOAD_ATTR", "LOAD_METHOD"):
                chain = Name(chain.module, (*chain.chain, argument))
                continue
            found.add(chain)
            chain = None
        names = argument if isinstance(argument, tuple) else (argument,)
        if operation in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constants = [constants[-1], argument]
        elif operation == "IMPORT_NAME":
            module, whole = "." * constants[0] + argument, not constants[1]
            bound = Name(module.partition(".")[0], ())
        elif operation == "IMPORT_FROM":
            bound = Name(module, () if whole else (argument,))
        elif operation.startswith("STORE_") and bound is not None:
            imported[names[0]] = bound
            if operation == "STORE_DEREF":  # read by nested code
                found.add(bound)
            bound = None
            chain = imported.get(names[-1]) if "LOAD" in operation else None
        elif operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = Name("", names)
        elif operation.startswith("LOAD_FAST"):
            found.update(imported[name] for name in names[:-1] if name in imported)
            chain = imported.get(names[-1])
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(names_read(constant))
    return tuple(sorted(found))


def is_installed_class(cls: type) -> bool:
    """Whether a version names the code of ``cls``; classes of code without a module claim to be builtins."""
    made_by_code = bool(cls.__flags__ & HEAP_TYPE)
    return installed(cls.__module__) and not (cls.__module__ == "builtins" and made_by_code)


def is_machinery(value: Any) -> bool:
    """Loggers, locks and the like: named by code, without a say in what it computes."""
    return (type(value).__module__ or "").partition(".")[0] in (
        "logging",
        "_thread",
        "threading",
        "typing",
        "torchcache",
    )
