"""The content of a tensor as digests: every byte of it, whatever its dtype and device, and its order in memory."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import nn

from torchcache.digest.device import OnTheWay
from torchcache.errors import Bypass, brief
from torchcache.identity.memory import ITEM_SIZES, elements_at, row_major_bytes
from torchcache.store.select import concatenate
from torchcache.threads import in_parts
from torchcache.values.layout import memory_order

# Content is hashed in blocks of this size, by several threads where there are several of both.
BLOCK_BYTES = 1 << 20
# Tensors that a device hashes at once have so many bytes: launches cost more than a copy.
TOGETHER = 1 << 26

# The digests of a tensor's blocks, after one of its dtype and shape.
Content = tuple[bytes, ...]

_PLAIN = frozenset({torch.Tensor, nn.Parameter})
_version = operator.attrgetter("_version")


def content_digest(tensor: torch.Tensor) -> bytes:
    """Digest of a tensor's dtype, shape, order in memory and elements, every byte of them read in every call.

    Parameters
    ----------
    tensor : torch.Tensor
        Of any shape, strides, dtype and device.

    Returns
    -------
    bytes
        16 bytes. Gaps between elements, device and ``requires_grad`` are no part of it.

    Raises
    ------
    Bypass
        When the elements cannot be read: sparse, quantized, fake and most subclass tensors.
    """
    with readable():
        plain, wrapping = plain_tensors([tensor])
        return joined_digest(contents_of(plain), wrapping)


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turn the errors of tensors without storage, such as those inside ``vmap``, into a ``Bypass``."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        reason = brief(error)
        raise Bypass(f"the state cannot be read here: {reason}") from error


def joined_digest(contents: Sequence[Content], wrapping: str) -> bytes:
    """The digest of several tensors' contents, 16 bytes; ``wrapping`` as from ``plain_tensors``."""
    hasher = xxhash.xxh3_128(wrapping.encode())
    for content in contents:
        hasher.update(xxhash.xxh3_128_digest(b"".join(content)))
    return bytes(hasher.digest())


def start_content(tensor: torch.Tensor) -> Callable[[], Content]:
    """What gives the content of a plain tensor (see ``plain_tensors``); on a device it is hashed there meanwhile."""
    described = _described(tensor)
    if tensor.is_meta:
        return lambda: (described,)
    _check_memory(tensor)
    if not tensor.is_cpu:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a device that lacks an operator
            digest = OnTheWay(tensor.detach()[None])
            return lambda: (described, *digest.digests())
    data = _bytes(tensor)
    count = -(-len(data) // BLOCK_BYTES)
    content = (described, *in_parts(count, BLOCK_BYTES, lambda start, stop: block_digests(data, start, stop)))
    return lambda: content


def contents_of(tensors: Sequence[torch.Tensor]) -> list[Content]:
    """The contents of plain tensors; what lies twice in the same memory, as tied weights do, is hashed once."""
    known: dict[object, Callable[[], Content]] = {}
    away: dict[object, dict[object, torch.Tensor]] = {}
    places = list[object]()
    for tensor in tensors:
        place: object = id(tensor)
        if not tensor.is_meta and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape)
        if not (tensor.is_cpu or tensor.is_meta):
            away.setdefault((tensor.device, tensor.dtype, tensor.shape), {})[place] = tensor
        elif place not in known:
            known[place] = start_content(tensor)
        places.append(place)
    for alike in away.values():
        known.update(zip(alike, _start_alike([*alike.values()]), strict=True))
    return [known[place]() for place in places]


