"""Code of a program as nodes: functions, methods, classes, descriptors, and modules of Python."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchcache.identity.filled import held_by, keeps_one
from torchcache.identity.homes import (
    beneath,
    beneath_class,
    home_of,
    is_class,
    is_foreign,
    is_named,
    module_of,
    named_class,
    version_of,
)
from torchcache.identity.libraries import describe_namespace, describe_scripted
from torchcache.identity.node import Check, Node, Space
from torchcache.identity.objects import ignored, member_space, names_of_class
from torchcache.identity.per_class import once_per_class
from torchcache.identity.reader import reads_of
from torchcache.identity.resolve import MISSING
from torchcache.identity.switches import add_answer, switches_of
from torchcache.kernels import kernels, registrations

# Special methods that run when a class is called, and those that no operator runs.
CONSTRUCTORS = frozenset({"__init__", "__new__", "__post_init__"})
_NOT_IMPLIED = CONSTRUCTORS | frozenset(
    "__init_subclass__ __set_name__ __subclasses__ "
    "__doc__ __module__ __dict__ __weakref__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__slots__ __slotnames__ __qualname__ __firstlineno__ __static_attributes__ __reduce__ __reduce_ex__ "
    "__getstate__ __setstate__ __getnewargs__ __getnewargs_ex__ __copy__ __deepcopy__ __del__ __dir__ __sizeof__ "
    "__repr__ __str__ __format__ __class_getitem__ __prepare__ __match_args__ "
    "__orig_bases__ __parameters__ __type_params__ __dataclass_fields__ __dataclass_params__ __replace__ "
    "__abstractmethods__ __class_cell__ __classcell__ __test__ __file__ __path__ __spec__ __loader__ __builtins__ "
    "__cached__ __package__ __name__ __all__ __version__".split()
)


def is_implied(name: str, constructed: bool) -> bool:
    """Whether an entry of a class may be read without its name in the code: by operators and by calls."""
    if not (name.startswith("__") and name.endswith("__")):
        return False
    return constructed if name in CONSTRUCTORS else name not in _NOT_IMPLIED


class Torch:
    """The namespaces of torch that any forward computes by, as one value of a program: its patches."""


def describe_code(value: Any) -> Node | None:
    """The node of a piece of code; ``None`` for anything else."""
    kind: Any = type(value)
    describe = _describer(kind)
    return None if describe is None else describe(value)


@once_per_class
def _describer(kind: type) -> Callable[[Any], Node] | None:
    return next((_DESCRIBERS[base] for base in kind.__mro__ if base in _DESCRIBERS), None)


def _function(value: types.FunctionType) -> Node:
    """Code, defaults and closure; of a named function its name alone, and what its closure holds."""
    node = Node(value, wraps=True, kind="function")
    home = home_of(value)
    if is_named(home) and value.__code__.co_filename != "<string>":
        node.head = ("named function", home, value.__qualname__, version_of(home))
        add_answer(node, value)
    else:
        node.reads = reads_of(value.__code__)
        node.head = ("function", node.reads.digest)
        node.parts.append((".__defaults__", value.__defaults__))
        if value.__kwdefaults__:
            node.parts.append((".__kwdefaults__", value.__kwdefaults__))
        members = vars(value)
        if members:
            node.spaces.append(member_space("attribute", members, frozenset({"__wrapped__", "__annotations__"})))
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            node.checks.append(Check("attribute", value, name))
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
        node.parts.append((f"the variable {name} of {value.__name__}", cell))
    return node


def _cell(value: types.CellType) -> Node:
    node = Node(value, ("cell",), wraps=True)
    try:
        node.parts.append(("", value.cell_contents))
    except ValueError:
        node.head = ("empty cell",)
    node.checks.append(Check("attribute", value, "cell_contents"))
    return node


def _code(value: types.CodeType) -> Node:
    reads = reads_of(value)
    return Node(value, ("code", reads.digest), numbered=False)


def _class(value: type) -> Node:
    """A class; its entries count where their names are read, those of a named class where somebody else put them."""
    node = Node(value, kind="class")
    if named_class(value):
        node.head = ("named class", module_of(value), value.__qualname__, version_of(module_of(value)))
        for base in value.__mro__[:-1] if issubclass(value, nn.Module) else (value,):
            if not named_class(base):
                node.parts.append((".__mro__", base))
                continue
            read = _foreign if issubclass(base, nn.Module) else patches
            foreign = dict(read(base))
            node.checks.append(Check("foreign", base, read=read))
            if foreign:
                node.spaces.append(Space("member", foreign, foreign))
        node.names = names_of_class(value)[0] | _OF_A_CALL
        return node
    node.head = ("class", value.__qualname__.rpartition(".")[2])
    node.names = _overrides(value)
    node.checks.append(Check("attribute", value, "__mro__"))
    if type(value) is not type and not named_class(type(value)):
        node.parts.append((".__class__", type(value)))
    for base in value.__mro__[1:]:
        if base is not object:
            node.parts.append((".__mro__", base))
    node.spaces.append(member_space("member", vars(value), frozenset({"_abc_impl"})))
    children = {"__subclasses__": Subclasses(value)}
    node.spaces.append(Space("member", children, children))
    return node


class Subclasses:
    """The classes that were made of a class, as one value of a program."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def now(self) -> tuple[type, ...]:
        """Those that there are, without torchcache's own."""
        found: list[type] = type.__subclasses__(self.kind)
        return tuple(kind for kind in found if beneath_class(kind) is kind)


