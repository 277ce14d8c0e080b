"""A sample of a data set taken apart: its structure, its small values, and its large tensors."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from torchcache.digest.rows import LARGE_ROW, digest_tensor
from torchcache.errors import Bypass
from torchcache.lazy.rows import Kind

# Structures are nested tuples: a container's class, the names of its parts, and the parts; or a place.
_LARGE, _SMALL = "large", "small"
Structure = tuple[Any, ...]
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
DEEPEST = 16


class Sample(NamedTuple):
    """What is remembered of a sample.

    Parameters
    ----------
    structure : tuple or str
        Containers, and where its values and its large tensors stand, with dtype and shape; can be hashed. A text, as of
        ``describe``, where only that was kept.
    values : tuple
        Numbers, strings and small tensors, in their order.
    digests : bytes
        16 bytes for each large tensor.
    """

    structure: Any
    values: tuple[Any, ...]
    digests: bytes

    @property
    def kinds(self) -> list[Kind]:
        """Of its large tensors."""
        return kinds_of(self.structure) if isinstance(self.structure, tuple) else []


def take_sample(sample: Any, digest: str, collated: bool) -> tuple[Sample, list[torch.Tensor]]:
    """A sample taken apart, and its large tensors, contiguous.

    Parameters
    ----------
    sample : object
        What the data set returned.
    digest : str
        The algorithm of the digests of its large tensors.
    collated : bool
        Whether PyTorch's ``default_collate`` makes batches of it: what this turns into a tensor is one then.

    Raises
    ------
    Bypass
        For a sample with anything else in it, with its place.
    """
    values: list[Any] = []
    large: list[torch.Tensor] = []
    structure = _take(sample, values, large, collated, "")
    if not collated and _shares_memory(sample):
        raise Bypass("parts of a sample share memory, so that what is written to one shows in the other")
    digests = b"".join([digest_tensor(tensor, digest) for tensor in large])
    return Sample(structure, tuple(values), digests), large


def _take(value: Any, values: list[Any], large: list[torch.Tensor], collated: bool, where: str) -> Structure:
    kind = type(value)
    if kind in _PLAIN or (isinstance(value, np.generic) and kind.__module__ == "numpy" and value.dtype.kind in "biufc"):
        values.append(value)
        return (_SMALL,)
    if kind in (tuple, list) or (
        issubclass(kind, tuple) and hasattr(kind, "_fields") and not hasattr(value, "__dict__")
    ):
        names: tuple[Any, ...] = tuple(range(len(value)))
        parts = [*tuple.__iter__(value)] if isinstance(value, tuple) else list(value)
    elif kind is dict:
        names, parts = tuple(value), list(value.values())
        if not all(type(name) in (str, int) for name in names):
            raise Bypass(f"a sample has a dict with keys that are neither text nor numbers{where}")
    else:
        return _take_tensor(value, values, large, collated, where)
    if len(where) > 8 * DEEPEST:
        raise Bypass(f"a sample is nested too deep{where[:60]}")
    inner = [
        _take(part, values, large, collated, f"{where}[{name!r}]") for name, part in zip(names, parts, strict=True)
    ]
    return (kind, names, *inner)


def _take_tensor(value: Any, values: list[Any], large: list[torch.Tensor], collated: bool, where: str) -> Structure:
    kind = type(value)
    plain = kind is torch.Tensor and _is_plain(value)
    if plain and value.nbytes < LARGE_ROW:
        values.append(value.detach().clone())
        return (_SMALL, value.dtype, tuple(value.shape))
    if kind is np.ndarray and value.dtype.kind in "biufc" and value.nbytes < LARGE_ROW:
        values.append(value.copy())
        return (_SMALL, value.dtype.str, value.shape)
    if plain and not collated:
        found = value.detach().contiguous()
    elif plain and value.is_contiguous():
        found = value.detach()
    elif collated:
        found = _collated(value)
    else:
        found = None
    if found is None:
        described = f"{kind.__module__}.{kind.__qualname__}"
        raise Bypass(f"a sample holds an object of class {described}{f' at {where}' if where else ''}")
    large.append(found)
    return (_LARGE, Kind(found.dtype, tuple(found.shape)))


def _collated(value: Any) -> torch.Tensor | None:
    """The row that ``default_collate`` makes of ``value``, where it makes a large, ordinary tensor of it."""
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        return None
    made = default_collate([value])
    return made[0] if type(made) is torch.Tensor and _is_plain(made) and made.nbytes >= LARGE_ROW else None


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.is_cpu
        and not (tensor.is_quantized or tensor.is_nested or tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
        and not tensor.__dict__
    )


def _shares_memory(sample: Any) -> bool:
    seen: set[int] = set()
    left = [sample]
    for value in left:
        if isinstance(value, (tuple, list, dict)):
            left += (
                value.values()
                if isinstance(value, dict)
                else tuple.__iter__(value)
                if isinstance(value, tuple)
                else value
            )
        memory = _memory(value)
        if memory in seen:
            return True
        seen.update([memory] if memory else [])
    return False


def _memory(value: Any) -> int:
    """Where what can be written to in ``value`` lies; 0 where nothing can."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().data_ptr()
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        return int(value.__array_interface__["data"][0])
    return id(value) if isinstance(value, (list, dict)) else 0


