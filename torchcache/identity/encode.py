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

__all__ = ["encode"]

_END = b"end;"


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
    stream = _stream(reach, roots, numbers, tensors)
    return hashlib.blake2b(stream, digest_size=16).digest(), tensors


def _stream(reach: Reach, roots: list[Any], numbers: dict[int, int], tensors: list[torch.Tensor]) -> bytes:
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
            if node.numbered:
                known = numbers.get(id(node))
                if known is not None:
                    out.append(b"#%d;" % known)
                    continue
                numbers[id(node)] = len(numbers)
            if node.kind == "tensor":
                tensors.append(node.value)
            out.append(b"%d parts:" % len(node.head) + b"".join(map(constant_bytes, node.head)))
            frames.append(_parts(reach, node))
            break
        else:
            frames.pop()
            out.append(_END)
    return b"".join(out)


class _Mark(bytes):
    """Bytes of the encoding itself."""


def _parts(reach: Reach, node: Node) -> Iterator[Any]:
    values = [value for _, value in node.parts]
    if node.unsorted:
        values.sort(key=lambda value: _alone(reach, value))
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


def _alone(reach: Reach, value: Any) -> bytes:
    """The bytes of a value by itself, with the contents of its tensors, to sort by."""
    tensors: list[torch.Tensor] = []
    stream = _stream(reach, [value], {}, tensors)
    contents = [tensor.detach().cpu().flatten().tolist() for tensor in tensors if tensor.device.type != "meta"]
    return stream + repr(contents).encode()
