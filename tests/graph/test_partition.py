"""Regions are connected, convex and complete, on any graph."""

import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from torchcache.graph.frozen import Analysis, Verdict
from torchcache.graph.marked import Mark, MarkedCall
from torchcache.graph.partition import partition
from torchcache.options import CacheOptions

CALLS = [
    MarkedCall(Mark(len, CacheOptions(**options), of_module=False), None, path, b"")
    for path, options in (("a", {}), ("b", {}), ("c", {"max_memory_cache_size": 5}))
]


@st.composite
def graphs(draw):
    """A random dag whose nodes are marked by one of three calls, or not, and cacheable or not."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    analysis = Analysis()
    for node in nodes:
        node.meta["example_value"] = torch.empty(2)
    for _ in range(draw(st.integers(1, 14))):
        sources = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3))
        node = graph.call_function(torch.stack, (sources,))
        node.meta["example_value"] = torch.empty(2)
        call = draw(st.sampled_from([None, *CALLS]))
        if call is not None:
            node.meta["torchcache"] = [call]
            if draw(st.integers(0, 5)) == 0:
                analysis.verdicts[node] = Verdict("random", "")
        nodes.append(node)
    return graph, analysis


def reachable(starts, inside):
    """Nodes outside ``inside`` that follow from ``starts``."""
    found, pending = set(), list(starts)
    while pending:
        for user in pending.pop().users:
            if user not in inside and user not in found:
                found.add(user)
                pending.append(user)
    return found


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_regions_are_convex_disjoint_and_complete(drawn):
    graph, analysis = drawn
    regions = partition(graph, analysis)
    members = [node for region in regions for node in region]
    assert len(members) == len(set(members))
    assert set(members) == {node for node in graph.nodes if analysis.cacheable(node)}
    for region in regions:
        inside = set(region)
        for node in reachable(inside, inside):
            assert not set(node.users) & inside
        assert len({node.meta["torchcache"][0].options for node in region}) == 1
    # The regions themselves can run in some order: no two depend on each other.
    index = {node: number for number, region in enumerate(regions) for node in region}
    follows = {
        number: {index[n] for n in reachable(region, set(region)) if n in index}
        for number, region in enumerate(regions)
    }
    assert not any(number in follows[other] for number in follows for other in follows[number])


def test_a_frozen_chain_of_two_marks_is_one_region_and_two_calls_are_two():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    nodes = []
    for source, call in ((x, CALLS[0]), (None, CALLS[1]), (y, MarkedCall(CALLS[0].mark, None, "a", b""))):
        node = graph.call_function(torch.relu, (source if source is not None else nodes[-1],))
        node.meta = {"torchcache": [call], "example_value": torch.empty(2)}
        nodes.append(node)
    assert partition(graph, Analysis()) == [nodes[:2], nodes[2:]]
    assert weakref.ref(graph)() is graph
