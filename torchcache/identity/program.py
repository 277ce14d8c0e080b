"""The program of a marked call: its code and all that this code reads by name, and whether any of it changed."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from torchcache.digest.cpu import digest_bytes
from torchcache.dynamo import Stamps
from torchcache.identity.alike import alike
from torchcache.identity.callables import Torch
from torchcache.identity.containers import Place
from torchcache.identity.encode import encode
from torchcache.identity.exchange import exchange
from torchcache.identity.filled import FILLED
from torchcache.identity.homes import home_of, is_installed, is_named, module_of, named_class
from torchcache.identity.known import Known
from torchcache.identity.modules import GROUPS, GlobalHooks
from torchcache.identity.node import Check, Node, Space
from torchcache.identity.objects import ABSENT, beneath_mark, member_space, members_of
from torchcache.identity.outside import Outside
from torchcache.identity.reach import Reach
from torchcache.identity.reads import ANY
from torchcache.identity.watch import Watch, beneath_proxy, same

# Kinds of nodes that code may set attributes of.
_HOLDERS = frozenset({"object", "module", "group", "tensor", "function", "python module"})
_ASK_FOR_INFERENCE = frozenset({id(torch.is_inference_mode_enabled), id(torch.is_inference)})


class Program:
    """Code and what it reads, of a module's method or of a function.

    Parameters
    ----------
    subject : tuple of (nn.Module, callable), or callable
        The module, which owns the program and is not kept alive, and the function that takes it first; or a function
        alone.
    where : str
        Its path, for people.
    pure : bool
        Whether what the code itself writes is no part, as the user promises with ``pure=True``.
    given : tuple of type
        Classes of arguments. Where there are any, digest and tensors are of what the code takes from them alone.
    hooked : bool
        Whether hooks of the module itself run within a call.

    Attributes
    ----------
    digest : bytes
        16 bytes of identity, without the contents of tensors. Equal programs have equal digests in every process.
    tensors : list of torch.Tensor
        Every tensor that the program can reach by name, in a stable order: parameters, buffers, and any other.
    asks_for_gradients, asks_for_inference : bool
        Whether its code asks whether gradients are recorded, and whether inference mode is on.
    exchange : str
        Why other processes must run it at the same time; empty where they need not.
    problem : str or None
        Why there can be no identity: what the code reads and torchcache cannot compare, with its path and its type.
    """

    def __init__(
        self, subject: Any, where: str, pure: bool = False, given: tuple[type, ...] = (), hooked: bool = True
    ) -> None:
        module, function = subject if isinstance(subject, tuple) else (None, subject)
        self.where = where
        self.digest = bytes(16)
        self.exchange = exchange(module.named_modules(), module) if module is not None else ""
        self.problem: str | None = None
        self.asks_for_gradients = self.asks_for_inference = False
        self._places: list[Place] = []
        self._whole: set[int] = set()
        self._containers: list[Place] = []
        self._filled: list[Place] = []
        self._names: frozenset[str] = frozenset()
        # No weak references: torch swaps no tensors that have any.
        self.tensors: list[torch.Tensor] = []
        self._watch = Watch()
        try:
            bare = 0 if hooked else id(module)
            reach = Reach(bare=bare)
            reach.from_subject(module, function, given)
            if pure and reach.written:
                reach = Reach(frozenset(reach.written), bare)
                reach.from_subject(module, function, given)
            self.problem = reach.problem or None
            if module is None:
                nodes = [node for node in reach.nodes.values() if node.kind == "module"]
                self.exchange = exchange([(node.path(), node.value) for node in nodes], None)
            self.asks_for_gradients = id(torch.is_grad_enabled) in reach.nodes
            self.asks_for_inference = not reach.nodes.keys().isdisjoint(_ASK_FOR_INFERENCE)
            self.asks_for_inference |= "is_inference" in reach.known.names
            anything = not reach.written.isdisjoint((ANY, "__dict__"))
            self._names = frozenset(reach.written | reach.known.names if anything else reach.written)
            self._places = _places(reach, module)
            self._whole = {id(value) for value, _ in self._places if (node := reach.node_of(value)) and node.level}
            self._containers = [(node.value, node.path) for node in reach.nodes.values() if node.kind == "group"]
            # Of modules that are not in the tree: their parameters, buffers, children and hooks.
            beside = [(value, path) for value, path in self._places if isinstance(value, nn.Module)]
            self._containers += [(held, path) for value, path in beside for held in vars(value).values()]
            self._filled = [(node.value, node.path) for node in reach.nodes.values() if isinstance(node.value, FILLED)]
            roots = [function, GlobalHooks, Torch] if module is None else [module, function, GlobalHooks, Torch]
            self.digest, self.tensors = encode(reach, [*given] or roots)
            self._watch = _watch(reach, module)
            if "grad" in reach.known.names:
                self._read_gradients()
        except Exception as error:
            self.problem = f"{where or 'the program'} cannot be read: {type(error).__name__}: {error}"

    def _read_gradients(self) -> None:
        """Gradients of its tensors are a part, too: no namespace of a tensor shows them."""
        leaves = [tensor for tensor in self.tensors if tensor.is_leaf]
        self._watch.content(leaves, _gradients, lambda: "a gradient that it reads")
        found = _gradients(leaves)
        self.digest = digest_bytes(self.digest + bytes([gradient is not None for gradient in found]))
        self.tensors = [*self.tensors, *(gradient for gradient in found if gradient is not None)]

    def follow(self, called: Callable[[], Any]) -> None:
        """Watch that ``called`` gives the function that it gives now, in whichever class that is found."""
        self._watch.content(called, lambda called: called(), lambda: "the function that is marked")

    def unchanged(self) -> bool:
        """Whether nothing that was read has changed since: no attribute, container, class, function or global."""
        return self._watch.unchanged()

    def again(self) -> bool:
        """Whether all that was read is as it was, after it was found to have changed."""
        return self._watch.again()

    def stamps(self) -> Stamps | None:
        """Stamps of the dicts in which modules keep parameters, buffers and children; ``None`` without Dynamo."""
        return self._watch.stamps()

    def outside(self) -> Outside:
        """What the code may write outside of its module, as it is at this time."""
        return Outside(self._places, self._whole, self._containers, self._names, self.tensors, self._filled)

    def changes(self) -> list[str]:
        """What differs from what was read, by the user's names: ``blocks.3.calls``, ``the global LOG``."""
        try:
            return list(dict.fromkeys(self._watch.changes()))
        except Exception:  # what cannot be compared has changed, and has no name
            return []


