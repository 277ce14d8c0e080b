"""What a state's tensors were when they were hashed, and which of them may have changed since."""

from __future__ import annotations

import itertools
import operator
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from torchcache.dynamo import layout_check
from torchcache.identity.content import Content, block_digests, start_content, versions
from torchcache.identity.memory import elements_at, row_major_bytes
from torchcache.identity.samples import samples_of

_dtype = operator.attrgetter("dtype")
_shape = operator.attrgetter("shape")
_events = itertools.count()
# Of the time, how much calls take to look at whole tensors on devices.
SHARE = 0.0045


class Record:
    """Tensors as they were when they were hashed. Keeps none of them alive.

    It must be made before the tensors are hashed: a write in between is then seen as a change. Several threads may use
    it at once; there is no lock, only single operations on lists and dicts.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        Plain tensors; see ``content.plain_tensors``.

    Attributes
    ----------
    contents : list of Content
        What was hashed, tensor by tensor; empty until then.
    ids : list of int
        The ``id`` of each tensor.
    by_storage : dict of int to list of int
        The indices of the tensors that lie in a storage, by the storage's address.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.contents: list[Content] = []
        self.ids = [*map(id, tensors)]
        self.by_storage: dict[int, list[int]] = {}
        # The last event that made a tensor suspect, and the last that was cleared by a hash, both by index.
        self._suspected: dict[int, int] = {}
        self._cleared: dict[int, int] = {}
        self._versions = versions(tensors)
        self._types = list(map(type, tensors))
        self._layouts = _layouts(tensors)
        self._alike = layout_check(tensors)
        self._contiguous = [tensor.is_contiguous() for tensor in tensors]
        # Conjugate and negative views differ from what they view in nothing else.
        self._views = [i for i, tensor in enumerate(tensors) if tensor.is_complex() or not self._contiguous[i]]
        self._flags = self._view_flags(tensors)
        # On a device, work of another thread would end the capture of a CUDA graph: a call looks at one as a whole.
        self._checkable = [
            i for i, tensor in enumerate(tensors) if tensor.is_cpu and not tensor.is_conj() | tensor.is_neg()
        ]
        storages = [tensor.untyped_storage() for tensor in tensors]
        # Of the tensors there are none: torch swaps no tensors that have weak references.
        self._gone: list[Any] = []
        self._storages = [weakref.ref(storage, self._gone.append) for storage in storages]
        self._memory = [(storage.data_ptr(), storage.nbytes()) for storage in storages]
        for index, storage in enumerate(storages):
            self.by_storage.setdefault(storage.data_ptr(), []).append(index)
        self._samples = samples_of(tensors)
        self._away = [i for i, tensor in enumerate(tensors) if not (tensor.is_cpu or tensor.is_meta)]
        self._turns, self._spent, self._began = itertools.cycle(self._away), 0.0, time.perf_counter()

    @property
    def gone(self) -> bool:
        """Whether any of the memory that was hashed is no more."""
        return bool(self._gone)

    def suspect(self, indices: Iterable[int]) -> None:
        """Have tensors hashed again before they are next believed to be unchanged."""
        event = next(_events)
        self._suspected.update((index, event) for index in list(indices))

    def in_place(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors`` lie in the same memory, with the same classes, shapes, strides and dtypes."""
        if self._gone:  # as long as storages live, nothing else has their addresses
            return False
        if self._alike is not None and len(tensors) == len(self._types) and self._alike(*tensors):
            return _addresses(tensors) == self._layouts[0]
        if list(map(type, tensors)) != self._types or _layouts(tensors) != self._layouts:
            return False
        if self._view_flags(tensors) != self._flags:
            return False
        if self._alike is not None:
            self._alike = layout_check(tensors)
        return True

    def unchanged(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the content of ``tensors`` is what was hashed; they must be in place.

        What something speaks against is hashed again. If that finds nothing, nothing speaks against it any more.
        """
        turn, whole = self._whole(tensors) if self._away else (-1, None)
        if (
            self._suspected == self._cleared
            and versions(tensors) == self._versions
            and all(sample.same(tensors) for sample in self._samples)
            and (whole is None or whole() == self.contents[turn])
        ):
            return True
        # Both are read before hashing: what is written meanwhile is hashed the next time.
        suspected, latest = self._suspected.copy(), versions(tensors)
        suspects = {index for index, event in suspected.items() if self._cleared.get(index) != event}
        suspects.update(i for i, (now, was) in enumerate(zip(latest, self._versions, strict=True)) if now != was)
        if whole is not None and whole() != self.contents[turn]:
            suspects.add(turn)
        differing: set[int] = set().union(*(sample.differing(tensors) for sample in self._samples))
        # Gaps between elements may be all that differs: they are not to raise an alarm for ever.
        samples = samples_of(tensors) if differing else self._samples
        suspects |= differing
        if not self.holds(tensors, sorted(suspects)):
            self.suspect(suspects)
            return False
        self._cleared, self._versions, self._samples = suspected, latest, samples
        return True

    def _whole(self, tensors: Sequence[torch.Tensor]) -> tuple[int, Callable[[], Content] | None]:
        """The index of a tensor on a device, and what gives its whole content; another each time, if there is time."""
        start = time.perf_counter()
        if self._spent > SHARE * (start - self._began):
            return -1, None
        turn = next(self._turns)
        content = start_content(tensors[turn])
        self._spent += time.perf_counter() - start
        return turn, content

    def holds(self, tensors: Sequence[torch.Tensor], indices: Iterable[int]) -> bool:
        """Whether the content of the tensors at ``indices`` is what was hashed."""
        away = []
        for index in indices:
            content = start_content(tensors[index])
            if not tensors[index].is_cpu:
                away.append((content, index))
            elif content() != self.contents[index]:
                return False
        return all(content() == self.contents[index] for content, index in away)

    def moved_first(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """All indices, first of those tensors that lie elsewhere than before."""
        addresses = self._layouts[0]
        return sorted(range(len(tensors)), key=lambda index: tensors[index].data_ptr() == addresses[index])

    def portions(self) -> list[tuple[int, int, int]]:
        """What ``check`` can do at a time: a tensor's index, its first block, the one after the last."""
        portions: list[tuple[int, int, int]] = []
        for index in self._checkable:
            blocks = len(self.contents[index]) - 1
            step = 1 if self._contiguous[index] else max(blocks, 1)
            portions += [(index, first, min(first + step, blocks)) for first in range(0, blocks, step)]
        return portions

    def check(self, index: int, first: int, after: int) -> None:
        """Hash blocks of one tensor again, in any thread, and suspect it if they differ."""
        storage = self._storages[index]()
        if storage is None:
            return
        # Not the tensor itself: its own thread may move it elsewhere meanwhile, but the storage stays.
        if (storage.data_ptr(), storage.nbytes()) != self._memory[index]:
            return
        address, shape, strides, dtype = (column[index] for column in self._layouts)
        data = row_major_bytes(elements_at(address, shape, strides, dtype.itemsize, storage))
        if block_digests(data, first, after) != list(self.contents[index][1 + first : 1 + after]):
            self.suspect([index])

    def _view_flags(self, tensors: Sequence[torch.Tensor]) -> list[bool]:
        return [flag for i in self._views for flag in (tensors[i].is_conj(), tensors[i].is_neg())]


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


def _layouts(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    return (
        _addresses(tensors),
        list(map(_shape, tensors)),
        list(map(torch.Tensor.stride, tensors)),
        list(map(_dtype, tensors)),
    )
