"""What was learnt of calls, kept among the rows: enough for a process that never runs the original to serve them.

A plan is one note beside the rows of its region, JSON of the members of ``_encoded``. The structure of the output is a
tree of ``["leaf", place]``, ``["value", plain]``, ``["float", hexadecimal]``, ``["list" or "tuple", parts]`` and
``["dict", names, parts]``. What is read is not trusted: it is parsed with bounds, and tensors of the shapes that it
claims are made without memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from torchcache.batch import Batch
from torchcache.checks.compare import Rounding
from torchcache.checks.plan import Plan
from torchcache.checks.probe import Learnt
from torchcache.digest.cpu import digest_bytes
from torchcache.errors import Bypass
from torchcache.identity.key import call_fingerprint
from torchcache.logging import logger, warn_once
from torchcache.options import CacheOptions
from torchcache.store.tiers import Tiers
from torchcache.values.layout import Layout, lie_of, place_of
from torchcache.values.take import Taken, take_outputs

# Bytes of a note, and of the rows of a batch that one may claim where memory is kept small.
LONGEST = 1 << 16
LARGEST = 1 << 30
# Tensors in an output, and containers in each other.
MOST_LEAVES, DEEPEST = 255, 32
# Bits of a number in an output.
LONGEST_INT = 1024
_DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_PLAIN = (type(None), bool, int, str)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What was learnt of calls by another process.

    Parameters
    ----------
    form : bytes
        Which calls these are, as ``Plan`` has it.
    learnt : Learnt
        Roles, dimensions and rounding.
    output : Taken
        An output of two rows, without data.
    layouts : tuple of Layout
        How outputs lie in memory.
    """

    form: bytes
    learnt: Learnt
    output: Taken
    layouts: tuple[Layout, ...]

    def plan(self, where: str, options: CacheOptions) -> Plan:
        """The plan, of which nothing was seen in this process.

        Parameters
        ----------
        where : str
            The region, for messages.
        options : CacheOptions
            Its options.
        """
        plan = Plan.of(self.form, self.learnt, self.output, where, options, proven=False)
        plan.taken_over = True
        plan.known_layouts = self.layouts
        return plan


def keep(where: str, batch: Batch, plan: Plan, tiers: Tiers, computed: bool) -> None:
    """Where what computes is built when it is needed, note a call, and keep what was learnt of calls like it."""
    deferred = batch.given.subject.deferred
    if deferred is not None:
        if deferred.built:
            _keep(where, batch, plan, tiers)
        deferred.note(computed)


def _keep(where: str, batch: Batch, plan: Plan, tiers: Tiers) -> None:
    """Keep it, once; where that cannot be kept, this is said."""
    if not tiers.beneath or plan.known_layouts is None:
        return
    key = _key(batch, tiers.options)
    if key in plan.kept:
        return
    plan.kept.add(key)
    try:
        if batch.given.subject.identity.asks_for_inference:
            raise Bypass("it asks whether inference mode is on")
        note = json.dumps(_encoded(plan), separators=(",", ":")).encode()
        if len(note) > LONGEST // 2 or len(plan.output.tensors) > MOST_LEAVES:
            raise Bypass("its output has too many parts")
        tiers.keep_note(key, note, batch.who)
    except Bypass as bypass:
        warn_once(
            f"{where} is built in every process, since {bypass.reason}: have output= return tensors, plain values, and "
            "lists, tuples and dicts of them"
        )


def suffices(plan: Plan, batch: Batch, options: CacheOptions) -> bool:
    """Whether ``plan`` is enough for a batch of which nothing can be computed, and its rows are no larger than that."""
    return plan.known_layouts is not None and batch.count * plan.row_bytes <= _largest(options)


def _largest(options: CacheOptions) -> int:
    return max(LARGEST, options.max_memory_cache_size)


def stored(batch: Batch, tiers: Tiers) -> Stored | None:
    """What some process kept of calls like ``batch``; ``None`` where there is nothing that fits."""
    if not tiers.knows(batch.who):
        return None
    note = tiers.note(_key(batch, tiers.options), LONGEST, batch.who)
    if note is None:
        return None
    try:
        return _decoded(json.loads(note), batch, _largest(tiers.options))
    except Exception:  # whatever lies there
        logger.debug("what was learnt of calls by another process cannot be read", exc_info=True)
        return None


def _key(batch: Batch, options: CacheOptions) -> bytes:
    """What a plan is filed under: all that is known of calls before it is known which arguments have rows."""
    first, dims = batch.taken.tensors[0], (0, options.batch_dim)
    rows = first.shape[options.batch_dim] if first.ndim > options.batch_dim else 0
    shapes = [
        (
            tensor.dtype,
            [-1 if dim in dims and size == rows else size for dim, size in enumerate(tensor.shape)],
            # Lazy tensors are asked for nothing but what they know.
            lie_of(tensor, options.batch_dim if tensor.ndim > options.batch_dim else None),
        )
        for tensor in batch.taken.tensors
    ]
    what = b"plan" + batch.who + batch.taken.key + repr(shapes).encode()
    return call_fingerprint(what, options, batch.mode, (), (), 0) + digest_bytes(what)


