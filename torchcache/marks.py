"""``@torchcache``, ``mark`` and ``unmark``: which modules and functions are cached, with which options."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import torch
from torch import nn

from torchcache import eager
from torchcache.errors import MarkError
from torchcache.graph.marked import Mark, enter, leave, register_door
from torchcache.modes import is_frozen, settle
from torchcache.options import CacheOptions

__all__ = ["mark", "mark_of", "marked_modules", "resemble", "torchcache", "unmark"]

_numbers = itertools.count()

T = TypeVar("T", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)


def _with_options(function: T) -> T:
    """Show the options as keyword parameters in ``function``'s signature."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = list(inspect.signature(CacheOptions).parameters.values())
    function.__signature__ = signature.replace(parameters=[*parameters, *options])  # type: ignore[attr-defined]
    return function


@overload
def torchcache(target: T, /) -> T: ...
@overload
def torchcache(target: None = None, /, **options: Any) -> Callable[[T], T]: ...
@_with_options
def torchcache(target: Any = None, /, **options: Any) -> Any:
    """Mark an ``nn.Module`` class, or a function of tensors, to be cached; with or without parentheses.

    The class stays the same class. Each instance is cached on its own; an attribute ``torchcache_<option>``
    set in ``__init__`` overrides an option for that instance.

    Parameters
    ----------
    target : class or function
        What to mark, when used without parentheses.
    **options
        See ``CacheOptions``.

    Returns
    -------
    class or function
        The class itself, or the function that caches.

    Raises
    ------
    TypeError, ValueError
        For an unknown option or a wrong value.
    MarkError
        When ``target`` is neither.
    """
    chosen = CacheOptions.of(options)
    if target is None:
        return lambda decorated: _decorate(decorated, chosen)
    return _decorate(target, chosen)


@_with_options
def mark(module: M, /, *, freeze: bool = False, **options: Any) -> M:
    """Mark one module, whoever wrote its class, to be cached.

    Parameters
    ----------
    module : nn.Module
        The module; marking again replaces the options.
    freeze : bool
        Also put it in eval mode and set ``requires_grad_(False)``.
    **options
        See ``CacheOptions``.

    Returns
    -------
    nn.Module
        The same module.

    Raises
    ------
    TypeError, ValueError
        For an unknown option or a wrong value.
    MarkError
        When ``module`` is no ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise MarkError(f"torchcache.mark takes an nn.Module instance, not {module!r}; decorate classes and functions")
    chosen = CacheOptions.of(options)
    if freeze:
        module.requires_grad_(False)
        module.eval()
    unmark(module)
    members = vars(module)
    members.pop("torchcache_enabled", None)
    holder: Any = members.get("forward")
    if hasattr(holder, "previous"):  # transformed already: the mark goes beneath
        holder.previous = MarkedForward(module, chosen, holder.previous)
    else:
        members["forward"] = MarkedForward(module, chosen, holder)
    members["train"] = MarkedTrain(module)
    return module


def unmark(module: M) -> M:
    """Take the mark off one module; where its class is marked, only this instance is left out.

    Parameters
    ----------
    module : nn.Module
        A module, marked or not.

    Returns
    -------
    nn.Module
        The same module.
    """
    members = vars(module)
    holder: Any = members.get("forward")
    if isinstance(holder, MarkedForward):
        del members["forward"]
        if holder.inner is not None:
            members["forward"] = holder.inner
    elif isinstance(getattr(holder, "previous", None), MarkedForward):
        holder.previous = holder.previous.inner
    if isinstance(members.get("train"), MarkedTrain):
        del members["train"]
    if mark_of(module) is not None:
        members["torchcache_enabled"] = False
    return module


def mark_of(module: nn.Module) -> Mark | None:
    """The mark on ``module`` or its class, enabled or not."""
    holder = vars(module).get("forward")
    holder = getattr(holder, "previous", None) or holder
    found = getattr(holder if isinstance(holder, MarkedForward) else type(module).forward, "torchcache_mark", None)
    return found if isinstance(found, Mark) else None


def marked_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Mark]]:
    """The outermost enabled marks in ``model``, with their paths."""
    pending = [("", model)]
    seen = set()
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found = mark_of(module)
        if found is not None and found.options_for(module).enabled:
            yield path or type(module).__name__, module, found
            continue
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        pending.extend(reversed(children))


class MarkedForward:
    """The ``forward`` of a marked instance.

    It refers to its module and nothing else, so that copies and pickles of the module carry a mark of their own.
    """

    def __init__(self, module: nn.Module, options: CacheOptions, inner: Callable[..., Any] | None = None) -> None:
        self.module = module
        self.options = options
        self.inner = inner
        self._bind()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.door(self.module, *args, **kwargs)

    @property
    def torchcache_mark(self) -> Mark:
        """The mark."""
        found: Mark = self.door.torchcache_mark
        return found

    @property
    def torchcache_function(self) -> Callable[..., Any]:
        """The original, which takes the module first."""
        return self.torchcache_mark.function

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.torchcache_function)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "options": self.options, "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    def _bind(self) -> None:
        original = _class_forward(type(self.module)) if self.inner is None else _instance_forward(self.inner)
        self.door: Any = make_door(Mark(original, self.options, of_module=True))
        resemble(self, original)


def resemble(holder: Any, function: Callable[..., Any]) -> None:
    """Show ``function``'s name, docstring and annotations on ``holder``.

    There is no ``__wrapped__``: libraries that patch a forward follow it to take their patch off, and go too far.
    """
    for name in ("__name__", "__qualname__", "__doc__", "__annotations__"):
        setattr(holder, name, getattr(function, name, None))


def _class_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class as it is when called: a class may be given another one after its instance was marked."""
    found = getattr(cls.forward, "torchcache_function", cls.forward)

    @functools.wraps(found)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = type(self).forward
        return getattr(current, "torchcache_function", current)(self, *args, **kwargs)

    forward.torchcache_function = found  # type: ignore[attr-defined]
    return forward