def _subclasses(value: Subclasses) -> Node:
    found = value.now()
    node = Node(value, ("subclasses", str(len(found))), checks=[Check("content", value, read=Subclasses.now)])
    node.parts = [(".__subclasses__()[...]", kind) for kind in found]
    return node


def _overrides(value: type) -> frozenset[str]:
    """Methods that code which is not read may call, because a named class has them too."""
    bases = [base for base in value.__mro__[1:] if named_class(base) and base not in (object, nn.Module)]
    own = (name for name, member in vars(value).items() if type(member) in _PATCHES and not name.startswith("__"))
    return frozenset(name for name in own if any(name in vars(base) for base in bases))


_OF_A_CALL = frozenset({"forward", "_call_impl", "_wrapped_call_impl", "_slow_forward"})


# The members of torch's classes and namespaces as they were when they were first looked at, each with its owner.
_KNOWN: dict[int, tuple[Any, dict[str, Any]]] = {}


def _known(owner: Any) -> dict[str, Any]:
    if id(owner) not in _KNOWN:
        _KNOWN[id(owner)] = (owner, dict(vars(owner)))
    return _KNOWN[id(owner)][1]


def _foreign(owner: Any) -> tuple[tuple[str, Any], ...]:
    """Members of something named that somebody else put there: functions and classes, and whatever came later."""
    known, found = _known(owner), []
    for name, member in sorted(vars(owner).items()):
        if ignored(name) or name in _NOT_IMPLIED - CONSTRUCTORS:
            continue
        came = known.get(name, MISSING) is not member and not _is_torchs_own(member, known.get(name))
        if came or (type(member) in _PATCHES and is_foreign(member)):
            found.append((name, member))
    return tuple(found)


def patches(owner: Any) -> tuple[tuple[str, Any], ...]:
    """Functions and classes that somebody else put into something named; of a module, in the place of others.

    What a library notes on its classes is no patch, nor what a module loads when it is asked for.
    """
    known: Any = _known(owner) if isinstance(owner, types.ModuleType) else vars(owner)
    foreign = _foreign(owner)
    return tuple((name, member) for name, member in foreign if name in known and (callable(member) or _is_slot(member)))


def _is_slot(member: Any) -> bool:
    return isinstance(member, (property, staticmethod, classmethod))


def _is_torchs_own(member: Any, known: Any) -> bool:
    """Whether torch or torchcache put a member there late: a module, a wrapper of what was there, code of Dynamo's."""
    inner = beneath(member)
    if type(inner) is types.FunctionType and home_of(inner).startswith("torch._dynamo"):
        return True  # what it wraps is looked at all the same
    while inner is not known and type(inner) is types.FunctionType and is_named(home_of(inner)):
        inner = vars(inner).get("__wrapped__")
    return inner is known or type(member) is types.ModuleType


_PATCHES = (types.FunctionType, staticmethod, classmethod, property, type)


def _torch(value: type[Torch]) -> Node:
    """What was put into torch's namespaces, and functions of its own that stand under other names."""
    node = Node(value, ("torch", version_of("torch")))
    for home in HOMES:
        data = {}
        for name, member in _foreign(home):
            if home is torch and name in _NOT_IN_FORWARD:
                continue
            if callable(member) or isinstance(member, property):
                node.parts.append((f"the global {getattr(home, '__name__', '')}.{name}", member))
            else:
                data[name] = member
        if data:
            node.spaces.append(Space("member", data, data))
        node.checks.append(Check("foreign", home, read=_foreign))
    node.parts += [(f"the kernel {name}", kernel) for name, kernel in kernels("aten::") if not _is_torchs(kernel)]
    node.checks.append(Check("content", value, read=lambda _: registrations()))
    for name, member in sorted(vars(torch.nn.functional).items()):
        if type(member) is types.FunctionType and not name.startswith("__") and member.__name__ != name:
            node.head += (name, member.__module__, member.__qualname__)
    return node


