"""What a region takes and gives: a partition shrunk until all that is read of it follows from rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from torchcache.dynamo import expression_of, storage_of
from torchcache.graph.fewest import fewest, is_cheap, operator_name, reachable
from torchcache.graph.frozen import Analysis, is_number, tensor_of
from torchcache.graph.parts import part_of, parts_of
from torchcache.graph.sizes import Unfit

# Operators that may make the first dimensions of a tensor one, in their order.
MERGING = frozenset({"view", "reshape", "flatten", "repeat_interleave"})
# Operators along one dimension that leave its size as it is, with the place of that dimension among their arguments.
ALONG = dict.fromkeys(
    """
    softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp sort argsort flip gather scatter scatter_add
    scatter_reduce index_select index_add index_copy index_fill take_along_dim
    """.split(),
    1,
) | {"roll": 2, "normalize": 2}


@dataclasses.dataclass
class Cut:
    """A region about to be cut out.

    Parameters
    ----------
    nodes : list of Node
        The nodes copied into the region's graph, in order.
    outputs : list of Node
        Those among them whose values are stored.
    recomputed : list of Node
        Those that lead from the stored ones to what is read outside, and stay where they are: in order.
    entries : list of int
        How many entries along its first dimension are one row of each output.
    batch : sympy expression
        The number of rows, as traced: it is told from what the whole partition reads, and the nodes may not read all.
    """

    nodes: list[fx.Node]
    outputs: list[fx.Node]
    recomputed: list[fx.Node]
    entries: list[int]
    batch: Any

    def __post_init__(self) -> None:
        self._apart = set(self.nodes) - set(self.recomputed)

    def readers(self, output: fx.Node) -> list[fx.Node]:
        """The nodes that read a stored value outside of the region."""
        return [user for user in output.users if user not in self._apart]


def cut_region(nodes: list[fx.Node], analysis: Analysis) -> Cut | None:
    """Shrink a partition until all that is read of it follows from rows; ``None`` if what is left computes little.

    Raises
    ------
    Unfit
        When what computes much gives no rows of any input.
    """
    members = dict.fromkeys(nodes)
    for node in reachable(_of_moving_state(nodes, analysis), members, lambda node: node.users):
        del members[node]
    if not members:
        raise Unfit("what is frozen reads state that is written to in each call")
    while members:
        read = [
            node for node in members if node in analysis.varying and any(user not in members for user in node.users)
        ]
        if not read:
            return None
        batch = _batch_of(members, read, analysis)
        whole = _rows(members, batch, analysis)
        found = fewest(read, members, whole, analysis)
        if found is not None:
            outputs, recomputed = found
            needed = _ancestors(outputs, members, analysis)
            kept = [node for node in members if node in needed]
            again = [node for node in members if node in recomputed]
            cut = Cut(kept, outputs, again, [*map(whole.__getitem__, outputs)], batch)
            if batch in _batches(kept, analysis):
                return cut if _worthwhile(kept, nodes, analysis) and _orderly(cut, analysis) else None
            mixed = outputs
        else:
            mixed = [node for node in read if node not in whole]
        for node in reachable(mixed, members, lambda node: node.users):
            del members[node]
    if all(is_cheap(node, analysis) for node in nodes if node in analysis.varying):
        return None
    raise Unfit("what is frozen gives no row for each row of one of its tensors: a list of tensors has none")


def _of_moving_state(nodes: list[fx.Node], analysis: Analysis) -> list[fx.Node]:
    """Those of ``nodes`` that read state which the graph writes to: it is another in each call, and no row is found."""
    moving = _storages(analysis.state) & set().union(*analysis.written.values())
    return [node for node in nodes if moving and not moving.isdisjoint(_storages(node.all_input_nodes))]


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {storage_of(tensor) for node in nodes if (tensor := tensor_of(node)) is not None}


def _batch_of(members: dict[fx.Node, None], outputs: Sequence[fx.Node], analysis: Analysis) -> Any:
    """The batch size, as traced: dim 0 of the first varying input that an output shares, else of the first at all."""
    batches = _batches(members, analysis)
    given = {
        expression_of(tensor.shape[0]) for node in outputs if (tensor := tensor_of(node)) is not None and tensor.ndim
    }
    return next((batch for batch in batches if batch in given), batches[0] if batches else None)


def _batches(nodes: Iterable[fx.Node], analysis: Analysis) -> list[Any]:
    """The first sizes of what varies and is given to ``nodes``."""
    inside = dict.fromkeys(nodes)
    sources = dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in inside)
    tensors = [tensor for source in sources if source in analysis.varying and (tensor := tensor_of(source)) is not None]
    return [expression_of(tensor.shape[0]) for tensor in tensors if tensor.ndim]


def _rows(members: dict[fx.Node, None], batch: Any, analysis: Analysis) -> dict[fx.Node, int]:
    """The members that have rows which do not meet, as far as their shapes tell, with how many entries are one row.

    More than one is where what a row has several of, such as choices or frames, was made a batch, row by row.
    """
    found: dict[fx.Node, int] = {}
    for node in members:
        count = _entries(node, batch)
        if count == 1 or (
            count
            and _leaves_apart(node, analysis)
            and all(
                is_number(source)
                or source not in analysis.varying
                or _keeps_together(node, source, count, found, batch)
                for source in node.all_input_nodes
            )
        ):
            found[node] = count
    mixing = _mixing(members, batch)
    return {node: count for node, count in found.items() if node not in mixing and tensor_of(node) is not None}


def _keeps_together(node: fx.Node, source: fx.Node, count: int, found: dict[fx.Node, int], batch: Any) -> bool:
    """Whether the entries of a row that ``node`` makes of ``source`` lie beside each other."""
    tensor = _any_tensor_of(source)
    if tensor is not None and not _counts(tensor, batch.free_symbols):
        return True
    many = _entries(source, batch)
    together = many == 1 or source in found
    return together and (many == count or (many > 0 and operator_name(node) in MERGING))


def _leaves_apart(node: fx.Node, analysis: Analysis) -> bool:
    """Whether no entry along the first dimension reads another one, as far as operators and their arguments tell."""
    name = operator_name(node)
    if name == "getitem":
        if tensor_of(node.all_input_nodes[0]) is None:  # of several tensors
            return True
        index = node.args[1]
        first = index[0] if isinstance(index, tuple) and index else index
        return (
            first is ... or isinstance(first, slice) or (isinstance(first, fx.Node) and first not in analysis.varying)
        )
    if name not in ALONG:
        return True
    tensor = tensor_of(node.all_input_nodes[0])
    return tensor is not None and all(isinstance(dim, int) and dim % tensor.ndim for dim in dims_along(node))


def dims_along(node: fx.Node) -> Sequence[Any]:
    """The dimensions along which an operator reads, as they are given; none of one that is not in ``ALONG``."""
    name = operator_name(node)
    place = ALONG.get(name)
    if place is None:
        return ()
    given = node.kwargs.get("dim", node.kwargs.get("dims", node.args[place] if len(node.args) > place else None))
    given = 1 if given is None and name == "normalize" else given
    return given if isinstance(given, (tuple, list)) else [given]


def _entries(node: fx.Node, batch: Any) -> int:
    """How many entries along the first dimension there are for each row; 0 where it has no rows.

    A tensor that is still to be conjugated has none.
    """
    tensor = _any_tensor_of(node)
    if tensor is None or not tensor.ndim or tensor.is_conj() or tensor.is_neg():
        return 0
    size = expression_of(tensor.shape[0])
    if size == batch:
        return 1
    # Of a number nobody can say whether it follows from another.
    many = size / batch if batch is not None and batch.is_Symbol else None
    return int(many) if many is not None and many.is_Integer and many > 0 else 0


def _any_tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a node produces, or the first of several with as many entries."""
    value = node.meta.get("example_value")
    if not isinstance(value, (tuple, list)):
        return tensor_of(node)
    tensors = [leaf for leaf in value if isinstance(leaf, torch.Tensor) and leaf.ndim]
    sizes = {expression_of(leaf.shape[0]) for leaf in tensors}
    return tensors[0] if len(tensors) == len(value) and len(sizes) == 1 else None


