"""Kernels in Python that code registers for operators: noted as it does so, since the dispatcher gives none back."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

# Operator, dispatch key and function, by the library that registered them.
_kernels: weakref.WeakKeyDictionary[torch.library.Library, list[tuple[str, str, Any]]] = weakref.WeakKeyDictionary()
_registrations = 0


def _noting_kernels(register: F) -> F:
    @functools.wraps(register)
    def impl(self: torch.library.Library, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        global _registrations
        made = register(self, op_name, fn, dispatch_key, **options)
        name = str(getattr(op_name, "_name", op_name)).rpartition("::")[2]
        _kernels.setdefault(self, []).append((f"{self.ns}::{name}", dispatch_key or self.dispatch_key, fn))
        _registrations += 1
        return made

    return cast(F, impl)


def _noting_ends(destroy: F) -> F:
    @functools.wraps(destroy)
    def _destroy(self: torch.library.Library) -> None:
        global _registrations
        _kernels.pop(self, None)
        _registrations += 1
        destroy(self)

    return cast(F, _destroy)


torch.library.Library.impl = _noting_kernels(torch.library.Library.impl)  # type: ignore[method-assign]
torch.library.Library._destroy = _noting_ends(torch.library.Library._destroy)  # type: ignore[method-assign]


def kernels(name: str) -> list[tuple[str, Any]]:
    """Kernels in Python of the operators whose names begin so, the latest last: dispatch key and function."""
    return [
        (f"{operator} {key}", function)
        for registered in list(_kernels.values())
        for operator, key, function in registered
        if operator.startswith(name) and callable(function)
    ]


def is_registered_in_python(name: str) -> bool:
    """Whether a library outside of torch has a kernel in Python for the operator ``name``: ``library::operator``."""
    library, _, operator = name.partition("::")
    begin = f"{library}/{operator}"
    parts = (entry.rpartition("/") for entry in torch.library._impls)
    return library not in ("aten", "prims", "prim") and any(
        named.partition(".")[0] == begin and key != "Meta" for named, _, key in parts
    )


def registrations() -> tuple[int, int]:
    """Differs where kernels were registered, or taken back, meanwhile."""
    return _registrations, len(_kernels)
