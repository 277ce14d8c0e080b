"""Whose code a module is, and which global names a piece of code reads."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
import types
from typing import Any

__all__ = ["global_names", "installed", "is_installed_class", "is_machinery"]

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not in C

_INSTALLED = tuple(
    os.path.realpath(path) + os.sep for path in {sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib")}
)


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


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The global names that ``code`` reads, each with the attributes taken from it, nested code included."""
    chains: set[tuple[str, ...]] = set()
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            if chain:
                chains.add(tuple(chain))
            chain = [instruction.argval]
        elif chain and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(instruction.argval)
        elif chain and instruction.opname not in ("CACHE", "PUSH_NULL"):
            chains.add(tuple(chain))
            chain = []
    if chain:
        chains.add(tuple(chain))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            chains.update(global_names(constant))
    return tuple(sorted(chains))


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
