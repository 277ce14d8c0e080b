"""The nodes of a program as canonical bytes: equal bytes mean the same program."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from torchcache.identity.bytecode import constant_bytes
from torchcache.identity.node import Node
from torchcache.identity.reach import Reach
from torchcache.identity.values import ATOMS

_END = b"end;"

# Sets within sets whose members are told apart by all that they hold. Further inside, their heads tell them apart:
# sets that lead to each other would otherwise be walked in every order.
MOST_SETS = 2


def encode(reach: Reach, roots: list[Any]) -> tuple[bytes, list[torch.Tensor]]:
    """Encode the objects that a program consists of.

    Objects are numbered in the order in which they are met, so that none is encoded twice and cycles end. No ``id``,
    no address and no hash order takes part.

    Parameters
    ----------
    reach : Reach
        The objects, and which of their entries count.
    roots : list
        Where to begin.

    Returns
    -------
    bytes
        16 bytes.
    list of torch.Tensor
        Every tensor, in the order met.
    """
    numbers: dict[int, int] = {}
    tensors: list[torch.Tensor] = []
    stream = _stream(reach, roots, numbers, tensors, ())
    return hashlib.blake2b(stream, digest_size=16).digest(), tensors


def _stream(
    reach: Reach, roots: list[Any], numbers: dict[int, int], tensors: list[torch.Tensor], within: tuple[Node, ...]
) -> bytes:
    """The bytes of ``roots``; ``within`` are the sets whose members are being sorted."""
    out: list[bytes] = []
    frames: list[Iterator[Any]] = [iter(roots)]
    while frames:
        for part in frames[-1]:
            if type(part) is _Mark:
                out.append(part)
                continue
            if type(part) in ATOMS:
                out.append(constant_bytes(part))
                continue
            node = reach.node_of(part)
            if node is None:
                out.append(b"?;")
                continue
            known = numbers.get(id(node))
            if known is not None:
                out.append(b"#%d;" % known)
                continue
            if node.numbered:
                numbers[id(node)] = len(numbers)
            if node.kind == "tensor":
                tensors.append(node.value)
            out.append(_head(node))
            frames.append(_parts(reach, node, within))
            break
        else:
            frames.pop()
            out.append(_END)
    return b"".join(out)


class _Mark(bytes):
    """Bytes of the encoding itself."""


def _head(node: Node) -> bytes:
    return b"%d parts:" % len(node.head) + b"".join(map(constant_bytes, node.head))


def _parts(reach: Reach, node: Node, within: tuple[Node, ...]) -> Iterator[Any]:
    values = [value for _, value in node.parts]
    if node.unsorted:
        values.sort(key=lambda value: _alone(reach, value, (*within, node)))
    labelled = node.reads is not None
    for (label, _), value in zip(node.parts, values, strict=True):
        if labelled:
            yield _Mark(constant_bytes(label))
        yield value
    for space in node.spaces:
        names = space.held if space.ordered else sorted(space.chosen)
        for name in names:
            if name in space.chosen:
                yield _Mark(b"%s %s" % (space.kind.encode(), constant_bytes(name)))
                yield space.held[name]


def _alone(reach: Reach, value: Any, within: tuple[Node, ...]) -> bytes:
    """The bytes of a member of the last of these sets by itself, with the contents of its tensors, to sort by."""
    node = None if type(value) in ATOMS else reach.node_of(value)
    if node is not None and len(within) > MOST_SETS:
        return _head(node)
    tensors: list[torch.Tensor] = []
    stream = _stream(reach, [value], {id(outer): place for place, outer in enumerate(within)}, tensors, within)
    contents = [tensor.detach().cpu().flatten().tolist() for tensor in tensors if tensor.device.type != "meta"]
    return stream + repr(contents).encode()