def _mixing(members: dict[fx.Node, None], batch: Any) -> set[fx.Node]:
    """Those members in which rows meet, as far as their shapes tell, and what follows from them.

    What comes of rows has the number of rows in no dimension, or in several.
    """
    symbols = batch.free_symbols if batch is not None else ()
    found: set[fx.Node] = set()
    for node in members if symbols else ():
        given, made = node.all_input_nodes, tensor_of(node)
        meet = made is not None and _counts(made, symbols) != 1
        if made is not None and not _counts(made, symbols) and operator_name(node) in _OF_A_KIND:
            given = [source for source in given if source not in node.args[:1]]  # of which no element is read
        if any(source in found for source in given) or (
            meet and any((tensor := tensor_of(source)) is not None and _counts(tensor, symbols) for source in given)
        ):
            found.add(node)
    return found


# Operators that make another tensor of the same kind as their first argument.
_OF_A_KIND = frozenset(
    "new_zeros new_ones new_full new_empty new_empty_strided zeros_like ones_like full_like empty_like".split()
)


def _counts(tensor: torch.Tensor, symbols: Any) -> int:
    """In how many dimensions a tensor has the number of rows."""
    return sum(not symbols.isdisjoint(expression_of(size).free_symbols) for size in tensor.shape)


def _ancestors(nodes: Iterable[fx.Node], members: dict[fx.Node, None], analysis: Analysis) -> set[fx.Node]:
    """``nodes`` and the members they follow from, in-place writes to any of them included."""
    writers = [member for member in members if member in analysis.written]
    return reachable(nodes, members, lambda node: [*node.all_input_nodes, *writers_of(node, writers, analysis)])


