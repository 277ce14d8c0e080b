"""What is remembered of a data set's samples, whether it is still true, and which of them need not be loaded."""

from __future__ import annotations

import itertools
import random
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torchcache.digest.cpu import digest_bytes
from torchcache.identity.program import Program
from torchcache.identity.state import State
from torchcache.lazy.rows import Foresee, Row
from torchcache.lazy.use import register, stack_rows
from torchcache.loading.fetch import Fetcher, Learnt, load_rows
from torchcache.loading.pages import SAMPLES, Pages
from torchcache.loading.samples import Sample, describe, same_values, take_sample
from torchcache.logging import logger, warn_once
from torchcache.options import CacheOptions

__all__ = ["Remembered"]

# Samples that take less to load, in seconds, are not worth remembering.
CHEAP = 20e-6
# So many batches in a row of which something other than a region read a tensor: it is loaded from then on.
READ_OFTEN = 3
# A region that looked nothing up for so many batches is not asked any more.
LATE = 16
# Samples that are loaded again at the start of a pass, at least; and the share of the time that this may take.
FEWEST_CHECKED = 8
MOST_TIME = 0.02
# Apart from the generators that training draws from.
_random = random.Random()
_numbers = itertools.count()


class Remembered:
    """The samples of one loader's data set: a source of rows.

    Parameters
    ----------
    fetcher : Fetcher
        Loads and takes apart.
    load : callable
        From indices to samples, at once, from where this process may.
    name : str or None
        The user's name for the data set, in place of its program.
    share : float
        Of the samples, how many are loaded again in each pass.
    options : CacheOptions or None
        Where samples are kept for other processes; ``None`` keeps them in memory only.

    Attributes
    ----------
    loaded, skipped : int
        How many samples were loaded, and how many stood for themselves.
    reason : str
        Why samples are loaded in every epoch; empty where they are not.
    forgotten : int
        How often all that was remembered was dropped.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        load: Callable[[Sequence[Any]], list[Any]],
        name: str | None,
        share: float,
        options: CacheOptions | None = None,
    ) -> None:
        self.digest = fetcher.digest
        self.number = next(_numbers)
        self.loaded = self.skipped = 0
        self.reason = ""
        self.forgotten = 0
        self._fetcher, self._load, self._share = fetcher, load, share
        self._name, self._options = name, options
        self._program: Program | None = None
        self._state = State()
        self._pages: Pages | None = None
        self._identity = b""
        self._new: list[tuple[Any, Sample]] = []
        # Structures by their texts, which is what pages have of them.
        self._described: dict[str, Any] = {}
        self._by_number: list[Sample | None] = []
        self._by_name: dict[Any, Sample] = {}
        self._structures: dict[Any, Any] = {}
        self._routes: weakref.WeakKeyDictionary[Any, dict[int, tuple[Foresee, int]]] = weakref.WeakKeyDictionary()
        self._passed = 0
        self._foreign: set[int] = set()
        self._streak: dict[int, int] = {}
        self._seconds, self._timed = 0.0, 0
        self._checked_at = time.perf_counter()
        self._spent = 0.0
        self._checks = 0
        register(self.number, self)
        self._identify()

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """What makes batches of samples."""
        return self._fetcher.collate

    @property
    def name(self) -> str:
        """The data set's, for people."""
        return type(self._fetcher.dataset).__name__

    def __len__(self) -> int:
        return len(self._by_name) + sum(sample is not None for sample in self._by_number)

    def _identify(self) -> None:
        """See which data set it is, and what earlier processes kept of it."""
        dataset = self._fetcher.dataset
        if self._name is None:
            self._program = Program(dataset.__getitem__, "the data set")
            if self._program.problem:
                self.refuse(f"{self._program.problem}: name the data set and all that it does with dataset_id=...")
                return
            who = self._program.digest + self._state.update(self._program.tensors)
        else:
            who = f"{type(dataset).__module__}.{type(dataset).__qualname__} {self._name}".encode()
        if self._options is not None:
            self._identity = digest_bytes(who + f" {self.digest} {self._fetcher.collated}".encode())
            self._pages = Pages(self._identity, f"samples of {self.name}", self._options)
            for index, sample in self._pages.read():
                self._keep(index, sample)

    def refuse(self, reason: str) -> None:
        """Load every sample in every epoch from here on."""
        self._forget()
        self.reason = reason
        warn_once(f"samples of {self.name} are loaded in every epoch: {reason}")

    def begin(self) -> None:
        """Look whether what is remembered is still true, as a pass begins."""
        if self.reason or not len(self):
            return
        program = self._program
        if program is not None and not (program.unchanged() and self._state.unchanged(program.tensors)):
            self._forget()
            self._identify()
        if not self.reason:
            self._check()

    def get(self, index: Any) -> Sample | None:
        """What is remembered of a sample."""
        if type(index) is int and 0 <= index < len(self._by_number):
            found = self._by_number[index]
        else:
            found = self._by_name.get(index)
        if found is None or len(found.structure) > 1 or found.structure[0] not in self._described:
            return found if found is not None and len(found.structure) > 1 else None
        found = found._replace(structure=self._described[found.structure[0]])
        self._keep(index, found)
        return found

    def add(self, learnt: Learnt) -> None:
        """Remember what was loaded for the first time."""
        if learnt.refused:
            self.refuse(learnt.refused)
        if self.reason:
            return
        self._seconds += learnt.seconds
        self._timed += len(learnt.samples)
        for index, sample in learnt.samples:
            sample = sample._replace(structure=self._known_structure(sample.structure))
            self._keep(index, sample)
            if self._pages is not None:
                self._new.append((index, sample))
        if len(self._new) >= SAMPLES:
            self.write()
        if self._timed >= 256 and self._seconds < CHEAP * self._timed:
            self._forget()
            self.reason = "loading one takes no longer than to leave it out"
        elif learnt.samples and not any(sample.digests for _, sample in learnt.samples):
            self._forget()
            self.reason = "there are no large tensors in it"

    def write(self) -> None:
        """Keep what is new for other processes."""
        if self._pages is not None and self._new and not self.reason:
            self._pages.write(self._new)
            self._new = []

    def _known_structure(self, structure: Any) -> Any:
        """One object for equal structures."""
        known = self._structures.get(structure)
        if known is None:
            known = self._structures[structure] = structure
            self._described[describe(structure)] = structure
        return known

    def known(self, indices: Sequence[Any]) -> list[Sample | None]:
        """Of which samples of a batch nothing is to be loaded, as far as can be foreseen."""
        if self.reason:
            return [None] * len(indices)
        found = [self.get(index) for index in indices]
        for leaf, foresee in self._current():
            places = [place for place, sample in enumerate(found) if sample is not None]
            rows = [self._row(indices[place], found[place], leaf) for place in places]
            if not rows or None in rows or len({row.kind for row in rows if row is not None}) > 1:
                continue
            there = foresee([stack_rows(rows)])  # type: ignore[arg-type]
            if there is not None:
                for place, hit in zip(places, there, strict=True):
                    if not hit:
                        found[place] = None
        return found

    def _current(self) -> list[tuple[int, Foresee]]:
        """How to foresee what regions find that were called of late."""
        return [
            (leaf, foresee)
            for routes in list(self._routes.values())
            for leaf, (foresee, passed) in routes.items()
            if self._passed - passed < LATE
        ]

    def _row(self, index: Any, sample: Sample | None, leaf: int) -> Row | None:
        kinds = sample.kinds if sample is not None else []
        if sample is None or leaf >= len(kinds):
            return None
        return Row(self, index, leaf, kinds[leaf], sample.digests[16 * leaf : 16 * leaf + 16])

    def learn(self, owner: Any, leaf: int, foresee: Foresee) -> None:
        """Note that a region looks rows of ``leaf`` up, and how to tell whether it will find them."""
        self._routes.setdefault(owner, {})[leaf] = foresee, self._passed

    def load(self, rows: Sequence[Row], *, foreign: bool) -> None:
        """Load rows that were left out and are used all the same."""
        self.loaded += len({row.index for row in rows})
        if foreign:
            self._foreign.update(row.leaf for row in rows)
        before = {row.index: row.digest for row in rows}
        if not load_rows(rows, self._fetcher, self._load):
            changed = next(row.index for row in rows if row.digest != before[row.index])
            self._changed(changed)

    def passed(self) -> None:
        """Note that a batch was used up."""
        self._passed += 1
        for leaf in self._foreign | set(self._streak):
            self._streak[leaf] = self._streak.get(leaf, 0) + 1 if leaf in self._foreign else 0
            if self._streak[leaf] >= READ_OFTEN:
                self.refuse(
                    "what comes of them is read by other code than cached models in every batch: let the data set do "
                    "what is done with a batch before a cached model, or take PyTorch's own loader"
                )
                break
        self._foreign.clear()

    def _check(self) -> None:
        """Load some samples again, and compare."""
        known = [index for index, sample in enumerate(self._by_number) if sample is not None]
        known += list(self._by_name)
        unknown = not self._described  # structures, which only samples themselves show
        wanted = min(len(known), max(FEWEST_CHECKED, int(self._share * len(known)))) if self._share or unknown else 0
        if self._checks:
            since, cost = time.perf_counter() - self._checked_at, self._spent / self._checks
            wanted = min(wanted, int(MOST_TIME * since / cost))
        if wanted <= 0:
            return
        start = time.perf_counter()
        indices = _random.sample(known, wanted)
        for index, fresh in zip(indices, self._load(indices), strict=True):
            sample = take_sample(fresh, self.digest, self._fetcher.collated)[0]
            self._known_structure(sample.structure)
            old = self.get(index)
            if old is None or sample._replace(values=old.values) != old or not same_values(sample.values, old.values):
                self._changed(index)
                break
        self._checked_at = time.perf_counter()
        self._spent += self._checked_at - start
        self._checks += wanted
        self.loaded += wanted

    def _changed(self, index: Any) -> None:
        logger.warning(
            "sample %r of %s is not what it was when it was loaded first: a file, a transform or a label changed; "
            "all samples are loaded again",
            index,
            self.name,
        )
        if self._pages is not None and self._options is not None:
            self._pages.remove()
            self._pages = Pages(self._identity, f"samples of {self.name}", self._options)
        self._forget()

    def _keep(self, index: Any, sample: Sample) -> None:
        if type(index) is not int or index < 0 or index > 2 * len(self._by_number) + 1_000_000:
            self._by_name[index] = sample
            return
        if index >= len(self._by_number):
            self._by_number.extend([None] * (index + 1 - len(self._by_number)))
        self._by_number[index] = sample

    def _forget(self) -> None:
        self._by_number, self._by_name, self._new = [], {}, []
        self.forgotten += 1
