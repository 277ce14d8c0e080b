"""Arguments that are new in every call: a part of all keys, so that no row is found again."""

from __future__ import annotations

from torchcache.batch import Batch
from torchcache.checks.roles import Roles
from torchcache.errors import Bypass
from torchcache.logging import warn_once
from torchcache.values.take import take_arguments

# So many calls in a row are told of.
TOLD = 32
MOST = 4096


class Novelty:
    """Counts calls of one region whose constants and shared arguments never came before.

    Attributes
    ----------
    calls : int
        How many there were since the last one whose arguments were known.
    varying : str
        The arguments that differed between the last two of them, for people.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.varying = ""
        self._known: set[bytes] = set()
        self._last: dict[str, bytes] = {}

    def note(self, name: str, batch: Batch, roles: Roles) -> None:
        """Take note of a call of the region ``name``, and tell of it where there were many."""
        key = b"".join([batch.taken.key, *batch.shared])
        if key in self._known:
            self.calls = 0
            return
        if len(self._known) >= MOST:
            self._known.clear()
        self._known.add(key)
        now = _parts(batch, roles)
        self.varying = ", ".join(name for name in now if self._last.get(name) != now[name])
        self._last = now
        self.calls += 1
        if self.calls == TOLD:
            warn_once(
                f"{name}: {self.varying} was new in each of {TOLD} calls in a row. It is part of every key, so "
                "rows are found only where it comes again: leave it out, or pass it with a row for each sample"
            )


def _parts(batch: Batch, roles: Roles) -> dict[str, bytes]:
    """What of each argument is a part of keys: its constants, and tensors that all rows share."""
    given, names = batch.given, batch.given.subject.names
    positional = [(names[place] if place < len(names) else f"{place}", value) for place, value in enumerate(given.args)]
    found = {}
    for name, value in (*positional, *given.kwargs.items()):
        try:
            found[name] = take_arguments((value,), {}, ()).key
        except Bypass:  # understood only beside the others
            continue
    shared = [place for place, dim in enumerate(roles) if dim is None]
    for place, digest in zip(shared, batch.shared, strict=True):
        found[batch.taken.path(place).strip() or "argument"] = digest
    return found
