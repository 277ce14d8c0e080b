"""The pass: the frozen parts of marked calls in a graph become lookups."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from torchcache.dynamo import fix_rows
from torchcache.errors import brief
from torchcache.graph.beside import Beside
from torchcache.graph.checkpoints import bodies
from torchcache.graph.closed import is_closed
from torchcache.graph.cut import Cut, cut_region, writers_of
from torchcache.graph.extract import Inputs, extract, graph_digest, inputs_of
from torchcache.graph.fewest import reachable
from torchcache.graph.frozen import MADE, Analysis, Verdict, analyse, reads_frozen
from torchcache.graph.general import generalised
from torchcache.graph.partition import partition
from torchcache.graph.parts import Part, part_of, parts_of
from torchcache.graph.region import GraphCall, Original, Plan, regions_for
from torchcache.graph.shapes import spread_shapes
from torchcache.graph.sizes import Rows, Unfit
from torchcache.graph.state import ModuleState, Paths, find_state
from torchcache.logging import logger, warn_once
from torchcache.op import LOOKUP, register
from torchcache.regions import region_of


@dataclasses.dataclass
class Outcome:
    """What became of the marked calls in a graph.

    Parameters
    ----------
    regions : list of Beside
        The regions of the parts that are looked up.
    reasons : list of str
        Why other parts are not.
    nothing : dict of str to str
        By their names, marks of which no part in the graph is cached, and why.
    draws : bool
        Whether anything in the graph draws random numbers, or may.
    frozen : bool
        Whether the graph is given anything that is frozen.
    """

    regions: list[Beside] = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)
    nothing: dict[str, str] = dataclasses.field(default_factory=dict)
    draws: bool = False
    frozen: bool = False

    def tell_of_nothing(self) -> None:
        """Say of which marks no part is cached."""
        for name, why in self.nothing.items() if not self.regions else ():
            warn_once(f"no part of {name} is cached while it trains: {why}")


def cache_regions(
    module: fx.GraphModule,
    compile_original: Callable[[fx.GraphModule], Original] | None = None,
) -> Outcome:
    """Replace the frozen parts of marked calls in a Dynamo graph by lookups, in place.

    What cannot be replaced stays as it is, with a reason that is logged.

    Parameters
    ----------
    module : fx.GraphModule
        As Dynamo gives it to a backend.
    compile_original : callable or None
        How to compile a region's original, for its misses; ``None`` runs it eagerly.

    Returns
    -------
    Outcome
        The regions, and the reasons.
    """
    fix_rows()
    outcome, looked = Outcome(frozen=reads_frozen(module.graph)), list[tuple[fx.Graph, Analysis]]()
    for graph_module in (*bodies(module), module):
        nested = graph_module is not module
        looked += [(graph_module.graph, _cache_graph(graph_module, outcome, compile_original, nested))]
    for regions in outcome.regions:
        logger.info("a frozen part of %s is cached", regions.name)
    for graph, analysis in looked:
        _tell(graph, analysis, outcome)
    return outcome


def _cache_graph(
    module: fx.GraphModule,
    outcome: Outcome,
    compile_original: Callable[[fx.GraphModule], Original] | None,
    nested: bool,
) -> Analysis:
    """The same for one graph; one that is ``nested`` in another may be given what that writes to."""
    graph = module.graph
    if not parts_of(graph.nodes):
        return Analysis()
    before = len(outcome.regions)
    try:
        spread_shapes(graph)
        analysis = analyse(graph)
        groups = partition(graph, analysis)
    except Exception as error:
        logger.debug("a graph could not be analysed", exc_info=True)
        outcome.reasons.append(f"its graph cannot be analysed ({type(error).__name__}: {brief(error)})")
        analysis, groups = Analysis(draws=True), []
    outcome.draws |= analysis.draws
    for nodes in groups:
        try:
            regions = _cache(graph, nodes, analysis, compile_original, nested)
        except Unfit as unfit:
            outcome.reasons.append(str(unfit))
        except Exception as error:
            logger.debug("a part of a graph could not be cut out", exc_info=True)
            outcome.reasons.append(f"it cannot be cut out of its graph ({type(error).__name__}: {brief(error)})")
        else:
            outcome.regions += [regions] if regions is not None else []
    if len(outcome.regions) > before:
        graph.lint()
        module.recompile()
    return analysis


def _cache(
    graph: fx.Graph,
    nodes: list[fx.Node],
    analysis: Analysis,
    compile_original: Callable[[fx.GraphModule], Original] | None,
    nested: bool,
) -> Beside | None:
    """Put a lookup in place of ``nodes``, as far as they give rows."""
    cut = cut_region(nodes, analysis)
    if cut is None:
        return None
    inputs = inputs_of(cut, analysis)
    anchor = _anchor(graph, cut, inputs)
    parts = parts_of(cut.nodes)
    # What only the region reads need not be passed to it.
    inside = set(cut.nodes)
    own = [node for node in inputs.state if not nested and all(user in inside for user in node.users)]
    held = find_state(own, parts[0].module)
    inputs.state.sort(key=lambda node: node not in held)
    rows = Rows(
        [node.meta["example_value"] for node in inputs.data],
        [node.meta["example_value"] for node in inputs.sizes],
        cut.batch,
    )
    original = extract(cut, analysis, inputs, rows)
    if rows.fixed:
        others = (*_traced(inputs.state), *_traced(inputs.sizes))
        general = generalised(original, _traced(inputs.data), others, rows.first, rows.fixed)
        if general is not None:
            original = general
            rows.free()
    plan = Plan(
        module=original,
        data=_traced(inputs.data),
        state=_traced(inputs.state),
        outputs=_by_row(cut),
        rows=rows,
        parts=tuple(parts),
        digest=graph_digest(original.graph, len(inputs.data), len(inputs.state), rows.first, rows.fixed),
        closed=is_closed(original.graph, _traced(inputs.data)),
    )
    paths = tuple(held[node] for node in inputs.state if node in held)
    regions = regions_for(plan, paths, compile_original)
    call = GraphCall(regions, plan, ModuleState(parts[0].module, paths))
    name = _name(plan, paths, len(inputs.data) + len(inputs.state) - len(paths), call)
    for part in parts:
        register(part.owner, name, call)
        region_of(part.mark, part.module).partial = True
    _replace(graph, cut, anchor, analysis, (*_node_arguments(inputs, rows, held), name), plan)
    _erase(graph, nodes, inside, analysis)
    return regions


def _traced(nodes: Sequence[fx.Node]) -> tuple[Any, ...]:
    return tuple(node.meta["example_value"] for node in nodes)


def _by_row(cut: Cut) -> tuple[Any, ...]:
    """What a region gives, as traced, with the rows as its first dimension."""
    given = zip(_traced(cut.outputs), cut.entries, strict=True)
    return tuple(leaf if count == 1 else leaf.unflatten(0, (-1, count)) for leaf, count in given)


def _name(plan: Plan, paths: Paths, passed: int, call: GraphCall) -> str:
    """A name for a call that says all that tells it from others: what computes, which state it finds, what it returns.

    Compilers that find code by the text of a graph must see in it what the call returns.
    """
    seen = [(str(leaf.dtype), str(leaf.device), str(leaf.shape), str(leaf.stride())) for leaf in plan.outputs]
    subjects = [part.subject for part in plan.parts]
    digest = graph_digest(plan.module.graph, plan.digest, seen, subjects, paths, passed, str(call.autocast))
    return f"{plan.parts[0].subject}/{digest.hex()[:16]}"


def _node_arguments(inputs: Inputs, rows: Rows, held: Any) -> tuple[list[fx.Node], list[fx.Node]]:
    passed = [node for node in inputs.state if node not in held]
    numbers = [node for node, place in zip(inputs.sizes, rows.counts, strict=True) if place is None]
    return [*inputs.data, *passed], numbers


def _anchor(graph: fx.Graph, cut: Cut, inputs: Inputs) -> fx.Node:
    """The node before which the lookup goes: after all that it is given, before all that read it."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    first = min((user for node in cut.outputs for user in cut.readers(node)), key=order.__getitem__)
    if order[first] <= max(order[node] for node in [*inputs.data, *inputs.state, *inputs.sizes]):
        raise Unfit("it is read before all that it reads is ready")
    last = cut.nodes[-1]
    return last.next if order[last] < order[first] else first


