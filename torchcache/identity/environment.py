"""Which environment variables a function reads, itself or by functions of the standard library."""

from __future__ import annotations

import functools
import os
import types
from typing import Any

from torchcache.identity.homes import beneath, home_of, is_named
from torchcache.identity.reader import reads_of
from torchcache.identity.reads import Reads
from torchcache.identity.resolve import resolve

_ITSELF = [os.environ, os.getenv, *(getattr(os, name) for name in ("environb", "getenvb") if hasattr(os, name))]
# Calls within the library that are followed.
MOST = 8


def is_environment(value: Any) -> bool:
    """Whether a value gives access to the environment."""
    return any(value is one for one in _ITSELF)


def named_variables(function: types.FunctionType, reads: Reads) -> frozenset[str] | None:
    """The variables that the code of ``function`` reads itself; ``None`` where any may be."""
    keys = [resolve(key, function.__globals__).value for key in reads.keys]
    if reads.environment or any(type(key) is not str for key in keys):
        return None
    # Also a method of paths, on objects whose class is not known.
    home = variables_of(os.path.expanduser) if "expanduser" in reads.names else frozenset()
    return None if home is None else reads.variables | frozenset(keys) | home


def variables_of(value: Any, names: tuple[str, ...] = ()) -> frozenset[str] | None:
    """The variables that a call of ``value``, or of what is found at ``names`` in it, reads; ``None`` for any.

    Those of functions of the standard library that are written in Python: no other is looked into here.
    """
    if names and isinstance(value, type):
        value = next((vars(base)[names[0]] for base in value.__mro__ if names[0] in vars(base)), None)
    return _variables_of(beneath(getattr(value, "__func__", value)), MOST)


def _variables_of(function: Any, further: int) -> frozenset[str] | None:
    """Only functions of the standard library are remembered: those of others may hold anything."""
    if type(function) is not types.FunctionType or is_environment(function) or not further:
        return frozenset()
    home = home_of(function)
    if not is_named(home) or home.partition(".")[0] in ("torch", "torchcache", "numpy"):
        return frozenset()
    return _read_by(function, further)


@functools.lru_cache(maxsize=4096)
def _read_by(function: types.FunctionType, further: int) -> frozenset[str] | None:
    reads = reads_of(function.__code__)
    found = named_variables(function, reads)
    for chain in reads.chains:
        its = _variables_of(resolve(chain, function.__globals__).value, further - 1)
        found = None if found is None or its is None else found | its
    return found
