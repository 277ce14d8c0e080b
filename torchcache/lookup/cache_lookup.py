"""One region's lookup: hash, split, call the original, merge."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchcache.errors import OutputError
from torchcache.lookup.ahead import learn, prepared
from torchcache.lookup.context import computing, current_ids, current_watcher
from torchcache.lookup.digest import digest_bytes, digest_rows
from torchcache.lookup.fingerprint import content_digest
from torchcache.lookup.history import History
from torchcache.lookup.key import NumericMode, call_fingerprint
from torchcache.lookup.probe import probe
from torchcache.lookup.rows import Layout
from torchcache.options import CacheOptions
from torchcache.store.blob import RowSpec
from torchcache.store.buffers import Buffers
from torchcache.store.select import concatenate, place_rows, select_rows
from torchcache.store.slab import ABSENT, Slab
from torchcache.store.tiers import Found, Tiers

__all__ = ["CacheLookup", "Call", "Counters", "Split", "learn_layouts"]

Tensors = list[torch.Tensor]


@dataclasses.dataclass
class Counters:
    """What one region did so far: rows, calls and seconds.

    Parameters
    ----------
    memory_hits, disk_hits, misses, bypasses : int
        Rows served by a tier (a repeat within a batch counts as memory), computed and stored, computed only.
    calls : int
        Batches.
    hash_seconds, lookup_seconds, compute_seconds, merge_seconds : float
        Where the time of those batches went.
    """

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    bypasses: int = 0
    calls: int = 0
    hash_seconds: float = 0.0
    lookup_seconds: float = 0.0
    compute_seconds: float = 0.0
    merge_seconds: float = 0.0

    def count_bypass(self, rows: int) -> None:
        """Count a batch that was computed and not stored."""
        self.calls += 1
        self.bypasses += rows

    @property
    def saved_seconds(self) -> float | None:
        """Time that the hits would have taken in the original, less what lookups cost; ``None`` until measured."""
        if not self.misses:
            return None
        spent = self.hash_seconds + self.lookup_seconds + self.merge_seconds
        return (self.memory_hits + self.disk_hits) * self.compute_seconds / self.misses - spent


@dataclasses.dataclass
class Call:
    """One call of a region.

    Parameters
    ----------
    region : bytes
        The region's fingerprint, arguments included.
    mode : NumericMode
        The numeric mode.
    rows, shared : list of torch.Tensor
        Inputs of shape ``(B, *)``, and inputs that all rows share.
    compute : callable
        The original, from any number of rows to its outputs.
    layouts : callable
        What the outputs look like, asked when that is not known from an earlier call.
    probeable : bool
        Whether the original computes several rows together, so that the probe can tell whether they mix. Rows of
        others have keys of their own, until the region is known to be row-wise.
    state : bytes
        Digest of the weights: rows of others make room in memory when it is full.
    """

    region: bytes
    mode: NumericMode
    rows: Tensors
    shared: Tensors
    compute: Callable[[Tensors], Tensors]
    layouts: Callable[[], tuple[Layout, ...]]
    probeable: bool = True
    state: bytes = b""


@dataclasses.dataclass
class Split:
    """A batch divided into what the store holds and what must be computed.

    Parameters
    ----------
    fingerprint : bytes
        The call's fingerprint.
    digests : list of bytes
        One a row.
    found : Found
        What the tiers hold.
    missing : dict of bytes to int
        Digest to its first row in the batch, for each digest found nowhere.
    """

    fingerprint: bytes
    digests: list[bytes]
    found: Found
    missing: dict[bytes, int]


class CacheLookup:
    """The cache of one region.

    Parameters
    ----------
    name : str
        Module path and class, for people.
    options : CacheOptions
        The mark's options.
    """

    def __init__(self, name: str, options: CacheOptions) -> None:
        self.name = name
        self.options = options
        self.tiers = Tiers(options)
        self.counters = Counters()
        self.history = History()
        self.tag = ""
        self.output_paths: list[str] = []
        self.output_rows: set[int] = set()
        self._layouts: dict[bytes, tuple[Layout, ...]] = {}
        self._probed = self._proved = not options.verify

    def __call__(self, call: Call) -> Tensors:
        """The outputs of ``call``: fresh tensors of shape ``(B, *)``, in the caller's order.

        Raises
        ------
        RowwiseError
            When the region's rows depend on each other or on chance.
        OutputError
            When an output has no batch dimension.
        """
        count = call.rows[0].shape[0]
        if not count:
            return self.bypass(call)
        if torch.is_inference_mode_enabled():
            # What is stored here is also served where gradients are taken.
            with torch.inference_mode(False):
                return self(call)
        fingerprint, digests, ahead = self._hash(call, count)
        split = self._split(call, fingerprint, digests, ahead)
        computed = self._compute(call, split)
        merged = self._merge(call, split, computed)
        self.history.note(self.counters, self.tiers.memory.used, self.tiers.disk_bytes)
        watcher = current_watcher()
        if watcher is not None:
            watcher(self, call, split, merged)
        return merged

    def bypass(self, call: Call) -> Tensors:
        """The outputs of ``call``, computed and not stored."""
        self.counters.count_bypass(call.rows[0].shape[0])
        with computing():
            return call.compute(call.rows)

    def _hash(self, call: Call, count: int) -> tuple[bytes, list[bytes], Found | None]:
        """The call's fingerprint and digests, and what look-ahead found for them."""
        start = time.perf_counter()
        ids, named = current_ids(self, count, self.name)
        shared = [content_digest(tensor) for tensor in call.shared]
        fingerprint = call_fingerprint(call.region, self.options, call.mode, call.rows, shared, named)
        found = None
        if ids is not None:
            digests = ids
        elif (done := prepared(self, call.rows)) is not None:
            digests, found = done.digests, done.found
        else:
            digests = digest_rows(call.rows, self.options.digest)
        if ids is None:
            learn(self, call.rows, lambda: self._prepare_as(call, shared))
        self.counters.hash_seconds += time.perf_counter() - start
        return fingerprint, digests, found

    def _prepare_as(self, call: Call, shared: list[bytes]) -> Callable[[Sequence[torch.Tensor]], Any]:
        """How to work ahead for a call like this one."""
        region, mode, state = call.region, call.mode, call.state

        def prepare(rows: Sequence[torch.Tensor]) -> tuple[list[bytes], Found | None]:
            digests = digest_rows(rows, self.options.digest)
            fingerprint = call_fingerprint(region, self.options, mode, rows, shared, 0)
            layouts = self._layouts.get(fingerprint)
            if self.tiers.disk is None or layouts is None:
                return digests, None
            row, device = _row_spec(layouts), layouts[0].device
            return digests, self.tiers.find(fingerprint, digests, lambda: (row, device), state)

        return prepare

    def _split(self, call: Call, fingerprint: bytes, digests: list[bytes], ahead: Found | None) -> Split:
        start = time.perf_counter()

        def expected() -> tuple[RowSpec, torch.device]:
            layouts = self._layouts_of(call, fingerprint)
            return _row_spec(layouts), layouts[0].device

        found = self.tiers.find(fingerprint, digests, expected, call.state, ahead)
        if not self._proved:
            if any(slot != ABSENT for slot in found.slots) or found.extra:
                self._proved = True  # rows are stored after a probe only, by whichever process
            elif not call.probeable:
                fingerprint = digest_bytes(b"alone" + fingerprint)
                found = self.tiers.find(fingerprint, digests, expected, call.state)
        missing: dict[bytes, int] = {}
        if ABSENT in found.slots:
            for row, (digest, slot) in enumerate(zip(digests, found.slots, strict=True)):
                if slot == ABSENT and digest not in found.extra:
                    missing.setdefault(digest, row)
        disk = len(found.from_disk)
        if disk:
            self.tiers.tell(self.tag, self.name)
        self.counters.calls += 1
        self.counters.misses += len(missing)
        self.counters.disk_hits += disk
        self.counters.memory_hits += len(digests) - len(missing) - disk
        self.counters.lookup_seconds += time.perf_counter() - start
        return Split(fingerprint, digests, found, missing)

    def _compute(self, call: Call, split: Split) -> Tensors:
        if not split.missing:
            return []
        start = time.perf_counter()
        rows = _select(call.rows, list(split.missing.values()))
        with computing():
            outputs = call.compute(rows)
        self._check_rows(outputs, len(split.missing))
        self.counters.compute_seconds += time.perf_counter() - start
        if not self._probed and call.probeable:
            with computing():
                probe(self.name, rows, outputs, call.compute, call.mode.autocast is not None)
            self._probed = self._proved = True
        if len(split.missing) > 1:  # one row alone does not tell where the batch lies in memory
            self._layouts.setdefault(split.fingerprint, tuple(map(Layout.of, outputs)))
        start = time.perf_counter()
        digests = list(split.missing)
        slab, slots = self.tiers.keep(
            split.fingerprint, self.tag, self.name, digests, outputs, RowSpec.of(outputs), call.state
        )
        if slab is not None:
            split.found.slab = slab
        if len(slots) == len(digests) < len(split.digests) and self.options.cache_dtype is None and slab is not None:
            split.found.slots = slab.find(split.digests)
        self.counters.merge_seconds += time.perf_counter() - start
        return outputs

    def _merge(self, call: Call, split: Split, computed: Tensors) -> Tensors:
        start = time.perf_counter()
        if len(split.missing) == len(split.digests):
            return computed
        layouts = self._layouts_of(call, split.fingerprint)
        near = call.rows[0].device
        slab, slots, buffers = split.found.slab, split.found.slots, self.tiers.memory.buffers
        if slab is not None and ABSENT not in slots:
            merged = slab.gather(slots)
        else:
            merged = _assemble(split, slab, computed, layouts, near, buffers)
        merged = [layout.apply(leaf, near, buffers) for layout, leaf in zip(layouts, merged, strict=True)]
        self.counters.merge_seconds += time.perf_counter() - start
        return merged

    def _layouts_of(self, call: Call, fingerprint: bytes) -> tuple[Layout, ...]:
        layouts = self._layouts.get(fingerprint)
        if layouts is None:
            layouts = self._layouts[fingerprint] = call.layouts()
        return layouts

    def _check_rows(self, outputs: Tensors, count: int) -> None:
        if not outputs:
            raise OutputError(f"{self.name} returns no tensor, so there is nothing to cache: unmark it")
        for index, leaf in enumerate(outputs):
            if not leaf.ndim or leaf.shape[0] != count:
                path = self.output_paths[index] if index < len(self.output_paths) else f" {index}"
                raise OutputError(
                    f"{self.name}: output{path} has shape {tuple(leaf.shape)} for a batch of {count} rows: every "
                    "output needs the batch as its first dimension to be cached"
                )