def _replace(
    graph: fx.Graph,
    cut: Cut,
    anchor: fx.Node,
    analysis: Analysis,
    arguments: tuple[list[fx.Node], list[fx.Node], str],
    plan: Plan,
) -> None:
    tensors, numbers, name = arguments
    with graph.inserting_before(anchor):
        lookup = graph.call_function(LOOKUP, ([_detached(graph, node) for node in tensors], numbers, name))
        lookup.meta["example_value"] = list(plan.outputs)
        replacements = {}
        for index, node in enumerate(cut.outputs):
            item = graph.call_function(operator.getitem, (lookup, index))
            if cut.entries[index] > 1:
                item = graph.call_method("flatten", (item, 0, 1))
            item.meta = {key: value for key, value in node.meta.items() if key != "custom"}
            replacements[node] = item
            analysis.varying.add(item)
            analysis.contexts[item] = analysis.contexts[node]
    for node, item in replacements.items():
        for user in cut.readers(node):
            if user is not lookup:
                user.replace_input_with(node, item)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A tensor as a region is given it: what it makes of one that needs a gradient needs none."""
    given = node.meta["example_value"]
    if not given.requires_grad:
        return node
    detached = graph.call_method("detach", (node,))
    detached.meta = {"example_value": given.detach()}
    return detached


def _erase(graph: fx.Graph, nodes: Sequence[fx.Node], inside: set[fx.Node], analysis: Analysis) -> None:
    """Erase what only the region read, and what nobody reads; what writes to a tensor that stays is read with it."""
    members = dict.fromkeys(nodes)
    writers = [node for node in nodes if node in analysis.written]
    read = [
        node
        for node in nodes
        if any(user not in members for user in node.users) or (node in analysis.written and node not in inside)
    ]
    live = reachable(read, members, lambda node: [*node.all_input_nodes, *writers_of(node, writers, analysis)])
    for node in reversed(nodes):
        if node not in live:
            graph.erase_node(node)


def _tell(graph: fx.Graph, analysis: Analysis, outcome: Outcome) -> None:
    """Log what else of the marks in a graph is not cached, and why; note those of which nothing is."""
    verdicts: dict[Part, Verdict] = {}
    for node, verdict in analysis.verdicts.items():
        part = part_of(node) if node.op != "placeholder" else None
        if part is not None:
            verdicts.setdefault(part, verdict)
    for part in parts_of(graph.nodes):
        name = region_of(part.mark, part.module).name
        if part in verdicts:
            tell = warn_once if verdicts[part].kind == MADE else logger.info
            tell(f"{name} is not cached from here on: {verdicts[part].reason}")
        tells = analysis.varying or outcome.reasons  # of a piece that reads no data there is nothing to tell
        if tells and not outcome.regions and not region_of(part.mark, part.module).partial:
            outcome.reasons += [verdicts[part].reason] if part in verdicts else []
            why = outcome.reasons[0] if outcome.reasons else "nothing in it is frozen and gives rows"
            outcome.nothing.setdefault(name, why)
