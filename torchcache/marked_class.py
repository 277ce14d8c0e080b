"""The class of a module that was marked: a subclass of the user's, with doors for methods."""

from __future__ import annotations

import abc
import copyreg
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

from torch import fx, nn
from torch.nn.utils import parametrize

from torchcache.doors import door
from torchcache.mark import Mark, original_of
from torchcache.modes import train
from torchcache.options import CacheOptions
from torchcache.usefulness import note_call


def marks_of(module: nn.Module) -> Iterator[Mark]:
    """The marks on ``module`` and its class, enabled or not."""
    kind = type(module)
    names = ["forward", *(name for name in getattr(kind, "_torchcache_methods", ()) if name != "forward")]
    for name in names:
        found = getattr(getattr(kind, name, None), "torchcache_mark", None)
        if isinstance(found, Mark):
            yield found


def mark_of(module: nn.Module) -> Mark | None:
    """The first mark on ``module`` or its class, enabled or not."""
    return next(marks_of(module), None)


class Choice(NamedTuple):
    """What was chosen for one method of an instance."""

    options: CacheOptions
    output: Callable[[Any], Any] | None


def settled_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """``train`` of a module with marks: what is frozen stays in eval mode."""

    @functools.wraps(original)
    def settled(self: nn.Module, mode: bool = True) -> nn.Module:
        found = mark_of(self)
        return train(self, original, mode, kept=found is not None and found.options_for(self).enabled)

    settled.torchcache_function = original  # type: ignore[attr-defined]
    return settled


def _make_class(base: type[nn.Module], marks: tuple[tuple[str, Choice], ...]) -> type[nn.Module]:
    """A subclass of ``base`` whose methods of these names are doors."""
    members: dict[str, Any] = {
        name: door(Mark(name, chosen.options, base=base, output=chosen.output), of=getattr(base, name, None))
        for name, chosen in marks
    }
    members["train"] = settled_train(original_of(base.train))
    members["__reduce_ex__"] = _reduce
    if issubclass(base, fx.GraphModule):
        members["recompile"] = _recompile
    later = getattr(base, "cls_to_become", None)  # the class that a lazy module gets when it is called first
    if isinstance(later, type):
        members["cls_to_become"] = marked_class(later, dict(marks))
    members["_torchcache_marks"] = dict(marks)
    members["_torchcache_methods"] = tuple(name for name, _ in marks)
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    made: type[nn.Module] = _kind_of(type(base))(base.__name__, (base,), members)
    type.__setattr__(made, "torchcache_base", base)
    return made


def _kind_of(kind: Any) -> Any:
    """A class of classes that hand on to the user's class what is assigned to them once they are made.

    To delete it gives back what was there before the last assignment: patches delete what a class itself does not have.
    """
    before: dict[str, Any] = {}

    def assign(made: type, name: str, value: Any) -> None:
        base = vars(made).get("torchcache_base")
        if base is None:
            kind.__setattr__(made, name, value)
        else:
            before[name] = vars(base).get(name, before)
            setattr(base, name, value)

    def delete(made: type, name: str) -> None:
        base = vars(made).get("torchcache_base")
        if base is None:
            kind.__delattr__(made, name)
        elif (known := before.pop(name, before)) is before:
            delattr(base, name)
        else:
            setattr(base, name, known)

    # A class inherits no annotations.
    annotations = property(lambda made: getattr(vars(made).get("torchcache_base"), "__annotations__", {}))
    # Code may make a class of a marked one and of an abstract one.
    kinds = (abc.ABCMeta,) if kind is type else (kind,)
    shown = {"__annotations__": annotations, "__bases__": property(_bases)}
    return type(kind.__name__, kinds, {"__setattr__": assign, "__delattr__": delete, **shown})


def _bases(made: Any) -> tuple[type, ...]:
    """The bases of a class; torch removes its own class for parametrizations by them, and the mark is to stay."""
    base = vars(made).get("torchcache_base")
    if base is not None and base.__module__ == parametrize.__name__:
        return (marked_class(base.__bases__[0], made._torchcache_marks),)
    return cast(tuple[type, ...], type.__dict__["__bases__"].__get__(made))


# As long as they are in use: a class that was made holds the user's, and a key must hold no function of the user's.
_made: weakref.WeakKeyDictionary[type[nn.Module], weakref.WeakValueDictionary[Any, type[nn.Module]]]
_made = weakref.WeakKeyDictionary()


def marked_class(base: type[nn.Module], marks: dict[str, Choice]) -> type[nn.Module]:
    """The same class for the same marks, except where they hold functions."""
    key = tuple(marks.items())
    if any(chosen.output is not None for chosen in marks.values()):
        return _make_class(base, key)
    known = _made.setdefault(base, weakref.WeakValueDictionary())
    made = known.get(key)
    if made is None:
        made = known.setdefault(key, _make_class(base, key))
    return made


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class."""
    module.__class__ = kind


def _recompile(self: fx.GraphModule) -> Any:
    """What it makes anew are methods of the module's class, which has to be its own."""
    kind: Any = type(self)
    set_class(self, kind.torchcache_base)
    try:
        return self.recompile()
    finally:
        set_class(self, kind)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Copies and pickles: the user's class and the marks, since the class made for them has no name to import."""
    note_call()
    kind: Any = type(self)
    reduced = super(kind, self).__reduce_ex__(protocol) if "_torchcache_marks" in vars(kind) else None
    if reduced is None:  # a class that somebody made from ours
        return nn.Module.__reduce_ex__(self, protocol)
    if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__ and reduced[1][:1] == (kind,):  # type: ignore[attr-defined]
        return (_new, (kind.torchcache_base, kind._torchcache_marks, *reduced[1][1:]), *reduced[2:])
    return reduced


def _new(base: type[nn.Module], marks: dict[str, Choice], *args: Any) -> nn.Module:
    kind = marked_class(base, marks)
    return kind.__new__(kind, *args)
