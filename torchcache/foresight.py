"""What a region will find for rows that are still to come, by a call like theirs that was made."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from torchcache.batch import Batch, Subject, lacks
from torchcache.checks.audit import Schedule
from torchcache.checks.plan import Plan
from torchcache.digest.rows import digest_rows
from torchcache.identity.key import call_fingerprint, layout_fingerprint
from torchcache.options import CacheOptions
from torchcache.store.found import Found
from torchcache.store.slab import ABSENT
from torchcache.store.tiers import Tiers
from torchcache.values.layout import Lie, lie_of


class _Region(Protocol):
    subject: Subject
    tiers: Tiers
    options: CacheOptions
    schedule: Schedule


class Foresight:
    """Looks rows up under the key of an earlier call, which theirs will have unless something changes.

    Parameters
    ----------
    region : Region
        Held weakly.
    batch, plan
        The call, and what is known of calls like it.
    """

    def __init__(self, region: _Region, batch: Batch, plan: Plan) -> None:
        self._region = weakref.ref(region)
        self._plan = plan
        self._who, self._mode, self._shared = batch.who, batch.mode, batch.shared
        self._lies = _lies(batch.rows)
        self._kind = (batch.who + batch.taken.key, b"".join(batch.shared))

    def bring(self, rows: Sequence[torch.Tensor]) -> Found | None:
        """Bring what the tiers beneath memory have of ``rows`` near; ``None`` before rows from there are believed."""
        region, plan = self._region(), self._plan
        if region is None or (region.tiers.beneath and not (plan.believed or lacks(region.subject))):
            return None
        if _lies(rows) != self._lies:
            return None
        call = call_fingerprint(plan.form, region.options, self._mode, rows, self._shared, 0)
        digests = digest_rows(rows, region.options.digest)
        key = layout_fingerprint(call, plan.layout)
        return region.tiers.find(key, digests, plan.precision.stored, self._who, None)

    def hits(self, rows: Sequence[torch.Tensor]) -> list[bool] | None:
        """Which of ``rows`` need not be computed; ``None`` where that cannot be told."""
        region, count = self._region(), len(rows[0])
        if region is None:
            return None
        if region.schedule.first(*self._kind, count):
            return [False] * count  # they are served, and computed as well
        found = self.bring(rows)
        if found is None:
            return None
        if ABSENT not in found.slots:
            return [True] * count
        pairs = zip(found.slots, digest_rows(rows, region.options.digest), strict=True)
        return [slot != ABSENT or digest in found.extra for slot, digest in pairs]


def _lies(rows: Sequence[torch.Tensor]) -> list[Lie]:
    return [lie_of(leaf, 0) for leaf in rows]
