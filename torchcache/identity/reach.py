"""Which objects a program consists of: all that its code can reach by the names that it reads."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from torchcache.identity.callables import HOMES, Torch, patches, simplify
from torchcache.identity.describe import describe
from torchcache.identity.entries import OwnEntries, describe_items, has_items
from torchcache.identity.environment import is_environment, named_variables, variables_of
from torchcache.identity.homes import (
    beneath_class,
    file_digest,
    home_of,
    is_class,
    is_installed,
    is_named,
    looks_inside,
    module_of,
    named_class,
)
from torchcache.identity.known import Known
from torchcache.identity.modules import CONTAINERS, TREE, TREE_HOMES, GlobalHooks, is_module_class
from torchcache.identity.node import Check, Node, Space, home_around, is_own, names_owner, owner_of, sentence
from torchcache.identity.objects import ignored, member_space
from torchcache.identity.reads import STREAMS, Chain, Reads, closed_over, holds_readers, is_reader, is_reader_of_scopes
from torchcache.identity.resolve import MISSING, resolve
from torchcache.identity.symbols import DISPLAYED
from torchcache.identity.values import ATOMS

# Calls from one function of an installed package to the next that are followed; what is beyond counts by its file.
FOLLOWED = 1


class Reach:
    """The objects of a program, found from its roots; what is reached and what is read grow until neither does.

    ``without`` are names of attributes and variables that are no part, whatever reads them, nor are hooks of
    the module with the id ``bare``.
    """

    def __init__(self, without: frozenset[str] = frozenset(), bare: int = 0) -> None:
        self._bare = bare
        self.nodes: dict[int, Node] = {}
        self.bindings: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.written: set[str] = set()
        self._searched: set[str] = set()
        self._given: set[str] = set()
        self.known = Known(without)
        self.problem = ""
        self._todo: list[Node] = []
        self._classes: list[Node] = []
        self._waiting: dict[str, list[tuple[Node, Space, str]]] = {}
        self._under: dict[str, list[Any]] = {}
        self._scopes = False
        self._tables: OwnEntries | None = None

    def from_subject(self, module: nn.Module | None, function: Any, given: Iterable[type] = ()) -> None:
        """Find all that a call of ``function`` can reach, on ``module`` first and objects of the classes ``given``."""
        owner, classes = None, [(f"the class {kind.__qualname__}", kind) for kind in given]
        for kind in given:
            self._use(kind)
        self._todo.append(root := Node(None, parts=classes, kind="object"))
        if module is not None:
            self._tables = OwnEntries(module)
            node = self._reach(module, root, "")
            if getattr(simplify(function), "__name__", "forward") != "forward":
                self.known.own_forward, self.known.kind = node, type(module)
            owner = self.nodes.get(id(beneath_class(type(module))))
        self._run()
        self._reach(function, owner or root, "" if owner is None else f"the method {getattr(function, '__name__', '')}")
        self._reach(GlobalHooks, root, "the global hooks")
        self._reach(Torch, root, "")
        self._run()
        while self._reads_more():
            self._raise_levels()
            self._run()
        for node in self._sealed():
            node.head = ("installed", *node.head, file_digest(home_of(node.value)))

    def _reads_more(self) -> bool:
        """Whether more may be read as a whole than was known: anything, or any object of a package."""
        met = {name: self._under.get(name) for name in self._searched}
        if self.known.note_searched(met, self._given | self.written, self._classes):
            return True
        packages = {home_of(node.value).partition(".")[0] for node in self._sealed()} - self.known.packages
        self.known.packages |= packages
        return bool(packages)

    def _sealed(self) -> list[Node]:
        """Functions of installed packages that are too far from the program to be followed: their files name them."""
        return [node for node in self.nodes.values() if node.reads is not None and node.depth > FOLLOWED]

    def _run(self) -> None:
        while self._todo:
            self._visit(self._todo.pop())

    def node_of(self, value: Any) -> Node | None:
        """The node of an object that is not an atom."""
        return self.nodes.get(id(simplify(value)))

    def _reach(
        self, value: Any, parent: Node, label: str, level: int = 0, as_type: bool = False, further: int = 0
    ) -> Node | None:
        """Meet ``value``, a part of ``parent`` and ``further`` calls away; of a dict at ``level`` -1 single items."""
        if type(value) in ATOMS:
            return None
        value = simplify(value)
        named = label.rpartition(" ")[2].rpartition(".")[2]
        if is_environment(value) and named not in (getattr(value, "__name__", ""), "environ", "environb"):
            self._read_environment(parent)
        if type(value) is types.FunctionType and is_named(home_of(value)) and not is_installed(home_around(parent)):
            self._read_environment(parent, variables_of(value))
        if is_reader(value) and (named != value.__name__ or not label.startswith("the global")):
            self._read_anything(home_around(parent))
            if is_reader_of_scopes(value):
                self._read_scopes()
        node = self.nodes.get(id(value))
        depth = parent.depth + further
        if node is None or (node.kind == "items" and level >= 0):
            try:
                node = describe_items(value) if level < 0 else describe(value, self._bare)
            except Exception as error:  # code of the object's own, which failed
                node = Node(value, problem=f"cannot be read: {type(error).__name__}: {error}")
            node.parent, node.label = parent, label
            node.depth = 0 if is_own(node) else depth
            self.nodes[id(value)] = node
            if node.kind == "class":
                self._classes.append(node)
                if self.known.is_used(node.value):
                    self._use(node.value)
            node.level = max(level, int(node.whole), self.known.level_of(node))
            node.constructed = not as_type
            self._todo.append(node)
            if node.problem and not self.problem:
                self.problem = sentence(node)
        elif level > node.level or depth < node.depth or not (as_type or node.constructed):
            node.level = max(level, node.level)
            node.depth = min(depth, node.depth)
            node.constructed = node.constructed or not as_type
            self._todo.append(node)
        return node

    def _visit(self, node: Node) -> None:
        if node.kind == "items" and node.level:
            self._reach(node.value, node.parent or node, node.label, node.level)
            return
        if not node.visited and node.depth <= FOLLOWED:
            node.visited = True
            if node.reads is not None:
                self._code(node, node.reads)
            for name in node.adds:
                self._name(name, used=True)
            for text in node.texts:
                self._text(text)
        if node.kind == "function" and self.known.without:
            variables = zip(node.value.__code__.co_freevars, node.value.__closure__ or (), strict=False)
            left = [cell for name, cell in variables if closed_over(name) in self.known.without]
            node.parts = [part for part in node.parts if not any(part[1] is cell for cell in left)]
        inner = node.level if node.kind == "group" or node.level > 1 else 0
        typed = node.kind in ("module", "object", "tensor")
        for label, value in node.parts:
            if label.startswith("the global"):
                self._reach(value, node, label, further=1, as_type=value in node.types)
            elif (typed and is_class(value)) or (label == ".__mro__" and not node.constructed):
                self._reach(value, node, label, as_type=True)
            else:
                self._use(type(value))
                self._reach(value, node, label, inner, as_type=is_module_class(value))
        if node.level and node.kind == "python modules" and not node.parts:
            self._read_modules(node)
        if node.level and node.kind in ("object", "module"):
            self._widen_classes(node)
        if node.kind == "class" and node.depth > FOLLOWED:
            return
        for space in node.spaces:
            for name in space.held:
                if name in space.chosen:
                    self._meet(node, space, name)
                elif self.known.wanted(node, space, name):
                    self._choose(node, space, name)
                else:
                    for key in (space.key(name), f"{name}[]"):
                        self._waiting.setdefault(key, []).append((node, space, name))

    def _widen_classes(self, node: Node) -> None:
        """An object that is read under unknown names may have any method of the user's own called."""
        self._use(type(node.value))
        for base in beneath_class(type(node.value)).__mro__:
            known = self.nodes.get(id(base))
            if known is not None and not known.level and not named_class(base) and not is_installed(module_of(base)):
                known.level = 1
                self._todo.append(known)

    def _choose(self, node: Node, space: Space, name: str) -> None:
        space.chosen.add(name)
        if type(space.held[name]) is str and space.kind != "variable":
            self._text(space.held[name])
        under = self._under.setdefault(name, [])
        if type(space.held[name]) not in ATOMS:
            under.append(space.held[name])
            self._meet(node, space, name)

    def _meet(self, node: Node, space: Space, name: str) -> None:
        """What stands under a name that is read."""
        container = node.kind == "module" and space.kind == "child" and isinstance(node.value, CONTAINERS)
        level = max(self.known.whole.get(name, 0), node.level if node.level > 1 or container else 0)
        label = {"global": f"the global {name}", "item": f"[{name!r}]"}.get(space.kind, f".{name}")
        value = space.held[name]
        if name in self.known.used or name in node.names or level or space.kind == "item":
            self._use(type(value))
        whole = level or node.level or space.kind == "item" or name in self.known.names or name in node.names
        level = -1 if not whole and has_items(value) else level
        self._reach(value, node, label, level, is_module_class(value), further=int(space.kind == "global"))

    def _use(self, kind: type) -> None:
        """An object of this class is used for more than its attributes: special methods of it run."""
        if new := self.known.use(kind):
            for node in [node for node in self._classes if not new.isdisjoint(node.value.__mro__)]:
                self._use(node.value)
                self._todo.append(node)

    def _name(self, name: str, used: bool = False) -> None:
        """A name is read: whatever has an entry of that name has it read, and maybe ``used``."""
        if used and name not in self.known.used:
            self.known.used.add(name)
            for value in self._under.get(name, ()):
                self._use(type(value))
        if name in self.known.names:
            return
        self.known.names.add(name)
        for node, space, entry in self._waiting.pop(name, ()):
            if entry in space.chosen:  # an item of it was read, and now it is
                self._meet(node, space, entry)
            elif self.known.wanted(node, space, entry):
                self._choose(node, space, entry)

    def _text(self, text: str) -> None:
        """A text is known to the program: it may name an environment variable, or be put together to such a name."""
        self._name(f"${text}")
        part = len(text) > 2 and text.startswith("_") != text.endswith("_")
        if part and text not in self.known.fragments:
            self.known.fragments.add(text)
            for key in [key for key in self._waiting if key.startswith("$")]:
                if key[1:].startswith(text) or key.endswith(text):
                    self._name(key)

    def _code(self, node: Node, reads: Reads) -> None:
        scope, home = node.value.__globals__, home_of(node.value)
        # What libraries make texts of are messages.
        for name in sorted(reads.names - DISPLAYED if is_installed(home) else reads.names):
            self._name(name, name in reads.used)
            if name in TREE:
                self._read_tree()
        for name, key in reads.items:
            self._name(name if ignored(key) else f"{name}[]")
            self._name(f"[{key}]")
        for text in reads.texts | reads.variables:
            self._text(text)
        self.written |= reads.written
        for chain in sorted({*reads.chains, *reads.whole_chains}):
            self._chain(node, reads, chain, scope)
        for name in reads.whole | reads.deep:
            self._read_whole(name, 2 if name in reads.deep else 1)
        searched = set(reads.searched)
        for chain in reads.whole_chains:
            found = resolve(chain, scope)
            value, last = found.value, found.rest[-1:]
            for name in last:  # of an object that the chain leads to
                self._read_whole(name, 1)
            searched.update(last)
            if isinstance(value, types.ModuleType):
                if holds_readers(value):
                    self._read_anything(home)
                    self._read_scopes()
                if any(map(is_environment, list(vars(value).values()))):
                    self._read_environment(node)
                if is_named(value.__name__) and value not in HOMES:
                    node.parts += [(f"the global {chain}.{name}", member) for name, member in patches(value)]
                elif not (is_named(value.__name__) or is_installed(value.__name__)):
                    self._reach(value, node, f"the global {chain}", 1)
            elif value is not MISSING and not (is_class(value) and named_class(value)):
                self._reach(value, node, f"the global {chain}", 1)
        if not is_installed(home):
            self._searched |= searched
            self._given |= reads.given
            if reads.scopes:
                self._read_scopes()
            if reads.scope or self._scopes:
                self._read_globals(node)
            if reads.modules:
                self._read_modules(node)
            self._read_environment(node, named_variables(node.value, reads))
        handed_first = False
        for chain, attributes, first in reads.handed:
            if looks_inside(resolve(chain, scope).value):
                handed_first |= first
                for name in attributes:
                    self._read_whole(name, 1)
        owner = owner_of(node)
        if reads.used_first and owner is not None:
            self._use(owner)
        if reads.whole_first or handed_first:
            if owner is not None:
                self._read_instances(owner)
            if reads.whole_first and (owner is None or not names_owner(node)):
                self._read_anything(home)  # any object may be handed to it by its class
        if reads.anything:
            self._read_anything(home)

    def _chain(self, node: Node, reads: Reads, chain: Chain, scope: dict[str, Any]) -> None:
        found = resolve(chain, scope)
        where, last = found.bindings[-1]
        if where is vars(sys) and last in STREAMS:  # written to, by whoever redirects them
            return
        for mapping, name in found.bindings:
            self.bindings.setdefault(id(mapping), (mapping, set()))[1].add(name)
        if last in self.known.without and last in chain.names:
            return
        for name in found.rest:
            self._name(name, name in reads.used)
            if name in TREE and not isinstance(found.value, type):
                self._read_tree()
        value = found.value
        label = f"the global {Chain(chain.module, chain.names[: len(chain.names) - len(found.rest)])}"
        if value is MISSING:
            node.parts.append((label, "missing"))
            return
        value = value if self._tables is None else self._tables.of(value)
        if type(value) is str:
            self._text(value)
        if chain in reads.types and is_class(value):
            node.types.append(value)
        if not found.rest and (not chain.names or chain.names[-1] in reads.used):
            self._use(type(value))
        node.parts.append((label, value))
        home = home_of(value) if isinstance(value, types.FunctionType) else ""
        if home.startswith(TREE_HOMES):
            self._read_tree()
        if home == "os":
            node.parts.append(("the global os.environ", os.environ))
        if found.rest and is_class(value) and not is_installed(home_of(node.value)):
            self._read_environment(node, variables_of(value, found.rest))

    def _read_whole(self, name: str, level: int) -> None:
        """Whatever stands under this name is read under names that only the running code knows."""
        if level <= self.known.whole.get(name, 0):
            return
        self.known.whole[name] = level
        for value in self._under.get(name, ()):
            node = self.node_of(value)
            if node is not None and node.level < (most := min(level, 1) if node.kind == "function" else level):
                node.level = most
                self._todo.append(node)

    def _read_instances(self, owner: type) -> None:
        """All of every object of a class is read."""
        if owner not in self.known.whole_classes:
            self.known.whole_classes.add(owner)
            self._raise_levels()

    def _read_anything(self, home: str) -> None:
        """Some object is read, and which it is cannot be told: for a package, one of its own."""
        if not is_installed(home):
            if not self.known.everything:
                self.known.everything = True
                self._raise_levels()
        elif (package := home.partition(".")[0]) not in self.known.packages:
            self.known.packages.add(package)
            self._raise_levels()

    def _read_scopes(self) -> None:
        """Some function reads globals under unknown names, and which it is cannot be told."""
        if not self._scopes:
            self._scopes = True
            functions = [node for node in self.nodes.values() if node.visited and node.reads is not None]
            for node in [node for node in functions if not is_installed(home_of(node.value))]:
                self._read_globals(node)
                self._todo.append(node)

    def _read_modules(self, node: Node) -> None:
        """Some modules of the user's own are read, and which they are cannot be told, nor which are still to come."""
        node.checks.append(Check("content", sys.modules, read=len))
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType) and not is_named(name) and not is_installed(name):
                node.parts.append((f"the global {name}", module))
                self._reach(module, node, f"the global {name}", 1)

    def _read_globals(self, node: Node) -> None:
        """All globals of a function are read."""
        scope, home = node.value.__globals__, home_of(node.value)
        space = member_space("global", scope)
        self.nodes.setdefault(id(scope), Node(scope, ("globals",), spaces=[space], kind="python module"))
        node.parts.append((f"the global {home}", scope))
        self._reach(scope, node, f"the global {home}", 1)

    def _read_environment(self, node: Node, variables: frozenset[str] | None = None) -> None:
        """Environment variables are read by a node: these, or all."""
        if variables is None or variables:
            node.parts.append(("the global os.environ", os.environ))
            self._reach(os.environ, node, "the global os.environ", int(variables is None))
        for text in variables or ():
            self._text(text)

    def _read_tree(self) -> None:
        if not self.known.tree:
            self.known.tree = True
            self._todo.extend(node for node in self.nodes.values() if node.kind == "module")

    def _raise_levels(self) -> None:
        for node in list(self.nodes.values()):
            if not node.level and self.known.level_of(node):
                node.level = 1
                self._todo.append(node)
