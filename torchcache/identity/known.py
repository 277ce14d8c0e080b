"""What is known to be read by any code of a program, and which entries of a namespace that makes a part of it."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchcache.identity.callables import CONSTRUCTORS, is_implied
from torchcache.identity.homes import beneath_class, is_installed, module_of, named_class
from torchcache.identity.node import Node, Space
from torchcache.identity.per_class import once_per_class
from torchcache.identity.symbols import DISPLAYED

# Namespaces that code writes to; of a class's, what is no method.
_WRITTEN = ("attribute", "buffer", "global")
# Special methods that run where nothing but an attribute of an object is taken, or its class is asked for.
_OF_ATTRIBUTES = frozenset("__getattr__ __getattribute__ __get__ __set__ __delete__ __subclasshook__".split())
# What imports and Dynamo put among the globals of a file, as ``__name__``, ``__compiled_fn_3_...`` and ``_1402_c0``.
_OF_MACHINERY = re.compile(r"__|\w*_\d+_c\d+$")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_ANSWERS = ("__getattr__", "__getattribute__")
_DESCRIPTORS = (staticmethod, classmethod, property)


@once_per_class
def has_named_methods(kind: type) -> bool:
    """Whether an attribute of an object may be code of a library that calls special methods of its class."""
    bases = [base for base in kind.__mro__[:-1] if named_class(base)]
    return any(module_of(base) not in ("abc", "typing") for base in bases)


class Known:
    """What code is known to read; it grows while a program is found.

    Parameters
    ----------
    without : frozenset of str
        Names of attributes and variables that are no part, whatever reads them.

    Attributes
    ----------
    names : set of str
        Names that are read on any object.
    used : set of str
        Names under which objects stand that are used for more than their attributes.
    whole : dict of str to int
        Names under which objects stand that are read as a whole: 1, or 2 with all that is within them.
    whole_classes : set of type
        Classes whose objects are read as a whole.
    packages : set of str
        Packages of whose objects any may be read as a whole.
    everything, tree : bool
        Whether any object may be read as a whole; whether all that a tree of modules holds is.
    fragments : set of str
        Texts that names of environment variables may be put together of.
    own_forward : Node, optional
        A ``forward`` that an object has itself and does not run, since another of its methods is marked.
    kind : type, optional
        The class of that object.
    """

    def __init__(self, without: frozenset[str]) -> None:
        self.without = without
        self.names: set[str] = {"__call__"}
        self.used: set[str] = set()
        self.whole: dict[str, int] = {}
        self.whole_classes: set[type] = set()
        self.packages: set[str] = set()
        self.everything = self.tree = False
        self.fragments: set[str] = set()
        self.own_forward: Node | None = None
        self.kind: type | None = None
        self._used_classes: set[type] = set()

    def use(self, kind: type) -> set[type]:
        """Note that an object of a class is used for more than its attributes; the classes of which that is news."""
        kind = beneath_class(kind)
        if kind in self._used_classes or named_class(kind):
            return set()
        new = {base for base in kind.__mro__ if not named_class(base)} - self._used_classes
        self._used_classes |= new
        return new

    def is_used(self, kind: type) -> bool:
        """Whether such an object is known of a class, or of one that has a base in common with it."""
        return has_named_methods(kind) or not self._used_classes.isdisjoint(kind.__mro__)

    def note_searched(self, met: Mapping[str, Sequence[Any] | None], given: set[str], classes: Iterable[Node]) -> bool:
        """Note that any object may be read, where what attributes hold that is read under computed names may be any.

        That is what a descriptor gives, or a class that makes up attributes; what stands under no name that was met,
        and under one that code gives: an object that is made as it runs may hold it.

        Parameters
        ----------
        met : mapping
            By the name of the attribute, what stands under it beside atoms; ``None`` where nothing does.
        given : set of str
            Names that code gives.
        classes : iterable of Node
            The classes of the program.

        Returns
        -------
        bool
            Whether that is news.
        """
        if self.everything or not met:
            return False
        unmet = any(values is None or any(map(_is_descriptor, values)) for values in met.values())
        self.everything = unmet or not given.isdisjoint(met) or any(map(_answers, classes))
        return self.everything

    def level_of(self, node: Node) -> int:
        """How much of an object is read because of what was seen before it was met."""
        if self.everything:
            return int(_has_names(node))
        if node.kind == "class":  # those of packages keep what was made of them, for whichever model
            read = not self.whole_classes.isdisjoint(node.value.__mro__)
            return int(read and not is_installed(module_of(node.value)))
        if node.kind not in ("object", "module"):
            return 0
        bases = type(node.value).__mro__
        if not self.whole_classes.isdisjoint(bases):
            return 1
        return int(any(module_of(base).partition(".")[0] in self.packages for base in bases))

    def wanted(self, node: Node, space: Space, name: str) -> bool:
        """Whether an entry of a namespace is read."""
        kind = space.kind
        if name in self.without and (kind in _WRITTEN or (kind == "member" and not callable(space.held.get(name)))):
            return False
        if kind in ("variable", "item"):
            parts = self.fragments if kind == "variable" else ()
            made = any(name.startswith(part) or name.endswith(part) for part in parts)
            return made or node.level > 0 or space.key(name) in self.names
        if kind == "member" and name in CONSTRUCTORS:
            return node.constructed
        if name in self.names or name in node.names or f"{name}[]" in self.names:
            return True
        if kind == "member":
            return self._runs(node, name)
        if node.level > 0 and kind == "global":
            return not _OF_MACHINERY.match(name) and self._may_change(node, space.held.get(name))
        if node.level > 0:
            return True
        if kind == "child":
            return self.tree or "_modules" in node.names
        if kind in ("parameter", "buffer"):
            return self.tree or f"_{kind}s" in node.names
        return kind == "attribute" and name == "forward" and node is not self.own_forward

    def _runs(self, node: Node, name: str) -> bool:
        """Whether an entry of a class may be run without its name in the code: by operators and by calls."""
        if is_implied(name, node.constructed):
            return name in _OF_ATTRIBUTES or node.constructed or self.is_used(node.value)
        if name == "forward" and (self.kind is None or node.value not in self.kind.__mro__):
            return True  # instances are called as modules, not only by a method that is marked
        if not node.level or (name.startswith("__") and name.endswith("__") and name not in DISPLAYED):
            return False
        return self._may_change(node, vars(node.value).get(name))

    def _may_change(self, node: Node, member: Any) -> bool:
        """Whether an entry of a class or a Python module may, which code of an installed package does not."""
        if not (callable(member) or isinstance(member, (*_DESCRIPTORS, types.ModuleType))):
            return True
        names = node.value if type(node.value) is dict else vars(node.value)
        home = module_of(node.value) if node.kind == "class" else str(names.get("__name__", ""))
        return not is_installed(home)


def _is_descriptor(value: Any) -> bool:
    return hasattr(type(value), "__get__") and not isinstance(value, _FUNCTIONS)


def _answers(node: Node) -> bool:
    """Whether a class makes up attributes of its objects."""
    return not named_class(node.value) and not vars(node.value).keys().isdisjoint(_ANSWERS)


def _has_names(node: Node) -> bool:
    """Whether code may read what it holds under names: an object of any kind, but no container without attributes."""
    if node.kind == "group":
        return any(space.kind == "attribute" for space in node.spaces)
    if node.kind == "python module":
        return isinstance(node.value, types.ModuleType)
    return node.kind in ("object", "module", "class", "tensor", "function", "python modules")
