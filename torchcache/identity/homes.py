"""Whose code is it: read by its bytecode, or named by the version of what it belongs to."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
import types
from typing import Any

# Too large to read, and versioned with care. Patches of them are read all the same.
_NAMED = frozenset({"torch", "numpy", "torchcache", "builtins"})

# Parts of the standard library that look at nothing of what they are given but by its own methods.
_HARMLESS = frozenset("math cmath itertools functools operator contextlib warnings logging typing time collections "
                      "builtins random os enum types abc sys numbers".split())  # fmt: skip

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement or by code

_STANDARD = tuple(
    os.path.realpath(path) + os.sep for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
)
_SITE = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


@functools.lru_cache(maxsize=8192)
def is_named(module: str) -> bool:
    """Whether the code of ``module`` is named by a version: torch, numpy, the standard library, torchcache.

    Examples
    --------
    >>> is_named("torch.nn.functional"), is_named("os.path"), is_named("transformers")
    (True, True, False)
    """
    top = module.partition(".")[0]
    if top in _NAMED:
        return True
    if top not in sys.stdlib_module_names or top == "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if not isinstance(file, str):  # built in, or frozen
        return module in sys.builtin_module_names or top in sys.builtin_module_names or module not in sys.modules
    file = os.path.realpath(file)
    return file.startswith(_STANDARD) and not any(part in file for part in _SITE)


def module_of(kind: type) -> str:
    """Name of the module that a class says it is of; some classes of C say it of their objects instead."""
    module = kind.__module__
    return module if type(module) is str else "builtins"


@functools.lru_cache(maxsize=1024)
def file_digest(module: str) -> bytes:
    """16 bytes over the file of ``module`` and, for an installed package, over the list of hashes it came with."""
    found = hashlib.blake2b(digest_size=16)
    for path in (getattr(sys.modules.get(module), "__file__", None), _record_of(module.partition(".")[0])):
        try:
            with open(path or "", "rb") as file:
                found.update(file.read())
        except OSError:  # made by code, or inside an archive
            found.update(b"none")
    return found.digest()


@functools.lru_cache(maxsize=1024)
def _record_of(top: str) -> str:
    """The file in which an installer notes the hashes of a package's files; empty where there is none."""
    file = getattr(sys.modules.get(top), "__file__", None)
    if not isinstance(file, str):
        return ""
    inside = os.path.basename(file).startswith("__init__.")
    site = os.path.dirname(os.path.dirname(file) if inside else file)
    plain = top.lower().replace("-", "_")
    try:
        names = [name for name in os.listdir(site) if name.endswith(".dist-info")]
    except OSError:
        return ""
    records = [os.path.join(site, name, "RECORD") for name in sorted(names)]
    for name, record in zip(sorted(names), records, strict=True):
        if name.partition("-")[0].lower().replace("-", "_") == plain:
            return record
    return next((record for record in records if _lists(record, top)), "")  # under another name than it is imported by


def _lists(record: str, top: str) -> bool:
    """Whether an installer's list names a file of the package, or the module, ``top``."""
    try:
        with open(record, encoding="utf-8", errors="replace") as file:
            return any(line.startswith((f"{top}/", f"{top}.py,")) for line in file)
    except OSError:
        return False


def version_of(module: str) -> str:
    """The version that names the code of ``module``; a local build tag ("+cpu", "+cu130") names the same source."""
    top = module.partition(".")[0]
    version = vars(sys.modules[top]).get("__version__") if top in sys.modules else None
    if isinstance(version, str):
        return str(version).partition("+")[0]
    return ".".join(map(str, sys.version_info[:2]))


def home_of(function: types.FunctionType) -> str:
    """Name of the module that ``function`` was defined in, by its globals; code cannot misstate these."""
    name = function.__globals__.get("__name__", "")
    return name if isinstance(name, str) else ""


def beneath(function: Any) -> Any:
    """The original beneath wrappers of torchcache's own."""
    for _ in range(64):
        held = getattr(function, "__dict__", None)
        if type(held) is not dict or "torchcache_function" not in held:
            break
        function = held["torchcache_function"]
    return function


def is_class(value: Any) -> bool:
    """Whether a value is a class, without asking the value."""
    return type in type(value).__mro__


def beneath_class(kind: type) -> type:
    """The user's class, where torchcache made a subclass of it for one instance."""
    while isinstance(base := vars(kind).get("torchcache_base"), type):
        kind = base
    return kind


def named_class(kind: type) -> bool:
    """Whether a version names the code of ``kind``; classes of code without a module claim to be builtins."""
    module = module_of(kind)
    if not is_named(module):
        return False
    return not (module == "builtins" and kind.__flags__ & _HEAP_TYPE)


def is_foreign(member: Any) -> bool:
    """Whether a function or class that stands in a named module is somebody else's."""
    member = beneath(member)
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    if isinstance(member, property):
        member = member.fget
    while isinstance(member, types.FunctionType):
        if not is_named(home_of(member)):
            return True
        member = vars(member).get("__wrapped__")  # of one that torch decorates
    return isinstance(member, type) and not named_class(member)


@functools.lru_cache(maxsize=8192)
def is_installed(module: str) -> bool:
    """Whether the code of ``module`` lies where packages are installed, as opposed to the user's own project.

    Modules that an extension of C makes have no file: they lie where the package does that they are of. Any folder that
    an installer was told to use has its list of a package's files.
    """
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    files = (getattr(sys.modules.get(name), "__file__", None) for name in names)
    file = next((file for file in files if isinstance(file, str)), None)
    return file is not None and (any(part in os.path.realpath(file) for part in _SITE) or bool(_record_of(parts[0])))


def looks_inside(callee: Any) -> bool:
    """Whether what is called is code that is not read and may look at all of what it is given."""
    if isinstance(callee, types.FunctionType):
        home = home_of(callee)
    elif isinstance(callee, (type, types.BuiltinFunctionType)):
        home = str(getattr(callee, "__module__", "") or "")
    else:
        return False
    top = home.partition(".")[0].lstrip("_")
    if isinstance(callee, types.FunctionType) and not is_named(home):
        return False
    return is_named(home) and top not in _HARMLESS and top not in ("torch", "numpy", "torchcache")
