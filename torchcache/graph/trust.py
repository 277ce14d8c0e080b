"""Marks whose programs are watched: Dynamo need neither guard what is in them nor pass their state.

A watch sees all that a program consists of, at a fraction of what a guard for each attribute and each parameter costs.
Regions then take their state from the program, and what only they read is no input of the graph any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torchcache.graph.feed import lookups_in, static_state
from torchcache.graph.marked import MarkedCall
from torchcache.graph.region import GraphRegion, program_now
from torchcache.lookup.fingerprint import Program
from torchcache.lookup.parts import NOTES

__all__ = ["Owned", "trust_programs"]


@dataclasses.dataclass(frozen=True)
class Owned:
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

    def hand_over(self, programs: Mapping[Any, Program]) -> list[torch.Tensor]:
        """Give the region its state out of ``programs``, by subject; returns it."""
        state = [programs[subject].at(place) for subject, place in self.places]
        self.region.hold(state)
        return state


def trust_programs(module: fx.GraphModule, regions: Sequence[GraphRegion]) -> list[Owned]:
    """Take the state of watched marks out of a graph, and what is in them out of what Dynamo is about to guard.

    To be called while Dynamo waits for its backend. The caller hands the regions their state, and uses the graph only
    as long as their programs, and what their state looks like, are what they were.

    Parameters
    ----------
    module : fx.GraphModule
        A graph with lookups, changed in place.
    regions : sequence of GraphRegion
        What they call.

    Returns
    -------
    list of Owned
        The regions that get their state from the caller.
    """
    if any(isinstance(child, fx.GraphModule) for child in module.children()):
        return []  # bodies of higher-order operators have inputs of their own
    inputs = {node: node.meta["grapharg"] for node in module.graph.find_nodes(op="placeholder")}
    owned = []
    for node, region in lookups_in(module, regions):
        state = region.plan.positions("state")
        taken = static_state(region, node, inputs)
        places = _places(region.plan.calls, [inputs[node.args[0][index]].example for index in taken])
        if places is not None and taken == state:
            region.take_state(node, taken)
            owned.append(Owned(region, places))
    if owned:
        for node in inputs:
            if not node.users and isinstance(node.meta["example_value"], torch.Tensor):
                module.graph.erase_node(node)
        module.recompile()
        sources = {call.source for owner in owned for call in owner.region.plan.calls}
        read = {inputs[node].source for node in module.graph.find_nodes(op="placeholder")}
        _trust(sources, read)
    return owned


def _places(calls: Sequence[MarkedCall], state: Sequence[torch.Tensor]) -> tuple[tuple[Any, int], ...] | None:
    """Where the programs of ``calls`` hold ``state``; ``None`` where they do not, or are not watched."""
    if not all(map(_is_watched, calls)):
        return None
    found: dict[int, tuple[Any, int]] = {}
    for call in calls:
        for place, tensor in enumerate(program_now(call).tensors):
            found.setdefault(id(tensor), (call.subject, place))
    if any(id(tensor) not in found for tensor in state):
        return None
    return tuple(found[id(tensor)] for tensor in state)


def _is_watched(call: MarkedCall) -> bool:
    if call.subject_module is None or call.source is None or call.options.persistent_module_hash is not None:
        return False
    return program_now(call).watched


def _trust(sources: set[Any], read: set[Any]) -> None:
    """Have Dynamo guard which modules lie at ``sources``, and of what is in them only what leads to ``read``."""
    from torch._dynamo.guards import GuardBuilder

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
    for guard in [*kept, *(source.make_guard(GuardBuilder.ID_MATCH) for source in sources)]:
        guards.add(guard)


def _way_to(source: Any) -> Iterator[Any]:
    """``source``, and all through which it is found."""
    while source is not None:
        yield source
        source = getattr(source, "base", None)
