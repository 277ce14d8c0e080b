"""Where a region ends: the values of fewest bytes a row from which all that is read outside is cheap to compute.

A minimum cut between what is computed once and what is read outside, as the partitioner of AOTAutograd places
recomputation: a value that is stored costs its bytes, one that is cheap to compute again costs nothing. Of several
cuts as small it is the one nearest to what is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import torch
from torch import fx

from torchcache.dynamo import hint, storage_of
from torchcache.graph.frozen import Analysis, tensor_of

# Operators that only look at, compare or rearrange what there is; as their names are without underscores at the ends.
CHEAP = frozenset(
    """
    view reshape transpose permute unsqueeze squeeze expand expand_as flatten unflatten contiguous t getitem getattr to
    float half bfloat16 bool int long type type_as clone detach size eq ne lt le gt ge and or not invert logical_not
    logical_and logical_or bitwise_and bitwise_or bitwise_not neg sub rsub add mul truediv masked_fill where zeros ones
    full zeros_like ones_like full_like new_zeros new_ones new_full arange tensor empty split chunk unbind cat stack
    dropout identity
    """.split()
)
# Operators that take about as long as reading what they give: one pass over their inputs, whatever weights they read.
LIGHT = CHEAP | frozenset(
    """
    layer_norm rms_norm group_norm batch_norm instance_norm embedding relu relu6 leaky_relu gelu erf silu sigmoid tanh
    hardswish hardtanh softmax log_softmax exp log sqrt rsqrt reciprocal abs pow square sin cos clamp mean sum amax amin
    cumsum gather index_select select narrow div floordiv normalize repeat repeat_interleave roll flip pad movedim
    swapaxes
    """.split()
)
# Products of matrices with weights, of which the last before what is read may be computed again.
PRODUCTS = frozenset({"linear", "addmm"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
# The share of a region's work that may be done in every step, and the share of its bytes that this has to save.
MOST_WORK = 1 / 12
LEAST_SAVED = 1 / 4

Members = dict[fx.Node, None]
Stored = tuple[list[fx.Node], set[fx.Node]]


def fewest(
    outputs: Sequence[fx.Node], members: Members, rows: Mapping[fx.Node, int], analysis: Analysis
) -> Stored | None:
    """What of a region is stored.

    Parameters
    ----------
    outputs : sequence of Node
        The members whose values are read outside and differ between calls.
    members : dict of Node to None
        The region, in order.
    rows : dict of Node to int
        The members that are tensors with rows, which do not depend on each other, and the entries a row of each.
    analysis : Analysis
        What is known of its nodes.

    Returns
    -------
    tuple of (list of Node, set of Node), or None
        The nodes that are stored, in order, and the members that are computed from them; ``None`` where something that
        is read has no rows and is not cheap to compute.
    """
    written = set().union(*analysis.written.values()) if analysis.written else set()
    calm = {node for node in members if not _touches(node, written)}
    light = {node for node in calm if operator_name(node) in LIGHT}
    plain = _smallest_cut(outputs, members, light, rows, analysis)
    ends = reachable(outputs, members, lambda node: node.all_input_nodes if node in light else ())
    near = {node for node in ends & calm if operator_name(node) in PRODUCTS}
    if near:
        further = _smallest_cut(outputs, members, light | near, rows, analysis)
        if further is not None and (plain is None or _is_better(further, plain, near, members, rows)):
            plain = further
    if plain is None:
        return None
    stored = [node for node in members if node in plain]
    if not stored:  # all of it is cheap
        return (list(outputs), set()) if rows.keys() >= set(outputs) else None
    return stored, _between(outputs, plain, members)


def is_cheap(node: fx.Node, analysis: Analysis) -> bool:
    """Whether a node only looks at, compares or rearranges what there is."""
    return operator_name(node) in CHEAP and not any(source in analysis.state for source in node.all_input_nodes)


def _smallest_cut(
    outputs: Iterable[fx.Node],
    members: Members,
    again: set[fx.Node],
    rows: Mapping[fx.Node, int],
    analysis: Analysis,
) -> set[fx.Node] | None:
    """The nodes of fewest bytes from which ``outputs`` follow by nodes of ``again``; ``None`` if there are none."""
    import networkx  # a dependency of torch, which takes a while to import

    flow = networkx.DiGraph()
    flow.add_nodes_from(("computed", "read"))
    for node in members:
        if node not in analysis.varying:
            continue
        flow.add_edge((node, 0), (node, 1), capacity=_bytes(node, rows) if node in rows else math.inf)
        if node not in again:
            flow.add_edge("computed", (node, 0))
        for user in node.users:
            if user in members and user in analysis.varying:
                flow.add_edge((node, 1), (user, 0))
    for node in outputs:
        flow.add_edge((node, 1), "read")
    try:
        _, (computed, _) = networkx.minimum_cut(flow, "computed", "read")
    except networkx.NetworkXUnbounded:
        return None
    return {node for node in members if (node, 0) in computed and (node, 1) not in computed and (node, 0) in flow}


def _is_better(
    further: set[fx.Node], plain: set[fx.Node], near: set[fx.Node], members: Members, rows: Mapping[fx.Node, int]
) -> bool:
    """Whether to do products again is worth what it saves."""
    most = (1 - LEAST_SAVED) * sum(_bytes(node, rows) for node in plain)
    if sum(_bytes(node, rows) for node in further) > most:
        return False
    again = sum(map(_work, near - _ancestors(further, members)))
    return again <= MOST_WORK * sum(map(_work, members))


def _work(node: fx.Node) -> float:
    """Multiplications in a product with weights; 0 for other nodes."""
    made, name = tensor_of(node), operator_name(node)
    if made is None or name not in PRODUCTS | CONVOLUTIONS:
        return 0
    read = [tensor for source in node.all_input_nodes if (tensor := tensor_of(source)) is not None and tensor.ndim > 1]
    if len(read) < 2:
        return 0
    weight = read[-1]
    width = hint(weight.shape[-1 if name == "addmm" else 0])
    return math.prod(map(hint, made.shape)) * math.prod(map(hint, weight.shape)) / max(width, 1)


def _bytes(node: fx.Node, rows: Mapping[fx.Node, int]) -> int:
    """Bytes a row; at least 1, so that nothing is stored without need."""
    made = tensor_of(node)
    assert made is not None
    return max(1, rows[node] * math.prod(map(hint, made.shape[1:])) * made.element_size())


def _between(outputs: Iterable[fx.Node], stored: set[fx.Node], members: Members) -> set[fx.Node]:
    """The members that lead from ``stored`` to ``outputs``."""
    above = reachable(outputs, members, lambda node: () if node in stored else node.all_input_nodes)
    below = reachable((user for node in stored for user in node.users), members, lambda node: node.users)
    return (above & below) - stored


def _ancestors(nodes: Iterable[fx.Node], members: Members) -> set[fx.Node]:
    return reachable(nodes, members, lambda node: node.all_input_nodes)


def reachable(
    nodes: Iterable[fx.Node], members: Container[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """Those of ``nodes``, and of what ``step`` leads to from them, that are members."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in members and node not in found:
            found.add(node)
            pending += step(node)
    return found


def _touches(node: fx.Node, written: set[int]) -> bool:
    """Whether a node makes, reads or writes memory that anything in the graph writes to."""
    values = [node.meta.get("example_value"), *(source.meta.get("example_value") for source in node.all_input_nodes)]
    leaves = [leaf for value in values for leaf in (value if isinstance(value, (tuple, list)) else [value])]
    return any(isinstance(leaf, torch.Tensor) and storage_of(leaf) in written for leaf in leaves)


def operator_name(node: fx.Node) -> str:
    """The name of what a node calls, without underscores at its ends."""
    return str(getattr(node.target, "__name__", node.target)).strip("_")
