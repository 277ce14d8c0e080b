"""``@cached``, ``mark`` and ``unmark``: which modules, methods and functions are cached, with which options."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import nn

from torchcache.doors import door
from torchcache.errors import MarkError
from torchcache.logging import warn_once
from torchcache.mark import Mark, original_of, own_name
from torchcache.marked_class import Choice, mark_of, marked_class, marks_of, set_class, settled_train
from torchcache.options import CacheOptions
from torchcache.stand_in import Deferred
from torchcache.usefulness import forget_mark, note_mark
from torchcache.values.constants import type_name

T = TypeVar("T", bound=Callable[..., Any])
M = TypeVar("M")


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
    """Mark an ``nn.Module`` class, a method of one, or a function of tensors; with or without parentheses.

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


# The decorator under a name that is not the package's.
cached = torchcache


@_with_options
def mark(
    module: M,
    /,
    *,
    method: str | Sequence[str] = "forward",
    freeze: bool = False,
    output: Callable[[Any], Any] | None = None,
    **options: Any,
) -> M:
    """Mark one module, whoever wrote its class, to be cached.

    The module gets a class of its own, made from its class, so that copies and replicas are cached for themselves.

    Parameters
    ----------
    module : nn.Module, or a bound method of one
        The module; marking again replaces the options. ``mark(clip.encode_image)`` marks that method.
    method : str or sequence of str
        The methods whose calls are cached, each for itself.
    freeze : bool
        Also put it in eval mode and set ``requires_grad_(False)``.
    output : callable or None
        Given what the original returns, it returns what is stored and what the caller gets in its place, whether rows
        are cached or not: ``output=lambda o: o.last_hidden_state[:, 0]`` keeps 3 KB a row of a ViT-B, and not 605.
        Its code is part of the program, which ``persistent_module_hash`` names as a whole. To pickle the model it must
        be a function that can be imported.
    **options
        See ``CacheOptions``.

    Returns
    -------
    nn.Module or method
        What was passed, marked.

    Raises
    ------
    TypeError, ValueError
        For an unknown option or a wrong value, or an ``output`` that cannot be called.
    MarkError
        When ``module`` is no ``nn.Module``, or TorchScript, has no such method, or is to be frozen before its lazy
        parameters exist.
    """
    if isinstance(module, types.MethodType) and isinstance(module.__self__, nn.Module):
        mark(module.__self__, method=module.__name__, freeze=freeze, output=output, **options)
        bound: M = getattr(module.__self__, module.__name__)
        return bound
    if not isinstance(module, nn.Module):
        raise MarkError(
            f"torchcache.mark takes an nn.Module instance, not {_told(module)}; decorate classes and functions"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise MarkError(
            f"torchcache.mark: {type(module).__name__} is TorchScript, which has no Python code to read: mark the "
            "module that it was made from"
        )
    if not isinstance(module, Deferred) and any(isinstance(part, Deferred) for part in module.modules()):
        raise MarkError(
            f"torchcache.mark: {type(module).__name__} holds what torchcache.deferred made, which is cached for "
            "itself: mark the modules beside it"
        )
    if output is not None and not callable(output):
        raise TypeError(f"torchcache: output must be a function of what the module returns, or None, not {output!r}")
    chosen = Choice(CacheOptions.of(options), output)
    names = [method] if isinstance(method, str) else list(method)
    for name in names:
        if not callable(getattr(module, name, None)):
            raise MarkError(f"torchcache.mark: {type(module).__name__} has no method {name!r}")
        found = inspect.getattr_static(module, name)
        if isinstance(found, (staticmethod, classmethod, property)):
            kind = type(found).__name__
            raise MarkError(f"torchcache.mark: {type(module).__name__}.{name} is a {kind}: mark a method or a function")
        if found is nn.Module.forward:
            warn_once(
                f"torchcache.mark: {type(module).__name__} has no forward, so that nothing of it is cached: mark its "
                "parts, or name the method that is called, as in mark(module, method='__call__')"
            )
    if freeze:
        if any(map(nn.parameter.is_lazy, module.parameters())):
            raise MarkError(
                f"torchcache.mark: {type(module).__name__} holds lazy parameters, with nothing to freeze yet: call "
                "it once on a batch, or freeze it after its first call"
            )
        module.requires_grad_(False)
        module.eval()
    known: dict[str, Choice] = {} if "forward" in names else vars(type(module)).get("_torchcache_marks", {})
    unmark(module)
    vars(module).pop("torchcache_enabled", None)
    own = vars(module)
    for name in names:
        if chosen.options.enabled:
            note_mark(module, name)
        if name in own:
            own[own_name(name)] = own.pop(name)
    set_class(module, marked_class(type(module), {**known, **dict.fromkeys(names, chosen)}))
    return module


@_with_options
def deferred(
    build: Callable[[], Any],
    /,
    *,
    identity: str,
    output: Callable[[Any], Any] | None = None,
    release: bool = True,
    **options: Any,
) -> Any:
    """A frozen module that is there only while rows are missing: where all are found, its weights are not even loaded.

    It is built at the first miss, and let go after a stretch of calls without one. Rows are filed under the name that
    you give; what was learnt of its calls is kept with them. Once it is built, the rows that it serves first are
    computed again and compared. It is frozen, in eval mode, and no part of checkpoints.

    Parameters
    ----------
    build : callable
        Returns an ``nn.Module``, or a method of one, whose calls are cached:
        ``lambda: AutoModel.from_pretrained(name, revision=revision)``.
    identity : str
        Your name for what ``build`` returns: its weights, their revision, and what the code does. Another name for
        anything else, or old rows are served.
    output : callable or None
        As for ``mark``; its code counts beside the name. What it returns is tensors, plain values, and lists, tuples
        and dicts of them; what holds anything else is built in every process.
    release : bool, default: True
        Whether it is let go after a stretch of calls in which nothing was computed: at least 16, as many as computed
        something so far, and ten times as long as it takes to build. Its memory is free then, on whichever device, and
        the next miss builds it again; each time the stretch doubles. What you changed in it stays.
    **options
        See ``CacheOptions``. ``persistent`` is true unless you say otherwise.

    Returns
    -------
    nn.Module
        A marked module without parameters. Its ``build()`` returns the module that it stands for.

    Raises
    ------
    TypeError, ValueError
        For a wrong value, or an option that it cannot have: ``persistent_module_hash``, ``padding``.
    """
    if not callable(build):
        raise TypeError(f"torchcache: build must be a function that returns the module, not {build!r}")
    if not isinstance(identity, str) or not identity:
        raise TypeError(f"torchcache: identity must be a name that is not empty, not {identity!r}")
    for name, advice in (
        ("persistent_module_hash", "identity= is that name"),
        ("padding", "what padding changes is compared with the original in every process"),
    ):
        if options.get(name) is not None:
            raise ValueError(f"torchcache: deferred takes no {name}=: {advice}")
    module = Deferred(build, identity, release, bool(options.get("pure", False)))
    return mark(module, output=output, **{"persistent": True, **options})


def unmark(module: Any) -> Any:
    """Take the marks off one module; where its class is marked, only this instance is left out.

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
    kind = type(module)
    if "_torchcache_marks" in vars(kind):
        for name in kind._torchcache_marks:
            forget_mark(module, name)
            if own_name(name) in members:
                members[name] = members.pop(own_name(name))
        set_class(module, kind.torchcache_base)
    if mark_of(module) is not None:
        members["torchcache_enabled"] = False
    return module


def marked_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Mark]]:
    """The outermost enabled marks in ``model``, with their paths."""
    pending = [("", model)]
    seen = set()
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found = [mark for mark in marks_of(module) if mark.options_for(module).enabled]
        yield from ((path or type(module).__name__, module, mark) for mark in found)
        if not any(mark.name == "forward" for mark in found):
            children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
            pending.extend(reversed(children))


def _decorate(target: Any, options: CacheOptions) -> Any:
    if isinstance(target, type) and issubclass(target, nn.Module):
        target.forward = door(Mark("forward", options, original_of(target.forward)))
        if not hasattr(target.train, "torchcache_function"):
            target.train = settled_train(target.train)  # type: ignore[method-assign]
        return target
    if isinstance(target, types.FunctionType):
        return door(Mark(target.__name__, options, original_of(target)))
    advice = "use torchcache.mark for instances" if isinstance(target, nn.Module) else "mark a class or a function"
    raise MarkError(f"@torchcache takes an nn.Module class or a function, not {_told(target)}: {advice}")


def _told(value: Any) -> str:
    """A value for a message: a tensor would show all of its numbers."""
    return repr(value) if callable(value) and not isinstance(value, nn.Module) else type_name(value)
