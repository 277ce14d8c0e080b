"""The content of a region's state as one digest, and whether it changed. No version proves that it did not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from torchcache.identity.background import check_in_background, keep_checking
from torchcache.identity.content import contents_of, joined_digest, plain_tensors, readable
from torchcache.identity.optimizers import suspect_after_steps
from torchcache.identity.record import Record


class State:
    """The tensors that a region reads, known by their content.

    A change is suspected when

    - a tensor lies elsewhere, or has another shape, stride, dtype or version,
    - an optimizer that holds its memory made a step,
    - elements differ that are looked at in every call: all of tensors up to 2,048 elements, some of larger ones, others
      each time, at least one in any run of 1/16,
    - everything is hashed again, within 0.5% of the time, and there is a difference: in a thread what the host has; of
      what a device has, one tensor in a call.

    What is suspected is hashed as a whole. Only other content is a change.

    It keeps no tensor alive. Several threads may call it at once.

    Attributes
    ----------
    changed : list of int
        Which tensors had other contents than before when they were hashed last; of another number of tensors, those of
        them that were there before.
    """

    def __init__(self) -> None:
        self.changed: list[int] = []
        self._known: tuple[Record, str, bytes] | None = None

    def __reduce__(self) -> tuple[type[State], tuple[()]]:
        # What is known of tensors says nothing about their copies.
        return State, ()

    @property
    def digest(self) -> bytes:
        """16 bytes over dtype, shape and elements of all tensors in order; empty before the first ``update``."""
        return b"" if self._known is None else self._known[-1]

    @property
    def gone(self) -> bool:
        """Whether memory of the tensors that were last hashed was given back."""
        return self._known is not None and self._known[0].gone

    def update(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """Hash every byte of ``tensors``, and remember what they are.

        Parameters
        ----------
        tensors : sequence of torch.Tensor
            Of any shapes, strides, dtypes and devices.

        Returns
        -------
        bytes
            The new ``digest``.

        Raises
        ------
        Bypass
            When the elements of one cannot be read.
        """
        with readable():
            plain, wrapping = plain_tensors(tensors)
            record = _watched(plain)
            record.contents = contents_of(plain)
        changed = _changed(self._known[0], record) if self._known is not None else []
        self.changed = changed if len(plain) == len(tensors) else []
        return self._keep(record, wrapping)

    def current(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """The digest of ``tensors`` as they are now, which are hashed only where they are not what was last hashed.

        Raises
        ------
        Bypass
            When the elements of one cannot be read.
        """
        return self._known_digest(tensors) or self.update(tensors)

    def unchanged(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the content of ``tensors`` is what was last hashed, as far as can be known without hashing it again.

        Raises
        ------
        Bypass
            When the elements of one cannot be read.
        """
        return bool(self._known_digest(tensors))

    def unchanged_whole(self, tensors: Sequence[torch.Tensor], most: float) -> bool:
        """The same, and tensors in host memory are hashed again: the smallest first, at most so many bytes in all.

        Raises
        ------
        Bypass
            When the elements of one cannot be read.
        """
        if not self.unchanged(tensors) or self._known is None:
            return False
        record = self._known[0]
        with readable():
            plain, _ = plain_tensors(tensors)
            here = sorted((i for i, tensor in enumerate(plain) if tensor.is_cpu), key=lambda i: plain[i].nbytes)
            ends = itertools.accumulate(plain[i].nbytes for i in here)
            return record.holds(plain, [i for i, end in zip(here, ends, strict=True) if end <= most])

    def _known_digest(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """The last digest where it is that of ``tensors``; empty where it is not."""
        if self._known is None:
            return b""
        keep_checking()
        record, wrapping, digest = self._known
        with readable():
            if not wrapping and record.in_place(tensors):
                return digest if record.unchanged(tensors) else b""
            plain, now = plain_tensors(tensors)
            if now != wrapping or len(plain) != len(record.contents):
                return b""
            if record.in_place(plain):
                return digest if record.unchanged(plain) else b""
            fresh = _watched(plain)
            if not record.holds(plain, record.moved_first(plain)):
                return b""
            fresh.contents = record.contents
        return self._keep(fresh, wrapping)

    def _keep(self, record: Record, wrapping: str) -> bytes:
        digest = joined_digest(record.contents, wrapping)
        self._known = (record, wrapping, digest)
        check_in_background(record)
        return digest


def _changed(before: Record, now: Record) -> list[int]:
    """The indices of tensors that hold something else."""
    known = before.contents
    if len(known) != len(now.contents):
        held = dict(zip(before.ids, known, strict=True))
        known = [held.get(key, content) for key, content in zip(now.ids, now.contents, strict=True)]
    return [i for i, content in enumerate(now.contents) if content != known[i]]


def _watched(plain: Sequence[torch.Tensor]) -> Record:
    """A record to be filled; what optimizers write from here on is suspect."""
    record = Record(plain)
    suspect_after_steps(record)
    return record
