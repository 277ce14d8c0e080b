"""Objects of libraries as nodes: operators, functions over arrays, configurations."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from torchcache.dynamo import custom_operators
from torchcache.identity.homes import module_of, version_of
from torchcache.identity.node import Check, Node
from torchcache.kernels import is_registered_in_python, kernels, registrations

# Where in a file a node of a graph was written, behind it.
_PLACE = re.compile(r' # [^"\n]*$', re.MULTILINE)
# Constants that a graph's text shows, and tensors: floating, integer, string, tensor, complex.
_CONSTANTS = frozenset("fistc")
# Calls of Python, and of what is known only when they run.
_UNREAD = frozenset("prim::PythonOp prim::CallFunction prim::CallMethod prim::fork prim::GetAttr prim::SetAttr".split())


def imports_when_asked(kind: type) -> bool:
    """Whether an object maps names to what it imports when it is asked: it says what a process asked for so far."""
    return module_of(kind).startswith("transformers.models.auto.")


def describe_ufunc(value: Any) -> Node:
    """A function over NumPy arrays, by its name; one that a user made may run any code."""
    for home in ("numpy", "scipy.special"):
        name = str(value.__name__)
        if getattr(sys.modules.get(home), name, None) is value:
            return Node(value, ("ufunc", home, name, version_of(home)), numbered=False)
    return Node(value, problem="cannot be read")


def describe_configuration(value: Any) -> Node:
    """A node of OmegaConf: what stands in its tree, from the root on, and which part of that it is."""
    head = ("configuration", type(value).__qualname__, version_of("omegaconf"), *_configured(value)[:3])
    objects = [(f"[{place}]", leaf) for place, leaf in enumerate(_configured(value)[3])]
    return Node(value, head, objects, checks=[Check("content", value, read=_configured)])


def _configured(value: Any) -> tuple[str, str, str, tuple[Any, ...]]:
    """Which part of a tree it is; the tree as text, interpolations resolved; classes and flags; objects in it."""
    root = value._get_root()
    text = str(root)
    if "${" in text:  # what it stands for may lie elsewhere in the tree
        text = str(sys.modules["omegaconf"].OmegaConf.to_container(root, resolve=True))
    kinds: list[str] = []
    objects: list[Any] = []
    pending = [root]
    while pending:
        node = pending.pop()
        about, content = node._metadata, node._content if hasattr(node, "_content") else node._value()
        kinds.append(f"{getattr(about, 'object_type', None)} {about.ref_type} {about.flags}")
        if isinstance(content, (dict, list)):
            pending += content.values() if isinstance(content, dict) else content
        elif type(content) not in (str, int, float, bool, bytes, type(None)):
            objects.append(content)
    return str(value._get_full_key(None)), text, "\n".join(kinds), tuple(objects)


def describe_operator(value: Any) -> Node:
    """An operator of torch or of a library: by its name, and its Python code where that is known."""
    name = str(getattr(value, "_qualified_op_name", getattr(value, "_name", ""))).partition(".")[0]
    known = [("", custom_operators().get(name)), *kernels(name)]
    if known == [("", None)] and is_registered_in_python(name):
        # The dispatcher gives no function back.
        return Node(
            value, problem="has a kernel in Python from before torchcache was imported: import torchcache first"
        )
    return Node(value, ("operator", str(value)), known)


def describe_namespace(value: Any) -> Node:
    """A library's operators, or all of them: which of them code calls cannot be told."""
    name = "" if isinstance(value, type(torch.ops)) else str(value.name)
    begin = f"{name}::" if name else ""
    parts = [*custom_operators(begin).items(), *kernels(begin)]
    return Node(value, ("operators", name), parts, checks=[Check("content", value, read=lambda _: registrations())])


def only_checks(hook: Any) -> bool:
    """Whether a hook is torch's own look at the inputs of an exported program, which changes none of them."""
    home = sys.modules.get("torch.export._unlift")
    return home is not None and hook is getattr(home, "_check_input_constraints_pre_hook", None)


def describe_scripted(value: Any) -> Node:
    """A function that TorchScript compiled: its graph with all that it calls, and its tensors."""
    graph = value.inlined_graph
    node = Node(value, ("scripted", _PLACE.sub("", graph.str(False))), numbered=False)
    for part in _scripted_nodes(graph):
        kind = part.kind()
        home, _, name = kind.partition("::")
        if kind == "prim::Constant":
            kinds = {attribute: part.kindOf(attribute) for attribute in part.attributeNames()}
            place = f".{part.output().debugName()}"
            node.parts += [(place, part.t(attribute)) for attribute, held in kinds.items() if held == "t"]
            unread = not _CONSTANTS.issuperset(kinds.values())
        elif home in ("aten", "prim"):
            unread = kind in _UNREAD
        else:
            operator = getattr(getattr(torch.ops, home), name, None)
            node.parts.append((f".{kind}", operator))
            unread = operator is None
        if unread:
            node.problem = f"is compiled by TorchScript and holds a {kind}, which cannot be read"
    return node


def _scripted_nodes(block: Any) -> Iterator[Any]:
    """The nodes of a graph of TorchScript, those of its branches and loops included."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _scripted_nodes(inner)
