"""Objects of any class: their attributes as namespaces, and what the code of their named classes reads on them."""

from __future__ import annotations

import functools
import struct
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from torchcache.identity.homes import beneath, beneath_class, module_of, named_class
from torchcache.identity.node import Check, Node, Space
from torchcache.identity.per_class import once_per_class
from torchcache.identity.reader import reads_of
from torchcache.mark import OWN, own_name

ABSENT = object()

# What tools of the ecosystem note on objects of their own, without a say in what is computed.
NOTES = frozenset(
    "_commit_hash _name_or_path name_or_path warnings_issued _is_hf_initialized architectures problem_type "
    "_original_object_hash _use_default_values".split()
)
_NOTE_PREFIXES = ("torchcache_", "_torchcache", "_torchdynamo", "_dynamo", "___")

# Classes whose own code, as far as calls run it, reads nothing of their objects that a name in the program would not.
_PLAIN_HOLDERS = frozenset(
    "abc argparse builtins collections.abc types typing _collections_abc "
    "torch.export._unlift torch.fx.graph_module".split()
)


def ignored(name: str) -> bool:
    """Whether an attribute is a note of torchcache or of torch's compiler."""
    return name.startswith(_NOTE_PREFIXES)


def member_space(
    kind: str, live: Mapping[str, Any], leave: frozenset[str] = frozenset(), ordered: bool = False
) -> Space:
    """A namespace as it is, without notes of torchcache and torch's compiler."""
    held = {}
    for name, value in dict(live).items():
        if type(name) is str and name.startswith(OWN):
            held[name.removeprefix(OWN)] = value
        elif type(name) is str and name not in leave and not name.startswith(_NOTE_PREFIXES):
            if module_of(type(value)).startswith("torchcache"):
                value = _previous(value)
                if value is None:
                    continue
            if type(value) is torch.dtype and leave >= NOTES:  # to save a configuration makes a text of it
                value = str(value).removeprefix("torch.")
            held[name] = value
    return Space(kind, live, held, ordered, leave=leave)


def beneath_mark(live: Mapping[Any, Any], name: Any) -> Any:
    """The key of an entry: marked methods of instances are kept under another."""
    own = own_name(name)
    return own if own in live else name


def _previous(value: Any) -> Any:
    """What a wrapper of torchcache on an instance stands before, if that was the instance's own."""
    while module_of(type(value)).partition(".")[0] == "torchcache":
        value = getattr(value, "previous", None) or getattr(value, "inner", None)
    return value


def state_of(node: Node, value: Any, leave: frozenset[str] = frozenset()) -> Node:
    """Add the class and the attributes of an object, in its ``__dict__`` and in its slots."""
    kind = beneath_class(type(value))
    node.parts.append(("", kind))
    node.checks.append(Check("kind", value))
    slots = slots_of(kind)
    held = {}
    for name, slot in slots:
        node.checks.append(Check("slot", value, name, functools.partial(_slot_value, slot)))
        found = _slot_value(slot, value)
        if found is not ABSENT:
            held[name] = found
    if held:
        node.spaces.append(Space("attribute", held, held))
    members = members_of(value)
    if members is not None:
        node.checks.append(Check("members", value))
        if is_noted(kind):
            leave = leave | NOTES
        node.spaces.append(member_space("attribute", members, leave))
    node.names, node.whole = names_of_class(kind)
    return node


def own_state(node: Node, value: Any, exact: Iterable[type]) -> Node:
    """The class of a container, and its attributes where it may have any."""
    if type(value) in exact:
        node.head = (type(value).__name__, *node.head)
        node.checks.append(Check("kind", value))
        if (members := members_of(value)) is not None:  # an OrderedDict has some
            node.spaces.append(member_space("attribute", members))
        return node
    return state_of(node, value)


def _slot_value(slot: Any, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return ABSENT


def members_of(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of an object, without running code of its own."""
    try:
        members = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return members if isinstance(members, dict) else None


@once_per_class
def is_noted(kind: type) -> bool:
    """Whether an object's class is of a package that notes where it came from."""
    packages = [module_of(base).partition(".")[0] for base in kind.__mro__]
    return not {"transformers", "huggingface_hub", "diffusers"}.isdisjoint(packages)


@once_per_class
def names_of_class(kind: type) -> tuple[frozenset[str], bool]:
    """Attributes that the named classes of an object read on it, and whether they read all of it."""
    names: set[str] = set()
    whole = False
    for base in kind.__mro__:
        if base is torch.nn.Module or not named_class(base) or module_of(base) in _PLAIN_HOLDERS:
            continue
        for name, member in list(vars(base).items()):
            function = beneath(getattr(member, "__func__", getattr(member, "fget", member)))
            if isinstance(function, types.FunctionType) and name not in _NEVER_RUN:
                reads = reads_of(function.__code__)
                names |= reads.names | {name for name, _ in reads.items}
                whole = whole or reads.whole_first
    return frozenset(names), whole


_NEVER_RUN = frozenset(
    "__init__ __repr__ __str__ __reduce__ __reduce_ex__ __getstate__ __setstate__ __copy__ __deepcopy__ __del__ "
    "__dir__ extra_repr reset_parameters _load_from_state_dict _save_to_state_dict __format__".split()
)


def slots_of(kind: type) -> tuple[tuple[str, Any], ...]:
    """What an object of this class has beside its ``__dict__``, in slots or in a struct."""
    return tuple(
        (name, member)
        for base in kind.__mro__
        if base is not object
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType) and not name.endswith("__")
    )


@once_per_class
def hidden(kind: type) -> bool:
    """Whether objects of this class hold something in C that no attribute shows."""
    pointer = struct.calcsize("P")
    while kind is not object:
        base = kind.__base__ or object
        members = vars(kind)
        shown = sum(isinstance(member, types.MemberDescriptorType) for member in members.values())
        shown += ("__dict__" in members) + ("__weakref__" in members)
        if kind.__basicsize__ - base.__basicsize__ > shown * pointer or kind.__itemsize__ > base.__itemsize__:
            return True
        kind = base
    return False