def _is_torchs(kernel: Any) -> bool:
    return type(kernel) is types.FunctionType and is_named(home_of(kernel))


# Libraries wrap these for themselves, and no module of torch computes by them. Code that calls one reads it by name.
_NOT_IN_FORWARD = frozenset({"compile", "load", "manual_seed", "save"})

HOMES: tuple[Any, ...] = (torch, torch.nn.functional, torch.Tensor, torch.Tensor.__mro__[1])


def _look_at_torch() -> None:
    classes: list[Any] = [nn.Module]
    for kind in classes:
        _known(kind)
        classes += [inner for inner in kind.__subclasses__() if named_class(inner) and id(inner) not in _KNOWN]
    for home in HOMES:
        _known(home)


_look_at_torch()


def _method(value: types.MethodType) -> Node:
    parts = [("", value.__func__), (".__self__", value.__self__)]
    return Node(value, ("method",), parts, numbered=False, wraps=True)


def _builtin(value: Any) -> Node:
    owner = getattr(value, "__self__", None)
    home = str(getattr(value, "__module__", "") or "")
    node = Node(value, ("builtin", home, getattr(value, "__qualname__", value.__name__)), numbered=False)
    if home and not is_named(home):
        node.head += (version_of(home),)
    if owner is not None and not isinstance(owner, types.ModuleType):
        node.parts.append((".__self__", owner))
    return add_answer(node, value)


def _property(value: property) -> Node:
    parts = [("", value.fget), (".setter", value.fset)]
    return Node(value, ("property",), parts, numbered=False, wraps=True)


def _wrapped(value: Any) -> Node:
    return Node(value, (type(value).__name__,), [("", value.__func__)], numbered=False, wraps=True)


def _cached(value: Any) -> Node:
    """A function behind ``functools.lru_cache``, and what it keeps where that is one object."""
    node = Node(value, ("cached",), [("", value.__wrapped__)], numbered=False, wraps=True, kind="object")
    leave = frozenset({"__wrapped__", *functools.WRAPPER_ASSIGNMENTS})
    node.spaces.append(member_space("attribute", vars(value), leave))
    if keeps_one(value):
        node.parts += [("()", kept) for kept in held_by(value)]
        node.checks.append(Check("content", value, read=held_by))
    return node


def _slot(value: Any) -> Node:
    return Node(value, ("slot", value.__name__), numbered=False)


def _python_module(value: types.ModuleType) -> Node:
    """A module as a value: its entries count where their names are read."""
    members = object.__getattribute__(value, "__dict__")
    name = str(members.get("__name__", ""))
    node = Node(value, ("module",), kind="python module")
    if is_named(name):
        node.head = ("named module", name, version_of(name))
        node.spaces += switches_of(value)
        node.checks.append(Check("foreign", value, read=patches))
        found = dict(patches(value))
        if found:
            node.spaces.append(Space("global", found, found))
        return node
    node.spaces.append(member_space("global", members))
    return node


def simplify(value: Any) -> Any:
    """A function or class without the wrappers of torchcache around it."""
    if is_class(value):
        return beneath_class(value)
    return beneath(value) if type(value) is types.FunctionType else value


_DESCRIBERS: dict[type, Callable[[Any], Node]] = {
    type: lambda value: _torch(value) if value is Torch else _class(value),
    Subclasses: _subclasses,
    types.FunctionType: _function,
    types.MethodType: _method,
    types.CodeType: _code,
    types.CellType: _cell,
    **dict.fromkeys(
        (
            types.BuiltinFunctionType,
            types.MethodDescriptorType,
            types.WrapperDescriptorType,
            types.MethodWrapperType,
            types.ClassMethodDescriptorType,
        ),
        _builtin,
    ),
    property: _property,
    **dict.fromkeys((staticmethod, classmethod), _wrapped),
    functools._lru_cache_wrapper: _cached,
    **dict.fromkeys((types.MemberDescriptorType, types.GetSetDescriptorType), _slot),
    types.ModuleType: _python_module,
    torch.jit.ScriptFunction: describe_scripted,
    **dict.fromkeys((type(torch.ops), type(torch.ops.aten)), describe_namespace),
}