def _encoded(plan: Plan) -> dict[str, Any]:
    learnt, leaves = plan.learnt, plan.output.tensors
    return {
        "form": plan.form.hex(),
        "roles": learnt.rows,
        "dims": learnt.output_dims,
        "leaves": [
            [str(leaf.dtype), [*leaf.shape[:dim], *leaf.shape[dim + 1 :]]]
            for leaf, dim in zip(leaves, learnt.output_dims, strict=True)
        ],
        "structure": _tree(plan.output.rebuild([_Place(place) for place in range(len(leaves))])),  # type: ignore[misc]
        "key": plan.output.key.hex(),
        "alone": plan.alone,
        "width": learnt.rounding.width,
        "allowed": [share.hex() for share in learnt.rounding.allowed],
        "layouts": [[layout.order, str(layout.device)] for layout in plan.known_layouts or ()],
    }


def _decoded(note: Any, batch: Batch, largest: int) -> Stored | None:
    roles = tuple([_dim(role) if role is not None else None for role in note["roles"]])
    dims = tuple(map(_dim, note["dims"]))
    if len(dims) > MOST_LEAVES:
        raise ValueError("too many parts")
    if len(roles) != len(batch.taken.tensors) or not len(dims) == len(note["leaves"]) == len(note["allowed"]):
        raise ValueError("other arguments")
    specs = [(_DTYPES[dtype], tuple(map(_dim, shape))) for dtype, shape in note["leaves"]]
    if any(dim > len(shape) for (_, shape), dim in zip(specs, dims, strict=True)):
        raise ValueError("no such dimension")
    count = next(
        tensor.shape[role] for tensor, role in zip(batch.taken.tensors, roles, strict=True) if role is not None
    )
    if count * sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs) > largest:
        raise ValueError("too large")
    near = batch.taken.tensors[0].device
    layouts = tuple(
        [
            Layout(dtype, shape, _order(order, len(shape) + 1), place_of(torch.device(str(text)), near), dim)
            for (order, text), (dtype, shape), dim in zip(note["layouts"], specs, dims, strict=True)
        ]
    )
    leaves = [
        torch.empty(1, dtype=dtype, device=layout.device).expand(*shape[:dim], 2, *shape[dim:])
        for (dtype, shape), dim, layout in zip(specs, dims, layouts, strict=True)
    ]
    output = take_outputs(_value(note["structure"], leaves, DEEPEST))
    if output.key.hex() != note["key"] or len(output.tensors) != len(leaves):
        raise ValueError("another structure")
    rounding = Rounding(leaves, _dim(note["width"]))
    rounding.allow([float.fromhex(share) for share in note["allowed"]])
    return Stored(
        bytes.fromhex(note["form"]), Learnt(roles, dims, rounding, note.get("alone") is True or None), output, layouts
    )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands where a tensor was."""

    index: int


def _tree(value: Any, depth: int = DEEPEST) -> list[Any]:
    kind = type(value)
    if not depth:
        raise Bypass("its output holds containers in each other too deeply")
    if kind is _Place:
        return ["leaf", value.index]
    if kind in _PLAIN and not (kind is int and value.bit_length() > LONGEST_INT):
        return ["value", value]
    if kind is float:
        return ["float", value.hex()]
    if kind in (list, tuple):
        return [kind.__name__, [_tree(part, depth - 1) for part in value]]
    if kind is dict and all(type(name) is str for name in value):
        return ["dict", [*value], [_tree(part, depth - 1) for part in value.values()]]
    raise Bypass(f"its output holds a {kind.__name__}{' with keys that are no texts' if kind is dict else ''}")


def _value(tree: Any, leaves: Sequence[torch.Tensor], depth: int) -> Any:
    kind, *rest = tree
    if not depth:
        raise ValueError("too deep")
    if kind == "leaf":
        return leaves[_dim(rest[0])]
    if kind == "value" and type(rest[0]) in _PLAIN:
        return rest[0]
    if kind == "float":
        return float.fromhex(rest[0])
    parts = [_value(part, leaves, depth - 1) for part in rest[-1]]
    if kind == "dict":
        return dict(zip(map(str, rest[0]), parts, strict=True))
    return {"list": list, "tuple": tuple}[kind](parts)


def _dim(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise ValueError("no size")
    return value


def _order(order: Any, length: int) -> tuple[int, ...]:
    found = tuple(map(_dim, order))
    if sorted(found) != [*range(length)]:
        raise ValueError("no order of dimensions")
    return found