def _gradients(leaves: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    return tuple([leaf.grad for leaf in leaves])


def reads(subject: Any, objects: set[int], names: set[str]) -> bool:
    """Whether the program of ``subject`` reads any of the objects with these ``id``, or a global of these names."""
    module, function = subject if isinstance(subject, tuple) else (None, subject)
    reach = Reach()
    reach.from_subject(module, function)
    return not objects.isdisjoint(reach.nodes) or any(not names.isdisjoint(read) for _, read in reach.bindings.values())


def _places(reach: Reach, module: Any) -> list[Place]:
    """Objects and cells that code may assign to, and globals of the functions that assign; not the module's tree."""
    tree = {id(inner) for inner in module.modules()} if module is not None else set()
    found: dict[int, Place] = {}
    for node in reach.nodes.values():
        kind = type(node.value)
        holds = node.kind in _HOLDERS or kind is types.CellType
        holds = (holds and kind is not dict) or (node.kind == "class" and not named_class(node.value))
        if holds and id(node.value) not in tree:
            found[id(node.value)] = (node.value, node.path)
        if node.reads is not None and node.reads.written:
            found[id(node.value.__globals__)] = (node.value.__globals__, node.path)
    return list(found.values())


def _watch(reach: Reach, module: Any) -> Watch:
    """What is to be compared later. It and the nodes do not keep the module alive, which owns the program."""
    watch = Watch(module)
    for node in reach.nodes.values():
        for check in node.checks:
            _add(watch, node, check, _often(node))
        for space in node.spaces:
            if space.live is not space.held:
                _add_space(watch, reach.known, node, space)
        if node.kind == "module":
            _add_groups(watch, node)
    for mapping, names in reach.bindings.values():
        read = {name: mapping.get(name, ABSENT) for name in sorted(names)}
        watch.namespace(mapping, read, _bound(read), closed=False)
    watch.seal()
    root = reach.node_of(module)
    if root is not None:
        root.release()
    return watch


def _add_groups(watch: Watch, node: Node) -> None:
    """Watch that a module keeps its dicts of parameters, buffers and children: tools that copy modules replace them."""
    members = vars(node.value)
    groups = {name: members.get(name) for name in GROUPS}
    path = node.path

    def differs(members: Mapping[Any, Any]) -> list[str]:
        return [f"{path()}.{name}".lstrip(".") for name, group in groups.items() if members.get(name) is not group]

    watch.namespace(members, groups, differs, closed=False)
    watch.holders += [group for group in groups.values() if type(group) is dict and group]


def _often(node: Node) -> bool:
    """Whether single attributes of an object are compared in every look: not those of code that others maintain."""
    while node.kind == "" and node.wraps and node.parent is not None:
        node = node.parent
    if node.kind == "function":
        home = home_of(node.value)
        return not (is_installed(home) or is_named(home))
    kind = node.value if node.kind == "class" else type(node.value)
    return not (isinstance(kind, type) and (named_class(kind) or is_installed(module_of(kind))))


def _add(watch: Watch, node: Node, check: Check, often: bool) -> None:
    owner, kind = check.owner, check.kind
    if kind == "kind":
        watch.kind(owner, node.path)
    elif kind == "members" and not watch.owns(owner):  # the owner's are looked up anew each time
        found: Any = type(owner).__getattribute__
        if found is object.__getattribute__:
            watch.attribute(owner, "__dict__", node.path, often)
        else:
            watch.content(owner, members_of, node.path)
    elif kind in ("attribute", "slot"):
        name = f".{check.name}" if kind == "slot" else ""
        watch.attribute(owner, check.name, lambda: node.path() + name, often)
    elif kind == "items":
        watch.items(owner, node.path)
    elif kind == "alive":
        watch.alive(owner)
    elif kind == "mapping" and (type(owner) is dict or (type(owner) is OrderedDict and not owner)):
        items = list(owner.items())
        watch.namespace(owner, dict(items), _ordered(items, node))
    elif kind == "mapping":
        watch.content(owner, _items, node.path)
    elif kind == "foreign" and check.read is not None:
        _add_foreign(watch, node, owner, check.read)
    elif check.read is not None:
        watch.content(owner, check.read, node.path)


def _add_foreign(watch: Watch, node: Node, owner: Any, foreign: Callable[[Any], Any]) -> None:
    """Watch that nothing is put into a namespace of torch."""
    live, known = beneath_proxy(vars(owner)), foreign(owner)
    held = dict(live)

    def differs(_: Mapping[Any, Any]) -> list[str]:
        return [] if same(foreign(owner), known) else [node.path() or f"{getattr(owner, '__name__', 'torch')}"]

    if type(live) is dict:
        watch.namespace(live, held, differs)


def _items(mapping: dict[Any, Any]) -> tuple[Any, ...]:
    """Names and values in turn, without code of a subclass: one of ``transformers`` imports what it is asked for."""
    if not isinstance(mapping, OrderedDict):
        return tuple(chain.from_iterable(dict.items(mapping)))
    return tuple(chain.from_iterable((name, dict.__getitem__(mapping, name)) for name in OrderedDict.__iter__(mapping)))


def _ordered(items: list[tuple[Any, Any]], node: Node) -> Callable[[Mapping[Any, Any]], list[str]]:
    def differs(mapping: Mapping[Any, Any]) -> list[str]:
        return [] if same(tuple(mapping.items()), tuple(items)) else [node.path()]

    return differs


def _bound(read: Mapping[str, Any]) -> Callable[[Mapping[Any, Any]], list[str]]:
    return lambda mapping: [
        f"the global {name}" for name, value in read.items() if not same(mapping.get(name, ABSENT), value)
    ]


def _add_space(watch: Watch, known: Known, node: Node, space: Space) -> None:
    """Watch the entries of a namespace that are read, and those that would be if they were there."""
    chosen = {name: space.held[name] for name in space.held if name in space.chosen}

    def differs(live: Mapping[str, Any]) -> list[str]:
        now = member_space(space.kind, live, space.leave).held
        found = [name for name, value in chosen.items() if not alike(now.get(name, ABSENT), value)]
        found += [name for name in now if name not in space.held and known.wanted(node, space, name)]
        if space.ordered and not found and [*filter(chosen.__contains__, now)] != list(chosen):
            found = list(chosen)
        path = node.path()
        if space.kind == "global":
            return [f"the global {name}" for name in found]
        if space.kind == "item":
            return [f"{path}[{name!r}]" for name in found]
        return [f"{path}.{name}" if path else name for name in found]

    if space.fetch is not None:
        watch.content(space.fetch, lambda fetch: tuple(differs(fetch())), node.path)
        return
    live = beneath_proxy(space.live) if isinstance(space.live, types.MappingProxyType) else space.live
    if type(live) is dict:
        keys = [beneath_mark(live, name) for name in chosen]
        read = {key: live.get(key, ABSENT) for key in keys}
        watch.namespace(live, read, differs)
    else:
        watch.content(live, lambda live: tuple(differs(live)), node.path)
