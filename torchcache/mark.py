"""A mark as data: which function or method is cached, with which options, and what runs in its place."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from torchcache.options import NAMES, CacheOptions
from torchcache.switching import FORMER

# Where a mark keeps what the instance itself had under a name.
OWN = "_torchcache_own_"

_OVERRIDES = {name: f"torchcache_{name}" for name in (*NAMES, *FORMER)}
_OVERRIDING = frozenset(_OVERRIDES.values())
_PLAIN = (type(None), bool, int, float, str)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """The wish that calls of a function, or of a method of a module, be cached.

    Parameters
    ----------
    name : str
        The method's or the function's name.
    options : CacheOptions
        Its options.
    function : callable or None
        The original: a function of tensors, or a method that takes the module first. ``None`` where it is looked up
        in the class ``base`` at every call: a class may be given another one.
    base : type or None
        The class of a module that was marked as an instance.
    output : callable or None
        What is made of what the original returns, and returned in its place.
    """

    name: str
    options: CacheOptions
    function: Callable[..., Any] | None = None
    base: type[nn.Module] | None = None
    output: Callable[[Any], Any] | None = None

    def options_for(self, module: nn.Module | None) -> CacheOptions:
        """The options, with the ``torchcache_<option>`` attributes of the instance and its class applied."""
        if module is None:
            return self.options
        members, kind = vars(module), type(module)
        of_class = _of_classes.get(kind)
        if of_class is None:
            of_class = _of_classes[kind] = frozenset(key for key in _OVERRIDING if hasattr(kind, key))
        if not of_class and _OVERRIDING.isdisjoint(members):  # almost always
            return self.options
        changes = {name: getattr(module, key) for name, key in _OVERRIDES.items() if key in members or key in of_class}
        chosen = _chosen.setdefault(module, weakref.WeakKeyDictionary())
        known = chosen.get(self)
        if known is None or known[0] != changes:
            # A mapping may be written to.
            kept = {name: dict(value) if isinstance(value, Mapping) else value for name, value in changes.items()}
            known = chosen[self] = (kept, self.options.replace(changes))
        return known[1]

    def original(self, module: nn.Module | None) -> Callable[..., Any]:
        """What runs in place of a lookup; it takes the module first, if there is one."""
        own = self._own(module)
        original = self._original() if own is None else _without_module(own)
        return and_then(original, self.output)

    def names(self, module: nn.Module | None) -> tuple[str, ...]:
        """Names of the original's positional parameters, without the module."""
        return _names(self.called(module))[self._takes(module) :]

    def called(self, module: nn.Module | None) -> Callable[..., Any]:
        """What has the parameters: the function that the instance itself had, or the original."""
        own = self._own(module)
        return self._original() if own is None else own

    def _original(self) -> Callable[..., Any]:
        return original_of(getattr(self.base, self.name)) if self.function is None else self.function

    def without_defaults(
        self, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments without those that say what the original's defaults say; positional ones from the end.

        For plain values and plain functions only: a function around another may look at what was passed.
        """
        if not _FOR_LOSSES.isdisjoint(kwargs):
            kwargs = self._without_counts(module, args, kwargs)
        if not any(type(value) in _PLAIN for value in (*args, *kwargs.values())):  # almost always
            return args, kwargs
        function = self.called(module)
        if type(function) is not types.FunctionType or hasattr(function, "__wrapped__"):
            return args, kwargs
        code, last = function.__code__, function.__defaults__ or ()
        named = code.co_varnames[self._takes(module) : code.co_argcount]
        defaults = dict(zip(named[len(named) - len(last) :], last, strict=False))
        kept = len(args)
        while kept and len(args) <= len(named) and _is_default(defaults, named[kept - 1], args[kept - 1]):
            kept -= 1
        defaults |= function.__kwdefaults__ or {}
        kwargs = {name: value for name, value in kwargs.items() if not _is_default(defaults, name, value)}
        return args[:kept], kwargs

    def _without_counts(
        self, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments without what a trainer hands through models of ``transformers`` for a loss they do not compute.

        It differs in every step, and would be a part of every key. Code of others may read it.
        """
        function = self.called(module)
        if module is None or not _is_of_transformers(function) or not all(map(_forwards_theirs, module.modules())):
            return kwargs
        signature = inspect.signature(function)
        given = signature.bind_partial(*((module, *args) if self._takes(module) else args), **kwargs).arguments
        if given.get("labels") is not None or kwargs.get("labels") is not None:
            return kwargs
        own = signature.parameters
        return {name: value for name, value in kwargs.items() if name not in _FOR_LOSSES or name in own}

    def _takes(self, module: nn.Module | None) -> bool:
        """Whether the first parameter is the module."""
        return module is not None and self._own(module) is None

    @property
    def own(self) -> str:
        """The attribute that keeps what the instance itself had under this name before it was marked."""
        return own_name(self.name)

    def _own(self, module: nn.Module | None) -> Callable[..., Any] | None:
        return vars(module).get(self.own) if module is not None else None


_FOR_LOSSES = frozenset({"num_items_in_batch"})


def _is_of_transformers(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == "transformers"


def _forwards_theirs(module: nn.Module) -> bool:
    """Whether what a module runs is of ``transformers`` or of PyTorch."""
    forward = getattr(vars(module).get("forward", type(module).forward), "torchcache_function", None)
    home = getattr(forward or vars(module).get("forward", type(module).forward), "__module__", "") or ""
    return home.partition(".")[0] in ("transformers", "torch", "torchcache")


def _is_default(defaults: dict[str, Any], name: str, value: Any) -> bool:
    """Whether a plain value is the default of a parameter; zeros of either sign differ."""
    if name not in defaults or type(value) not in _PLAIN:
        return False
    default = defaults[name]
    return type(value) is type(default) and value == default and repr(value) == repr(default)


def own_name(name: Any) -> str:
    """The attribute that keeps what an instance itself had under this name before that was marked."""
    return f"{OWN}{name}"


def original_of(function: Any) -> Callable[..., Any]:
    """What a function of ours stands before; other functions are their own."""
    while hasattr(function, "torchcache_function"):
        function = function.torchcache_function
    found: Callable[..., Any] = function
    return found


def _without_module(bound: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an instance, as one that takes the module first."""

    @functools.wraps(bound)
    def function(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return function


def and_then(original: Callable[..., Any], output: Callable[[Any], Any] | None) -> Callable[..., Any]:
    """The original, and what a mark's ``output`` makes of what it returns."""
    if output is None:
        return original

    def function(*args: Any, **kwargs: Any) -> Any:
        return output(original(*args, **kwargs))

    return function


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature that can be read
        return ()
    only = inspect.Parameter.POSITIONAL_ONLY
    # No keyword can have the name of one that is positional only.
    return tuple(f"{p.name}{'/' * (p.kind is only)}" for p in parameters if p.kind in _POSITIONAL)


# Those of the attributes that a class has when it is seen first: to look them all up takes a microsecond.
_of_classes: weakref.WeakKeyDictionary[type[nn.Module], frozenset[str]] = weakref.WeakKeyDictionary()

# What the attributes of a module said, and the options that they make: a relative directory stays where it was.
_Chosen = tuple[dict[str, Any], CacheOptions]
_chosen: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[Mark, _Chosen]] = weakref.WeakKeyDictionary()
