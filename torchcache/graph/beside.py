"""The regions of one part of a graph, side by side: one for each state, since a graph may serve several modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchcache.call import Region

# States that have regions of their own; further ones take over those of others.
MOST = 256


class Beside:
    """One region for each tuple of tensors that a part of a graph is given as its state.

    Only other content of the same tensors is a change to a region. Where tensors are gone, the next ones that come take
    over their region, to which that is a change as well: so there are no more regions than states at a time.

    Parameters
    ----------
    make : callable
        Makes a region, given how many there are.

    Attributes
    ----------
    regions : list of Region
        In the order in which they were made.
    """

    def __init__(self, make: Callable[[int], Region]) -> None:
        self.regions = [make(0)]
        self._make = make
        # By ``id``: were others to get those of tensors that are gone, their content would tell.
        self._given: dict[tuple[int, ...], Region] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The name of the regions, for people."""
        return self.regions[0].name

    @property
    def calls(self) -> int:
        """Batches that were looked up."""
        return sum(region.counters.calls for region in self.regions)

    def region(self, state: Sequence[torch.Tensor]) -> Region:
        """The region of this state."""
        given = tuple(map(id, state))
        found = self._given.get(given)
        return found if found is not None else self._another(given)

    def _another(self, given: tuple[int, ...]) -> Region:
        with self._lock:
            if given in self._given:
                return self._given[given]
            old = next((held for held, region in self._given.items() if _gone(region)), None)
            if old is None and len(self._given) == MOST:
                old = next(iter(self._given))
            if old is not None:
                region = self._given.pop(old)
            elif not self._given:
                region = self.regions[0]
            else:
                region = self._make(len(self.regions))
                self.regions.append(region)
            self._given[given] = region
            return region


def _gone(region: Region) -> bool:
    """Whether a region's state is no more."""
    identity: Any = region.subject.identity
    return bool(identity.gone())
