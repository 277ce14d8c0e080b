"""Python values, modules and code as canonical bytes: equal bytes mean the same program.

The encoding is structural: no ``id``, no address, no hash order. Code of the user's own is followed through
everything it names (helper functions, classes, constants, attributes of modules); code of an installed package
or of the standard library is identified by its name, its own bytecode and the package's version.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import struct
import sys
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from torchcache.errors import FingerprintError
from torchcache.lookup.code import global_names, installed, is_installed_class, is_machinery

__all__ = ["IGNORED_ATTRIBUTES", "Encoder"]

# What nn.Module keeps for itself, and what does not change what forward computes.
IGNORED_ATTRIBUTES = frozenset(
    {
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_is_full_backward_hook",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_compiled_call_impl",
        "_is_hf_initialized",
        "_name_or_path",
        "warnings_issued",
        "name_or_path",
        "train",
    }
)
IGNORED_PREFIXES = ("torchcache_", "_torchcache", "_commit_hash")

_ATOMS = (type(None), bool, int, float, complex, str, bytes)


class Encoder:
    """Feeds a hash with canonical bytes, and notes what it met on the way.

    Parameters
    ----------
    where : str
        Path of what is encoded, for errors.

    Attributes
    ----------
    tensors : list of (str, torch.Tensor)
        Every tensor met, with its path, in order. Their contents are not part of the bytes.
    containers : list
        Every mutable container met: dicts, lists, sets, arrays and the dicts of objects.
    bindings : list of (mapping, str, value)
        Every global name that user code reads, with the value it had.
    """

    def __init__(self, where: str = "") -> None:
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.containers: list[Any] = []
        self.bindings: list[tuple[Mapping[str, Any], str, Any]] = []
        self._hash = hashlib.blake2b(digest_size=16)
        self._known: dict[int, bytes] = {}
        self._open: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []
        self._path = [where] if where else []

    def digest(self) -> bytes:
        """16 bytes over everything encoded so far."""
        return self._hash.digest()

    def value(self, value: Any) -> None:
        """Encode any value.

        Raises
        ------
        FingerprintError
            For what has no identity that can be computed; the message names its path.
        """
        if type(value) in _ATOMS:
            self._atom(value)
        elif isinstance(value, torch.Tensor):
            self._tensor(value)
        elif id(value) in self._known:
            self._put(self._known[id(value)])
        elif id(value) in self._open:
            self._put("cycle", str(len(self._open) - self._open[id(value)]))
        else:
            self._nested(value)

    def _nested(self, value: Any) -> None:
        """Encode a compound value as one digest, so that sharing it or repeating it looks the same."""
        outer, self._hash = self._hash, hashlib.blake2b(digest_size=16)
        self._open[id(value)] = len(self._open)
        try:
            self._compound(value)
            digest = self._hash.digest()
        finally:
            self._hash = outer
            del self._open[id(value)]
        self._known[id(value)] = digest
        self._kept.append(value)
        self._put(digest)

    def _module(self, module: nn.Module) -> None:
        """Encode a module tree: classes, plain attributes, modes, hooks, and where its tensors are."""
        self._put("module")
        self.value(type(module))
        members = vars(module)
        self.containers.append(members)
        for name in sorted(members):
            if name in IGNORED_ATTRIBUTES or name.startswith(IGNORED_PREFIXES):
                continue
            attribute = members[name]
            if name == "forward" and hasattr(attribute, "torchcache_function"):
                continue
            if name in ("_forward_hooks", "_forward_pre_hooks"):
                self.containers.append(attribute)
                attribute = list(attribute.values())
                if not attribute:
                    continue
            with _Step(self._path, name):
                self._put("attribute", name)
                self.value(attribute)
        for group in ("_parameters", "_buffers"):
            self.containers.append(members[group])
            for name, tensor in sorted(members[group].items()):
                with _Step(self._path, name):
                    self._put(group, name)
                    self.value(tensor)
        self.containers.append(members["_modules"])
        for name, child in members["_modules"].items():
            with _Step(self._path, name):
                self._put("child", name)
                self.value(child)

    def _function(self, function: types.FunctionType) -> None:
        """Encode a function: code, defaults, closure, and the globals that user code names."""
        while hasattr(function, "torchcache_function"):
            function = function.torchcache_function
        home = function.__globals__.get("__name__", "")
        self._put("function", home if installed(home) else "", function.__qualname__)
        self._code(function.__code__)
        for part in (function.__defaults__, function.__kwdefaults__):
            self.value(part)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            with _Step(self._path, name):
                try:
                    contents = cell.cell_contents
                except ValueError:
                    continue
                if name == "__class__":  # what super() needs; the class itself is encoded with its module
                    continue
                self._put("cell", name)
                self.value(contents)
        if installed(home):
            self._package(home)
            return
        for names in global_names(function.__code__):
            self._global(function.__globals__, names)

    def _type(self, cls: type) -> None:
        """Encode a class: its name, and for the user's own classes all of its code."""
        if is_installed_class(cls):
            self._put("class", cls.__module__, cls.__qualname__)
            self._package(cls.__module__)
            return
        self._put("class", cls.__qualname__)
        for base in cls.__mro__[1:]:
            self._put("base")
            self.value(base)
        for name, member in sorted(vars(cls).items()):
            if name in ("__doc__", "__dict__", "__weakref__", "__module__", "__annotations__", "__slotnames__"):
                continue
            if name.startswith(("__abstract", "_abc_", "__firstlineno__", "__static_attributes__")):
                continue
            with _Step(self._path, name):
                self._put("member", name)
                self._member(member)

    def _member(self, member: Any) -> None:
        if isinstance(member, property):
            for accessor in (member.fget, member.fset):
                self.value(accessor)
        elif isinstance(member, (staticmethod, classmethod)):
            self.value(member.__func__)
        elif isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            self._put("slot")
        else:
            self.value(member)

    def _put(self, *parts: str | bytes) -> None:
        for part in parts:
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            self._hash.update(struct.pack("<Q", len(data)))
            self._hash.update(data)

    def _atom(self, value: Any) -> None:
        if isinstance(value, float):
            self._put("float", struct.pack("<d", value))
        elif isinstance(value, complex):
            self._put("complex", struct.pack("<dd", value.real, value.imag))
        elif isinstance(value, bytes):
            self._put("bytes", value)
        else:
            self._put(type(value).__name__, str(value))

    def _tensor(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise FingerprintError(f"{self._where()} is not initialised yet: run one batch through the module first")
        number = self._numbers.setdefault(id(tensor), len(self._numbers))
        self._put("tensor", str(number))
        if number == len(self.tensors):
            self.tensors.append((self._where(), tensor))

    def _compound(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, type):
            self._type(value)
        elif is_machinery(value):
            self._put("machinery", type(value).__qualname__)
        elif isinstance(value, enum.Enum):
            self._put("enum", type(value).__module__, type(value).__qualname__, value.name)
        elif isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            self._put("torch", str(value))
        elif isinstance(value, torch.device):
            self._put("device", value.type)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._put("method")
            self.value(value.__func__)
            self.value(value.__self__)
        elif isinstance(value, functools.partial):
            self._put("partial")
            for part in (value.func, value.args, value.keywords):
                self.value(part)
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
            self._put("builtin", str(getattr(value, "__module__", "")), getattr(value, "__qualname__", value.__name__))
        elif isinstance(value, types.ModuleType):
            self._put("module", value.__name__)
            self._package(value.__name__)
        elif isinstance(value, Mapping):
            self._mapping(value)
        elif isinstance(value, (list, tuple, set, frozenset, range)):
            self._collection(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._array(np.asarray(value))
        elif isinstance(value, (weakref.ref, weakref.ProxyType)):
            self._put("weakref")
        else:
            self._object(value)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self.value(type(value))
        self._put("mapping", str(len(value)))
        if isinstance(value, dict):
            self.containers.append(value)
        for key, item in value.items():
            self.value(key)
            with _Step(self._path, str(key)):
                self.value(item)

    def _collection(self, value: Iterable[Any]) -> None:
        self.value(type(value))
        if isinstance(value, range):
            self._put("range", repr(value))
            return
        if isinstance(value, (list, set)):
            self.containers.append(value)
        if isinstance(value, (set, frozenset)):
            self._put("set", *sorted(self._alone(item) for item in value))
            return
        items = list(value)
        self._put("sequence", str(len(items)))
        for index, item in enumerate(items):
            with _Step(self._path, str(index)):
                self.value(item)

    def _alone(self, item: Any) -> bytes:
        encoder = Encoder(self._where())
        encoder.value(item)
        return encoder.digest()

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        self._put("array", array.dtype.str, str(array.shape))
        if array.dtype.hasobject:
            self.value(array.tolist())
        else:
            self.containers.append(array)
            self._put(np.ascontiguousarray(array).tobytes())

    def _object(self, value: Any) -> None:
        """Any other object, by its class and its state as ``copy`` sees it."""
        self.value(type(value))
        if isinstance(value, os.PathLike):
            self._put("path", os.fspath(value))
            return
        members = getattr(value, "__dict__", None)
        if isinstance(members, dict):
            self.containers.append(members)
            slots = {
                name: getattr(value, name)
                for cls in type(value).__mro__
                for name in _slots(cls)
                if name not in ("__dict__", "__weakref__") and hasattr(value, name)
            }
            self._state({**slots, **members})
            return
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:
            raise FingerprintError(
                f"{self._where()} holds a {type(value).__module__}.{type(value).__qualname__}, whose content cannot be "
                "part of a key: remove it, or name the program yourself with persistent_module_hash"
            ) from None
        if isinstance(reduced, str):
            self._put("global", reduced)
            return
        for part in reduced[1:]:
            self.value(list(part) if hasattr(part, "__next__") else part)

    def _state(self, members: Mapping[str, Any]) -> None:
        for name in sorted(members, key=str):
            if str(name) in IGNORED_ATTRIBUTES or str(name).startswith(IGNORED_PREFIXES):
                continue
            with _Step(self._path, str(name)):
                self._put("attribute", str(name))
                self.value(members[name])

    def _code(self, code: types.CodeType) -> None:
        self._put("code", code.co_code, " ".join(code.co_names), " ".join(code.co_varnames))
        self._put(str((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self.value(constant)

    def _package(self, module: str) -> None:
        package = sys.modules.get(module.partition(".")[0])
        version = getattr(package, "__version__", None)
        if isinstance(version, str):
            # A local build tag ("+cpu", "+cu130") names the same source.
            self._put("version", version.partition("+")[0])

    def _global(self, scope: Mapping[str, Any], names: tuple[str, ...]) -> None:
        if names[0] not in scope:
            return
        value = scope[names[0]]
        self.bindings.append((scope, names[0], value))
        with _Step(self._path, names[0]):
            for name in names[1:]:
                if not isinstance(value, types.ModuleType) or name not in vars(value):
                    break
                scope = vars(value)
                value = scope[name]
                self.bindings.append((scope, name, value))
            self._put("global", *names)
            self.value(value)

    def _where(self) -> str:
        return ".".join(self._path) or "the program"


class _Step:
    """Adds a name to a path for the length of a block."""

    def __init__(self, path: list[str], name: str) -> None:
        self._path = path
        self._name = name

    def __enter__(self) -> None:
        self._path.append(self._name)

    def __exit__(self, *error: object) -> None:
        self._path.pop()


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
