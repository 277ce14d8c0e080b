"""A look at many tensors' elements that is cheap enough for every call: small ones whole, large ones by samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from torchcache.identity.memory import elements_at, row_major_bytes
from torchcache.streams import Coming

# Tensors up to this many elements are compared whole.
WHOLE = 2048
# In larger ones, a call looks at one element in each of as many equal parts: no run of 1/16 of all escapes.
PARTS = 32
# As many calls in a row look at different elements.
TURNS = 16
# Bytes read for an element on the CPU.
WORD = 8
# By the bytes of an element; complex numbers are taken for two.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Gives elements of a tensor, for a turn.
Look = Callable[[torch.Tensor, int], torch.Tensor]


class Samples(Protocol):
    """What some elements of tensors were; see ``samples_of``. The tensors asked about must lie where those did."""

    def same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the elements whose turn it is are what they were."""

    def differing(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """The indices of tensors that may differ, after a look at the elements of all turns."""


def samples_of(tensors: Sequence[torch.Tensor]) -> list[Samples]:
    """Take samples of plain tensors. None of it keeps a tensor or a storage alive.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        Of any device. Those without data count for nothing.
    """
    with_data = [index for index, tensor in enumerate(tensors) if tensor.numel() and not tensor.is_meta]
    here = [index for index in with_data if tensors[index].is_cpu]
    whole = [index for index in here if tensors[index].numel() <= WHOLE]
    in_part = sorted({*here} - {*whole})
    away: dict[torch.device, list[int]] = {}
    for index in sorted({*with_data} - {*here}):
        away.setdefault(tensors[index].device, []).append(index)
    samples: list[Samples] = [OnDevice(group, tensors) for group in away.values()]
    if whole:
        samples.append(WholeInMemory(whole, tensors))
    if in_part:
        samples.append(PartsInMemory(in_part, tensors))
    return samples


class WholeInMemory:
    """All of small tensors on the CPU, as one digest."""

    def __init__(self, indices: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        self._indices = set(indices)
        elements = [
            elements_at(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.itemsize)
            for tensor in (tensors[index] for index in indices)
        ]
        # What is contiguous is hashed where it is.
        self._contiguous = [row_major_bytes(part).data for part in elements if part.flags.c_contiguous]
        self._others = [part for part in elements if not part.flags.c_contiguous]
        self._digest = self._hash()

    def same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether all elements are what they were."""
        return self._hash() == self._digest

    def differing(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """All of the tensors, or none."""
        return set() if self.same(tensors) else self._indices

    def _hash(self) -> bytes:
        hasher = xxhash.xxh3_128()
        for part in self._contiguous:
            hasher.update(part)
        for other in self._others:
            hasher.update(row_major_bytes(other).data)
        return bytes(hasher.digest())


class PartsInMemory:
    """Elements of large tensors on the CPU, as the aligned words of eight bytes that hold a byte of each.

    Aligned words never reach into another page of memory. Where strides leave gaps, a word may hold bytes of a
    neighbour: that words differ is a reason to look, and no proof.
    """

    def __init__(self, indices: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        random = np.random.default_rng()
        addresses = [_sampled_addresses(tensors[index], random) for index in indices]
        self._owners = np.repeat(indices, PARTS)
        words = np.concatenate(addresses, axis=1) // WORD
        first = int(words.min())
        self._words = elements_at(first * WORD, (int(words.max()) - first + 1,), (1,), WORD)
        self._places = words - first
        self._were: list[bytes] = [self._words.take(places).tobytes() for places in self._places]
        self._turns = itertools.cycle(range(TURNS))

    def same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the next words are what they were."""
        turn = next(self._turns)
        return bool(self._words.take(self._places[turn]).tobytes() == self._were[turn])

    def differing(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """The owners of all words that are not what they were, of all turns."""
        were = np.frombuffer(b"".join(self._were), self._words.dtype).reshape(self._places.shape)
        return set(self._owners[(self._words.take(self._places) != were).any(axis=0)].tolist())


def _sampled_addresses(tensor: torch.Tensor, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Addresses of bytes in elements of a tensor, ``(TURNS, PARTS)``: of one in each part, by turns of others."""
    edges = np.arange(PARTS + 1) * tensor.numel() // PARTS
    places = random.integers(edges[:-1], edges[1:], (TURNS, PARTS))
    inside = random.integers(0, tensor.itemsize, places.shape)
    if tensor.is_contiguous():
        return tensor.data_ptr() + places * tensor.itemsize + inside
    along = np.unravel_index(places, tuple(tensor.shape))
    steps = sum(index * stride for index, stride in zip(along, tensor.stride(), strict=True))
    return np.asarray(tensor.data_ptr() + steps * tensor.itemsize + inside)


class OnDevice:
    """Elements of tensors on one device, gathered and compared there; who asks waits for all that is on its way."""

    def __init__(self, indices: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        self._indices = set(indices)
        shares = np.random.default_rng().random((len(indices), TURNS))
        # By the size of their elements, since only tensors of one dtype are joined at once.
        self._groups: dict[torch.dtype, list[tuple[int, Look]]] = {}
        for index, share in zip(indices, shares, strict=True):
            dtype, look = _look_at(tensors[index], share)
            self._groups.setdefault(dtype, []).append((index, look))
        self._were = [self._gather(tensors, turn) for turn in range(TURNS)]
        self._turns = itertools.cycle(range(TURNS))

    def same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the next elements are what they were; waits for the device."""
        turn = next(self._turns)
        return not Coming((self._gather(tensors, turn) != self._were[turn]).any().long()).words()[0]

    def differing(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """All of the tensors, or none."""
        same = [torch.equal(self._gather(tensors, turn), self._were[turn]) for turn in range(TURNS)]
        return set() if all(same) else self._indices

    def _gather(self, tensors: Sequence[torch.Tensor], turn: int) -> torch.Tensor:
        with torch.no_grad():
            groups = [
                torch.cat([look(tensors[index], turn) for index, look in group]).to(torch.int64)
                for group in self._groups.values()
            ]
            return torch.cat(groups) if len(groups) > 1 else groups[0]


def _look_at(tensor: torch.Tensor, shares: npt.NDArray[np.float64]) -> tuple[torch.dtype, Look]:
    """What gives some elements of a tensor as integers, by turns: all, or every n-th from a share of n."""
    dtype = _INTEGERS[tensor.itemsize // (2 if tensor.is_complex() else 1)]
    numbers = _numbers(tensor, dtype)
    count = numbers.numel()
    step, length = (1, count) if count <= WHOLE else (count // PARTS, PARTS)
    starts = [int(share * step) for share in shares] if count > WHOLE else [0] * TURNS
    along = sorted(range(numbers.ndim), key=numbers.stride, reverse=True)
    if not numbers.permute(along).is_contiguous():  # it has gaps
        return dtype, lambda tensor, turn: _numbers(tensor, dtype).reshape(-1)[starts[turn] :: step]
    offset = numbers.storage_offset()
    if tensor.is_complex() or tensor.is_neg():
        return dtype, lambda tensor, turn: _numbers(tensor, dtype).as_strided((length,), (step,), offset + starts[turn])
    return dtype, lambda tensor, turn: tensor.view(dtype).as_strided((length,), (step,), offset + starts[turn])


def _numbers(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(dtype)
