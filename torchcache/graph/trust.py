"""Marks whose programs are watched: Dynamo need neither guard what is in them nor pass their state.

A watch sees all that a program consists of, at a fraction of what a guard for each attribute and each parameter costs.
Regions then take their state from the program, and what only they read is no input of the graph any more.
"""

from __future__ import annotations

import dataclasses
import operator
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from torchcache.graph.feed import lookups_in, static_state
from torchcache.graph.guards import asked_last, is_object
from torchcache.graph.marked import MarkedCall, traced_from
from torchcache.graph.region import GraphRegion, program_now
from torchcache.lookup.fingerprint import Program
from torchcache.lookup.parts import NOTES
from torchcache.lookup.stamps import Looks

__all__ = ["Trust", "trust_programs"]

# Such a trace is right for one module, and for one that keeps changing only until it changes: Dynamo limits how often
# code is traced, and the rest of its traces are right for any.
ASKING = 3
_asking: weakref.WeakKeyDictionary[types.CodeType, weakref.WeakSet[Trust]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class _Owned:
    """A region that takes its state from the programs of its marks.

    Parameters
    ----------
    region : GraphRegion
        The region.
    places : tuple of (subject, int)
        Whose program holds each tensor, and where.
    """

    region: GraphRegion
    places: tuple[tuple[Any, int], ...]


class Trust:
    """What a graph was traced with, as far as Dynamo does not guard it.

    Parameters
    ----------
    owned : sequence of _Owned
        The regions.

    Attributes
    ----------
    subjects : dict of subject to MarkedCall
        The marks that are watched, each with one of its calls.
    """

    def __init__(self, owned: Sequence[_Owned]) -> None:
        self._owned = owned
        self.subjects = {call.subject: call for part in owned for call in part.region.plan.calls}
        self._interrupted = False
        self._use({subject: program_now(call) for subject, call in self.subjects.items()})
        self._looks = Looks(self._state)
        # Compiled code outlives the models that it was compiled for.
        modules = [call.subject_module for call in self.subjects.values()]
        self._ends = [weakref.ref(module, self._release) for module in modules if module is not None]

    def holds(self) -> bool:
        """Whether the graph is right for the marks as they are now; its regions have their state then."""
        if any(call.subject_module is None for call in self.subjects.values()):
            return False
        programs = {subject: program_now(call) for subject, call in self.subjects.items()}
        if not all(program is known() for program, known in zip(programs.values(), self._programs, strict=True)):
            if not all(map(operator.attrgetter("watched"), programs.values())):
                return False
            if [program.digest for program in programs.values()] != self._digests:
                return False
            self._use(programs)
        return self._looks.hold(self._state)

    def holds_in_guard(self, _: object) -> bool:
        """``holds``, for Dynamo to ask, which takes any exception for a guard that fails."""
        try:
            return self.holds()
        except KeyboardInterrupt:
            self._interrupted = True
            return True

    def raise_interrupt(self) -> None:
        """Raise what came while Dynamo asked."""
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    def _release(self, _: object) -> None:
        self._state.clear()
        for part in self._owned:
            part.region.hold(())

    def _use(self, programs: dict[Any, Program]) -> None:
        self._programs = [weakref.ref(program) for program in programs.values()]
        self._digests = [program.digest for program in programs.values()]
        held: dict[int, torch.Tensor] = {}  # each tensor once, however many regions read it
        for part in self._owned:
            state = [programs[subject].at(place) for subject, place in part.places]
            part.region.hold(state)
            held.update((id(tensor), tensor) for tensor in state)
        self._state = list(held.values())


def trust_programs(
    module: fx.GraphModule, regions: Sequence[GraphRegion], code: types.CodeType | None = None
) -> Trust | None:
    """Take the state of watched marks out of a graph, and what is in them out of what Dynamo is about to guard.

    To be called while Dynamo waits for its backend.

    Parameters
    ----------
    module : fx.GraphModule
        A graph with lookups, changed in place.
    regions : sequence of GraphRegion
        What they call.
    code : code or None
        Of the function that is traced, where its caller asks before each call if the trust holds. Graphs of other
        frames, as after a graph break, run when more may have changed since it was called: these are left alone.
        ``None`` has Dynamo ask.

    Returns
    -------
    Trust or None
        ``None`` where nothing can be trusted, and nothing is changed.
    """
    root = traced_from(module.graph)
    if root is None or root != (code or root) or (code is None and len(_asking.get(root, ())) >= ASKING):
        return None
    inputs = {node: node.meta.get("grapharg") for node in module.graph.find_nodes(op="placeholder")}
    if any(argument is None for argument in inputs.values()):
        return None
    if any(isinstance(child, fx.GraphModule) for child in module.children()):
        return None  # bodies of higher-order operators have inputs of their own
    owned = [part for node, region in lookups_in(module, regions) if (part := _own(node, region, inputs)) is not None]
    if not owned:
        return None
    for node in inputs:
        if not node.users and isinstance(node.meta["example_value"], torch.Tensor):
            module.graph.erase_node(node)
    module.recompile()
    trust = Trust(owned)
    read = {inputs[node].source for node in module.graph.find_nodes(op="placeholder")}
    _guard(trust, read, asking=code is None)
    if code is None:
        _asking.setdefault(root, weakref.WeakSet()).add(trust)
    return trust


def _own(node: Any, region: GraphRegion, inputs: dict[fx.Node, Any]) -> _Owned | None:
    """Have ``region`` take all of its state from watched programs, if these hold it."""
    if not all(map(_is_watched, region.plan.calls)):
        return None
    taken = static_state(region, node, inputs)
    if taken != region.plan.positions("state"):
        return None
    found: dict[int, tuple[Any, int]] = {}
    for call in region.plan.calls:
        for place, tensor in enumerate(program_now(call).tensors):
            found.setdefault(id(tensor), (call.subject, place))
    state = [inputs[node.args[0][index]].example for index in taken]
    if any(id(tensor) not in found for tensor in state):
        return None
    region.take_state(node, taken)
    return _Owned(region, tuple(found[id(tensor)] for tensor in state))


def _is_watched(call: MarkedCall) -> bool:
    if call.subject_module is None or call.source is None or call.options.persistent_module_hash is not None:
        return False
    return program_now(call).watched


def _guard(trust: Trust, read: set[Any], asking: bool) -> None:
    """Have Dynamo guard which modules are marked, and of what is in them only what leads to ``read``."""
    marked = {call.source: call.subject_module for call in trust.subjects.values()}
    sources = set(marked)
    leading = {step for source in read for step in _way_to(source)}
    # The marks themselves, and notes of other tools, are not part of a program.
    doors = tuple(door for source in sources for door in (f"{source.name}.forward", f"type({source.name})"))

    def is_kept(guard: Any) -> bool:
        way = set(_way_to(guard.originating_source))
        inside = not way.isdisjoint(sources)
        needed = guard.originating_source in leading or not way.isdisjoint(read)
        return not inside or needed or guard.name.startswith(doors) or any(note in guard.name for note in NOTES)

    guards = torch._guards.TracingContext.get().guards_context.dynamo_guards
    kept = [guard for guard in guards if is_kept(guard)]
    guards.clear()
    for guard in kept:
        guards.add(guard)
    for source, module in marked.items():
        guards.add(source.make_guard(is_object(module)))  # whoever trusts sees when it dies
    if asking:
        said = "marked modules are as they were traced"
        guards.add(next(iter(marked)).make_guard(asked_last(trust.holds_in_guard, said)))


def _way_to(source: Any) -> Iterator[Any]:
    """``source``, and all through which it is found."""
    while source is not None:
        yield source
        source = getattr(source, "base", None)
