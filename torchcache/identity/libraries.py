"""Objects of libraries as nodes: operators, functions over arrays, configurations."""

from __future__ import annotations

import sys
from typing import Any

from torchcache.dynamo import custom_operator
from torchcache.identity.homes import version_of
from torchcache.identity.node import Check, Node
from torchcache.kernels import kernels

__all__ = ["describe_configuration", "describe_operator", "describe_ufunc"]


def describe_ufunc(value: Any) -> Node:
    """A function over NumPy arrays, by its name; one that a user made may run any code."""
    for home in ("numpy", "scipy.special"):
        name = str(value.__name__)
        if getattr(sys.modules.get(home), name, None) is value:
            return Node(value, ("ufunc", home, name, version_of(home)), numbered=False)
    return Node(value, problem="cannot be read")


def describe_configuration(value: Any) -> Node:
    """A node of OmegaConf: what stands in its tree, from the root on, and which part of that it is."""
    head = ("configuration", type(value).__qualname__, version_of("omegaconf"), *_configured(value))
    return Node(value, head, checks=[Check("content", value, read=_configured)])


def _configured(value: Any) -> tuple[str, str]:
    """The tree as text, interpolations resolved: they may follow what lies elsewhere in it."""
    root = value._get_root()
    text = str(root)
    if "${" in text:
        text = str(sys.modules["omegaconf"].OmegaConf.to_container(root, resolve=True))
    return str(value._get_full_key(None)), text


def describe_operator(value: Any) -> Node:
    """An operator of torch or of a library: by its name, and its Python code where that is known."""
    name = str(getattr(value, "_qualified_op_name", getattr(value, "_name", ""))).partition(".")[0]
    return Node(value, ("operator", str(value)), [("", custom_operator(name)), *kernels(name)])
