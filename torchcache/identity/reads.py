"""What a piece of code reads from outside itself: names of attributes, globals, and objects read as a whole."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import operator
import sys
import types
from typing import Any

from torch import nn

# Stands among the names that code assigns to for those that only the running code knows.
ANY = "*"

# Calls that read all of their first argument; True where they read all that is within it, too.
READERS = {
    "vars": False, "dir": False, "str": False, "repr": False, "ascii": False, "format": False, "print": False,
    "asdict": True, "astuple": True, "replace": True, "fields": False, "deepcopy": True, "copy": False,
    "dumps": True, "dump": True, "pformat": True, "pprint": True, "getmembers": False,
}  # fmt: skip
READERS_OF_GLOBALS = frozenset({"vars", "dir", "str", "repr", "ascii", "format", "print"})
DISPLAYS = frozenset({"str", "repr", "ascii", "format", "print"})
# Methods that take attributes of their arguments by names in a text.
FORMATS = frozenset({"format", "format_map", "vformat", "get_field"})
GETTERS = frozenset({"getattr", "__getattr__", "__getattribute__", "getattr_static"})
DELETERS = frozenset({"delattr", "__delattr__"})
SETTERS = DELETERS | {"setattr", "__setattr__"}
MUTATORS = frozenset(
    "append extend insert add update setdefault pop popitem popleft appendleft clear remove discard sort".split()
)


# Attributes by which all of an object is read, and all globals of a function or a frame.
WHOLES = frozenset({"__dict__", "__getstate__", "__reduce__", "__reduce_ex__"})
SCOPES = frozenset({"__globals__", "f_globals", "f_locals", "f_back"})
ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb"})
LOOKUPS = frozenset({"get", "pop", "setdefault", "__getitem__", "__contains__"})
# Of sys: whatever they are, they are only written to.
STREAMS = frozenset({"stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"})

# What may read anything, and what of. Where it is used at once in a form that is understood, it reads what it is
# seen to read there; in any other use it may read all.
_WATCHED = {
    **dict.fromkeys(GETTERS | {"attrgetter", "methodcaller", "hasattr", "asdict", "astuple", "deepcopy"}, "getter"),
    "getmembers": "getter",
    **dict.fromkeys(("__import__", "import_module", "resolve_name"), "module"),
    **dict.fromkeys(("_getframe", "currentframe"), "scope"),
    **dict.fromkeys(ENVIRONMENT, "environment"),
}
_WATCHED_BUILTINS = {
    **dict.fromkeys(("vars", "dir", "locals"), "getter"),
    **dict.fromkeys(("globals", "eval", "exec"), "scope"),
}
_WATCHED_ATTRIBUTES = {**dict.fromkeys(GETTERS - {"getattr"}, "getter"), **dict.fromkeys(ENVIRONMENT, "environment")}


def watched(symbol: tuple[Any, ...]) -> str:
    """What may be read by a value: "getter", anything; "scope", globals too; "environment"; "module"; or nothing."""
    if symbol[0] == "lookup":
        return "environment"
    if symbol[0] == "attr":
        return _WATCHED_ATTRIBUTES.get(symbol[1], "")
    if symbol[0] != "global" or not symbol[2]:
        return ""
    last, owners = symbol[2][-1], (*symbol[1:2], *symbol[2][:-1])
    path = (*owners, last)
    if path[-2:] in (("sys", "modules"), ("pydoc", "locate")) or path[-3:] == ("sys", "modules", "get"):
        return "module"
    builtin = owners in (("",), ("", "builtins"), ("builtins",))
    return _WATCHED.get(last) or (_WATCHED_BUILTINS.get(last, "") if builtin else "")


# Under their own names code that calls them is understood; under others they are found by what they are.
_READERS = frozenset(
    {
        getattr, hasattr, vars, dir, locals, object.__getattribute__, nn.Module.__getattr__, operator.attrgetter,
        operator.methodcaller, inspect.getattr_static, inspect.getmembers, copy.copy, copy.deepcopy,
        dataclasses.asdict, dataclasses.astuple, dataclasses.replace, __import__, importlib.import_module,
    }
)  # fmt: skip
_READERS_OF_SCOPES = frozenset({globals, eval, exec, sys._getframe, inspect.currentframe})
# Of these classes they are: others are not asked for their hash, which may be code of the user's own.
_CLASSES_OF_READERS = frozenset(map(type, _READERS | _READERS_OF_SCOPES))


def is_reader(value: Any) -> bool:
    """Whether a function reads what it is given by names that only the running code knows."""
    return type(value) in _CLASSES_OF_READERS and (value in _READERS or value in _READERS_OF_SCOPES)


def is_reader_of_scopes(value: Any) -> bool:
    """Whether a reader may read the globals of whoever calls it."""
    return type(value) in _CLASSES_OF_READERS and value in _READERS_OF_SCOPES


def holds_readers(module: types.ModuleType) -> bool:
    """Whether a module is one in which readers are found by their names."""
    return any(map(is_reader, list(vars(module).values())))


@dataclasses.dataclass(frozen=True, order=True)
class Chain:
    """Something that code reads by a global name or imports itself.

    Parameters
    ----------
    module : str
        The module that is imported for it, with its leading dots where it is relative; empty for a global name.
    names : tuple of str
        The global or imported name, then the attributes taken from it.
    """

    module: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(self.names) or self.module


@dataclasses.dataclass(frozen=True)
class Reads:
    """What one code object reads, the code nested in it included.

    Attributes
    ----------
    digest : bytes
        16 bytes over its instructions, without line numbers, docstrings and the names of files.
    names : frozenset of str
        Attributes that it reads from any object.
    used : frozenset of str
        Attributes and globals that it uses for more than to take attributes of them.
    used_first : bool
        Whether it uses its first argument so.
    items : frozenset of (str, str)
        Attributes from which it takes one item at once, each with the item's key.
    chains : tuple of Chain
        Globals and imports, each as far as the code takes attributes from it.
    types : frozenset of Chain
        Those of them that are only asked for as types, in ``isinstance`` or ``super``.
    whole, deep : frozenset of str
        Attributes whose objects are read under names that only the running code knows; deep, with all they hold.
    whole_chains : frozenset of Chain
        The same for globals.
    whole_first : bool
        The same for the first argument, ``self`` in a method.
    anything : bool
        The same for objects that cannot be told.
    scope : bool
        Whether it reads globals under names that only the running code knows.
    handed : tuple of (Chain, frozenset of str, bool)
        Calls, the attributes passed to them, and whether the first argument is.
    written : frozenset of str
        Attributes and globals that it sets or mutates, and variables that it closes over (``closed_over``).
    texts : frozenset of str
        Its constants that may be names of environment variables, or begin or end one.
    variables : frozenset of str
        Environment variables that it reads, by names that are constants.
    keys : frozenset of Chain
        Globals that are such names.
    environment : bool
        Whether it reads variables by names that cannot be told.
    modules : bool
        Whether it takes modules by names that cannot be told.
    scopes : bool
        Whether it reads globals of other functions under names that only the running code knows.
    searched : frozenset of str
        Those of ``whole`` and ``deep`` under which objects stand that are read for more than to be displayed.
    given : frozenset of str
        Texts by which it may name what an object that it makes holds: keywords of calls, keys and others.
    """

    digest: bytes
    names: frozenset[str]
    used: frozenset[str]
    used_first: bool
    items: frozenset[tuple[str, str]]
    chains: tuple[Chain, ...]
    types: frozenset[Chain]
    whole: frozenset[str]
    deep: frozenset[str]
    whole_chains: frozenset[Chain]
    whole_first: bool
    anything: bool
    scope: bool
    handed: tuple[tuple[Chain, frozenset[str], bool], ...]
    written: frozenset[str]
    texts: frozenset[str]
    variables: frozenset[str]
    keys: frozenset[Chain]
    environment: bool
    modules: bool
    scopes: bool
    searched: frozenset[str]
    given: frozenset[str]


def closed_over(variable: str) -> str:
    """What a variable of a function around is called among what code writes: no attribute has such a name."""
    return f"nonlocal {variable}"


def modules_named(name: frozenset[tuple[Any, ...]], top: bool = False) -> frozenset[tuple[Any, ...]]:
    """What code gets by a value that names a module: that module, or the package at its top, as a global."""
    texts = {str(symbol[1]) for symbol in name if symbol[0] == "const"}
    return frozenset(("global", text.partition(".")[0] if top else text, ()) for text in texts)