def _start_alike(tensors: Sequence[torch.Tensor]) -> Iterator[Callable[[], Content]]:
    """What gives the contents of tensors of one shape and dtype on one device, which hashes them as rows of a batch."""
    step = max(1, TOGETHER // max(tensors[0].nbytes, 1))
    for start in range(0, len(tensors), step):
        some = tensors[start : start + step]
        try:
            yield from _start_rows(some)
        except (RuntimeError, NotImplementedError):  # there is no room for a copy, or an operator is lacking
            yield from map(start_content, some)


def _start_rows(tensors: Sequence[torch.Tensor]) -> list[Callable[[], Content]]:
    if len(tensors) == 1:
        return [start_content(tensors[0])]
    for tensor in tensors:
        _check_memory(tensor)
    rows = [tensor.detach().resolve_conj().resolve_neg().contiguous()[None] for tensor in tensors]
    digest = OnTheWay(concatenate(rows))

    def content(row: int) -> Content:
        return _described(tensors[row]), digest.digests()[row]

    return [functools.partial(content, row) for row in range(len(tensors))]


def _described(tensor: torch.Tensor) -> bytes:
    # Code may ask how a weight lies in memory, and kernels round otherwise where it lies otherwise.
    order = memory_order(tensor.shape, tensor.stride())
    told = "" if order == tuple(sorted(order)) else f" {order}"
    return bytes(xxhash.xxh3_128_digest(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.is_meta}{told}".encode()))


def block_digests(data: npt.NDArray[np.uint8], start: int, stop: int) -> list[bytes]:
    """The XXH3-128 digests of the blocks from ``start`` to ``stop``."""
    edges = range(start * BLOCK_BYTES, stop * BLOCK_BYTES, BLOCK_BYTES)
    return [bytes(xxhash.xxh3_128_digest(data[edge : edge + BLOCK_BYTES].data)) for edge in edges]


def _bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    return row_major_bytes(elements_at(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.itemsize, tensor))


def _check_memory(tensor: torch.Tensor) -> None:
    """Raise ``Bypass`` for a tensor that is larger than its storage, as sharded ones are between two calls."""
    last = tensor.storage_offset() + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if tensor.numel() and (last + 1) * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise Bypass(f"the state holds a tensor of shape {tuple(tensor.shape)} whose memory was given back")


def plain_tensors(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], str]:
    """Find the tensors that hold the elements of ``tensors``.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        Plain ones, and wrapper subclasses that tell what they hold by ``__tensor_flatten__``.

    Returns
    -------
    plain : list of torch.Tensor
        In order: the tensors themselves, or those inside the wrappers.
    wrapping : str
        What else the wrappers consist of; empty without any.

    Raises
    ------
    Bypass
        When the elements of one cannot be read.
    """
    wrapping: list[str] = []
    plain = [part for tensor in tensors for part in _plain(tensor, wrapping)]
    return plain, "; ".join(wrapping)


def _plain(tensor: torch.Tensor, wrapping: list[str]) -> Iterator[torch.Tensor]:
    kind = type(tensor)
    if kind not in _PLAIN and hasattr(kind, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = [getattr(tensor, name) for name in names]
        inner = [part for part in parts if isinstance(part, torch.Tensor)]
        others = [part for part in parts if not isinstance(part, torch.Tensor)]  # a DTensor has its mesh there
        described = f"{kind.__module__}.{kind.__qualname__} {tuple(tensor.shape)} {names} {context!r} {others}"
        if " at 0x" in described or "..." in described:
            raise Bypass(f"the state holds a {kind.__qualname__} whose context has no complete text: {context!r}")
        wrapping.append(described)
        for part in inner:
            yield from _plain(part, wrapping)
    elif kind not in _PLAIN and not _keeps_to_plain(kind):
        raise Bypass(
            f"the state holds a {kind.__qualname__}, a tensor subclass whose elements cannot be read",
            "give it __tensor_flatten__, or keep it outside of the marked module",
        )
    elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.itemsize not in ITEM_SIZES:
        dense = tensor.layout is torch.strided
        raise Bypass(
            f"the state holds a tensor of {f'dtype {tensor.dtype}' if dense else tensor.layout}, which is not hashed",
            ("" if dense else "make it dense, or ") + "keep it outside of the marked module",
        )
    else:
        _check_memory(tensor)
        yield tensor


def _keeps_to_plain(kind: type[torch.Tensor]) -> bool:
    """Whether a subclass of tensor changes neither what operators do to it nor where its elements are."""
    return _overridden(kind) in _NOT_OVERRIDDEN and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _overridden(kind: type[torch.Tensor]) -> object:
    return getattr(kind.__torch_function__, "__func__", kind.__torch_function__)


_NOT_OVERRIDDEN = (_overridden(torch.Tensor), _overridden(nn.Parameter))


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Versions, which move when a tensor is written to; tensors of inference mode have none."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
