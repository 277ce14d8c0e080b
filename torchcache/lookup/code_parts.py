"""What code consists of: functions, methods and classes, and what they read by name."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from torchcache.lookup.code import Name, installed, is_installed_class, names_read
from torchcache.lookup.parts import Describing, Parts, ignored, package

__all__ = ["parts_of_code"]

# What the interpreter, abc and dataclasses write on a class, which follows from the rest or says nothing.
_BOOKKEEPING = frozenset(
    {
        "__doc__",
        "__dict__",
        "__weakref__",
        "__module__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__slotnames__",
        "__firstlineno__",
        "__static_attributes__",
    }
)


def parts_of_code(value: Any, encoder: Describing) -> Parts | None:
    """Parts of a function, a class or a descriptor; ``None`` for anything else."""
    for kind, describer in _DESCRIBERS:
        if isinstance(value, kind):
            return describer(value, encoder)
    return None


def _function(value: types.FunctionType, encoder: Describing) -> Parts:
    """Code, defaults, closure, attributes, and what the user's own code names."""
    function = value
    while hasattr(function, "torchcache_function"):
        function = function.torchcache_function
    home = function.__globals__.get("__name__", "")
    own = not installed(home)
    yield "function"
    yield "" if own else home
    yield function.__qualname__
    for name in ("__code__", "__defaults__", "__kwdefaults__"):
        encoder.watch.attribute(function, name)
    yield "", function.__code__
    yield "", function.__defaults__
    yield "", function.__kwdefaults__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        if name != "__class__":  # what super() needs; the class itself is described with its module
            yield "cell"
            yield name, cell
    if not own:
        yield from package(home)
        return
    encoder.watch.namespace(vars(function))
    for name in sorted(vars(function)):
        if not ignored(name) and not name.startswith("__"):
            yield f"attribute {name}"
            yield name, vars(function)[name]
    for read in names_read(function.__code__):
        yield from _named(read, function.__globals__, encoder)


def _cell(value: types.CellType, encoder: Describing) -> Parts:
    try:
        held = value.cell_contents
    except ValueError:
        yield "empty"
        return
    encoder.watch.attribute(value, "cell_contents")
    yield "", held


def _code(value: types.CodeType, encoder: Describing) -> Parts:
    yield "code"
    yield value.co_code
    yield getattr(value, "co_exceptiontable", b"")
    for names in (value.co_names, value.co_varnames, value.co_cellvars, value.co_freevars):
        yield " ".join(names)
    yield str((value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags))
    for constant in value.co_consts:
        yield "", constant


def _named(name: Name, scope: Mapping[str, Any], encoder: Describing) -> Parts:
    """What a name stands for, and the modules on the way to it."""
    chain = list(name.chain)
    if name.module:
        module = _imported(name.module, scope)
        yield f"import {name.module}"
        if module is None:
            return
        value: Any = module
    else:
        encoder.watch.binding(scope, chain[0])
        if chain[0] not in scope:
            return
        value = scope[chain.pop(0)]
    while chain and isinstance(value, types.ModuleType):
        encoder.watch.binding(vars(value), chain[0])
        if chain[0] not in vars(value):
            break
        value = vars(value)[chain.pop(0)]
    yield "named"
    yield " ".join(name.chain)
    yield ".".join(name.chain), value


def _imported(name: str, scope: Mapping[str, Any]) -> types.ModuleType | None:
    """The module that an import statement in this scope gives; what cannot be imported fails where it is run."""
    try:
        if name.startswith("."):
            name = importlib.util.resolve_name(name, str(scope.get("__package__") or ""))
        return importlib.import_module(name)
    except Exception:
        return None


def _class(value: type, encoder: Describing) -> Parts:
    """A class: its name, and for the user's own all of its code."""
    yield "class"
    if is_installed_class(value):
        yield value.__module__
        yield value.__qualname__
        yield from package(value.__module__)
        if issubclass(value, nn.Module):
            yield from _patched_class(value, encoder)
            for home in sorted({base.__module__ for base in value.__mro__} | {"torch.nn.functional"}):
                yield "home", _home(home)
        return
    yield value.__qualname__
    encoder.watch.attribute(value, "__mro__")
    encoder.watch.namespace(vars(value))
    for base in value.__mro__[1:]:
        yield "base", base
    for name, member in sorted(vars(value).items()):
        if name not in _BOOKKEEPING and not name.startswith(("__abstract", "_abc_")):
            yield f"member {name}"
            yield name, member


def _patched_class(value: type, encoder: Describing) -> Parts:
    """Functions of the user's own that were put on an installed class."""
    for base in value.__mro__:
        if base is object:
            continue
        encoder.watch.functions(vars(base))
        for name, member in vars(base).items():
            if isinstance(member, types.FunctionType) and _is_foreign(member):
                yield f"member {name}"
                yield name, member


@dataclasses.dataclass(frozen=True)
class _Home:
    """An installed module of Python, by whose functions installed classes compute."""

    name: str


@functools.cache
def _home(name: str) -> _Home:
    return _Home(name)


def _patched_home(value: _Home, encoder: Describing) -> Parts:
    """Functions and classes that were put in an installed module in place of its own."""
    module = sys.modules.get(value.name)
    if module is None or not installed(value.name):
        return
    encoder.watch.functions(vars(module))
    for name, member in sorted(vars(module).items()):
        if isinstance(member, types.FunctionType) and not name.startswith("__"):
            if _is_foreign(member):
                yield f"member {name}"
                yield name, member
            elif member.__module__ != value.name:
                yield f"member {name} {member.__module__}.{member.__qualname__}"


def _is_foreign(function: Any) -> bool:
    while hasattr(function, "torchcache_function"):
        function = function.torchcache_function
    return not installed(function.__globals__.get("__name__", ""))


def _method(value: types.MethodType, encoder: Describing) -> Parts:
    yield "method"
    yield "", value.__func__
    yield "", value.__self__


def _builtin(value: Any, encoder: Describing) -> Parts:
    yield "builtin"
    yield str(getattr(value, "__module__", ""))
    yield getattr(value, "__qualname__", value.__name__)
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        yield "self", owner


def _property(value: property, encoder: Describing) -> Parts:
    yield "property"
    for accessor in (value.fget, value.fset):
        yield "", accessor


def _wrapped(value: Any, encoder: Describing) -> Parts:
    yield type(value).__name__
    yield "", value.__func__


def _slot(value: Any, encoder: Describing) -> Iterator[str]:
    yield "slot"
    yield value.__name__


_DESCRIBERS: tuple[tuple[Any, Callable[[Any, Describing], Parts]], ...] = (
    (type, _class),
    (_Home, _patched_home),
    (types.FunctionType, _function),
    (types.MethodType, _method),
    (types.CodeType, _code),
    (types.CellType, _cell),
    (
        (
            types.BuiltinFunctionType,
            types.MethodDescriptorType,
            types.WrapperDescriptorType,
            types.MethodWrapperType,
            types.ClassMethodDescriptorType,
        ),
        _builtin,
    ),
    (property, _property),
    ((staticmethod, classmethod), _wrapped),
    ((types.MemberDescriptorType, types.GetSetDescriptorType), _slot),
)