def writers_of(node: fx.Node, writers: Iterable[fx.Node], analysis: Analysis) -> list[fx.Node]:
    """Those of ``writers`` that write to the tensor of a node."""
    tensor = tensor_of(node)
    return [] if tensor is None else [one for one in writers if storage_of(tensor) in analysis.written[one]]


def _worthwhile(kept: list[fx.Node], nodes: list[fx.Node], analysis: Analysis) -> bool:
    """Whether the region does more than rearrange, unless it is all there is of its marks."""
    if not all(is_cheap(node, analysis) for node in kept):
        return True
    parts = set(parts_of(kept))
    everything = [
        node
        for node in nodes[0].graph.nodes
        if part_of(node) in parts and not is_number(node) and node.op not in ("placeholder", "get_attr")
    ]
    return len(everything) <= len(nodes)


def _orderly(cut: Cut, analysis: Analysis) -> bool:
    """Whether in-place writes keep their order where a region runs at one point of the graph, and reach it alone."""
    kept, inside = cut.nodes, set(cut.nodes)
    written = set().union(*(analysis.written.get(node, set()) for node in kept))
    elsewhere = {node: storages for node, storages in analysis.written.items() if node not in inside}
    if not written and not elsewhere:
        return True
    order = {node: position for position, node in enumerate(kept[0].graph.nodes)}
    first, last = order[kept[0]], order[kept[-1]]
    inputs = {source for node in kept for source in node.all_input_nodes if source not in inside}
    given = _storages(inputs)
    if written & given:
        return False
    touched = given | _storages(kept)
    if any(storages & touched and first < order[node] < last for node, storages in elsewhere.items()):
        return False
    for node in cut.outputs:
        tensor = tensor_of(node)
        assert tensor is not None
        # A reader outside sees the value after every write of the region, so none may come before one.
        readers = [order[user] for user in cut.readers(node)]
        writers = [order[member] for member in kept if storage_of(tensor) in analysis.written.get(member, ())]
        if writers and min(readers) < max(writers):
            return False
    return True