def _instance_forward(inner: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that was set on the instance before it was marked, as a function that takes the module first."""

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    signature = inspect.signature(inner)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    return forward


class MarkedTrain:
    """The ``train`` of a marked instance: frozen parts stay in eval mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return _train(type(self.module).train, self.module, mode)


def _decorate(target: Any, options: CacheOptions) -> Any:
    if isinstance(target, type) and issubclass(target, nn.Module):
        original = getattr(target.forward, "torchcache_function", target.forward)
        target.forward = make_door(Mark(original, options, of_module=True))
        target.train = _settled_train(target.train)  # type: ignore[method-assign]
        return target
    if isinstance(target, types.FunctionType):
        return make_door(Mark(target, options, of_module=False))
    advice = "use torchcache.mark for instances" if isinstance(target, nn.Module) else "mark a class or a function"
    raise MarkError(f"@torchcache takes an nn.Module class or a function, not {target!r}: {advice}")


def _settled_train(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def settled(self: nn.Module, mode: bool = True) -> nn.Module:
        return _train(train, self, mode)

    return settled


def _train(train: Callable[..., Any], module: nn.Module, mode: bool) -> nn.Module:
    found = mark_of(module)
    kept = found is not None and found.options_for(module).enabled
    # Trainers call this in every step; a round trip through train mode would be a write to every part.
    if not (kept and is_frozen(module) and all(map(_sets_flags_only, module.modules()))):
        train(module, mode)
    if kept:
        settle(module)
    return module


def _sets_flags_only(module: nn.Module) -> bool:
    """Whether ``train`` of this module does nothing else."""
    train = type(module).train
    own = vars(module).get("train")
    return getattr(train, "__wrapped__", train) is nn.Module.train and (own is None or isinstance(own, MarkedTrain))


def make_door(marked: Mark) -> Any:
    """``marked.function``, cached: traced through where Dynamo is tracing, looked up where it is not."""
    function = marked.function

    def door(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            torch._dynamo.comptime.comptime(enter)
            outputs = function(*args, **kwargs)
            torch._dynamo.comptime.comptime(leave)
            return outputs
        return eager.call(marked, opened, args, kwargs)

    # Dynamo keeps its caches by code object, and the trace-time hooks find the mark by it. Code objects compare by
    # value, so each door's has a name of its own.
    code = door.__code__.replace(co_name=f"door_{next(_numbers)}")
    opened = types.FunctionType(code, globals(), door.__name__, None, door.__closure__)
    functools.update_wrapper(opened, function)
    opened.torchcache_function = function  # type: ignore[attr-defined]
    opened.torchcache_mark = marked  # type: ignore[attr-defined]
    register_door(opened.__code__, marked)
    return opened