def learn_layouts(call: Call) -> tuple[Layout, ...]:
    """What the outputs look like, from computing two rows."""
    rows = [concatenate((leaf[:1], leaf[-1:])) for leaf in call.rows]
    with computing():
        return tuple(map(Layout.of, call.compute(rows)))


def _row_spec(layouts: Sequence[Layout]) -> RowSpec:
    return RowSpec(tuple((layout.dtype, layout.shape) for layout in layouts))


def _select(tensors: Tensors, rows: list[int]) -> Tensors:
    """``rows`` of each tensor; the tensors themselves where that is all of them."""
    if len(rows) == tensors[0].shape[0]:
        return tensors
    return [select_rows(leaf, rows) for leaf in tensors]


def _assemble(
    split: Split,
    slab: Slab | None,
    computed: Tensors,
    layouts: Sequence[Layout],
    near: torch.device,
    buffers: Buffers,
) -> Tensors:
    """A batch from up to three sources: the slab, rows read from disk, rows just computed."""
    order = {digest: row for row, digest in enumerate(split.missing)}
    sources: list[tuple[Tensors, list[int], list[int]]] = [
        (split.found.extra_rows, [], []),
        (computed, [], []),
    ]
    held: list[int] = []
    slots: list[int] = []
    for row, (digest, slot) in enumerate(zip(split.digests, split.found.slots, strict=True)):
        if slot != ABSENT:
            held.append(row)
            slots.append(slot)
            continue
        which = 0 if digest in split.found.extra else 1
        sources[which][1].append(row)
        sources[which][2].append(split.found.extra[digest] if which == 0 else order[digest])
    merged = [layout.empty(len(split.digests), near, buffers) for layout in layouts]
    parts = [(held, slab.gather(slots))] if slab is not None and held else []
    parts += [(rows, [select_rows(leaf, taken) for leaf in source]) for source, rows, taken in sources if rows]
    for rows, leaves in parts:
        for target, leaf in zip(merged, leaves, strict=True):
            place_rows(target, rows, leaf)
    return merged