def build(structure: Structure, values: Sequence[Any], large: Sequence[Any]) -> Any:
    """The sample again, with ``large`` in place of its large tensors. Nobody else holds what it consists of."""
    return _build(structure, iter(values), iter(large))


def _build(structure: Structure, values: Any, large: Any) -> Any:
    kind = structure[0]
    if kind == _SMALL:
        value = next(values)
        return _copied(value) if isinstance(value, (torch.Tensor, np.ndarray)) else value
    if kind == _LARGE:
        return next(large)
    parts = [_build(part, values, large) for part in structure[2:]]
    if kind is dict:
        return dict(zip(structure[1], parts, strict=True))
    if kind is list:
        return parts
    return tuple.__new__(kind, parts)  # what a class does to its arguments was done before


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value.copy()


def kinds_of(structure: Structure) -> list[Kind]:
    """Dtypes and shapes of the large tensors in a structure, in their order."""
    if structure[0] == _LARGE:
        return [structure[1]]
    return [] if structure[0] == _SMALL else [kind for part in structure[2:] for kind in kinds_of(part)]


def small_values(structure: Structure) -> tuple[int, int]:
    """How many large tensors, and how many small values, a structure has."""
    leaves = [leaf for _, _, leaf in places(structure)]
    return len(leaves) - leaves.count(None), leaves.count(None)


def describe(structure: Structure) -> str:
    """A structure as text, equal for equal ones in every process."""
    if structure[0] == _SMALL:
        return f".{''.join(map(str, structure[1:]))}"
    if structure[0] == _LARGE:
        return f"{structure[1].dtype}{[*structure[1].shape]}"
    kind, names, parts = structure[0], structure[1], structure[2:]
    inner = ",".join(f"{name!r}:{describe(part)}" for name, part in zip(names, parts, strict=True))
    return f"{kind.__module__}.{kind.__qualname__}({inner})"


def places(structure: Structure) -> Iterator[tuple[str, str, int | None]]:
    """The leaves of a structure: where they stand, what they are, and which of the large tensors each is."""
    numbers = itertools.count()

    def walk(part: Structure, place: str) -> Iterator[tuple[str, str, int | None]]:
        if part[0] == _LARGE:
            yield place or "sample", f"{str(part[1].dtype).removeprefix('torch.')} {part[1].shape}", next(numbers)
        elif part[0] == _SMALL:
            yield place or "sample", "a small value", None
        else:
            for name, inner in zip(part[1], part[2:], strict=True):
                yield from walk(inner, f"{place}[{name!r}]")

    return walk(structure, "")


def kept_index(index: Any) -> Any:
    """An index that stays what it is, where a sampler writes to the memory of one that it gave."""
    if type(index) is tuple:
        return tuple(map(kept_index, index))
    return index.clone() if isinstance(index, torch.Tensor) else index


def name_of(index: Any) -> Any:
    """By what a sample is found again, equal for equal indices of one class; ``None`` where there is nothing."""
    kind = type(index)
    if kind in (int, str, bytes):
        return index
    if kind in (bool, float) or isinstance(index, np.generic):
        return kind, index.item() if isinstance(index, np.generic) else index
    if kind is torch.Tensor and index.ndim == 0 and index.is_cpu:
        return kind, index.dtype, index.item()
    if kind is not tuple:
        return None
    names = [*map(name_of, index)]
    return None if None in names else (kind, *names)


def differ(one: Sample, other: Sample) -> bool:
    """Whether anything of two samples is not the same in class and in every bit."""
    return (
        one.structure != other.structure
        or one.digests != other.digests
        or len(one.values) != len(other.values)
        or not all(map(_same, one.values, other.values))
    )


def alike(samples: Sequence[Sample]) -> bool:
    """Whether samples are equal in structure, and all their tensors in dtype and shape."""
    first = samples[0].structure
    return all(sample.structure is first or sample.structure == first for sample in samples)


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and digest_tensor(one) == digest_tensor(other)
    if isinstance(one, (np.ndarray, np.generic)):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, complex):
        return _same(one.real, other.real) and _same(one.imag, other.imag)
    return bool(one == other)
