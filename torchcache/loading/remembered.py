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
from torchcache.loading.fetch import Arrived, Fetcher, Learnt, Task, load_rows
from torchcache.loading.pages import SAMPLES, Pages
from torchcache.loading.reader import Reader, Surroundings
from torchcache.loading.samples import Sample, alike, describe, differ, name_of, take_sample
from torchcache.logging import logger, warn_once
from torchcache.options import CacheOptions

__all__ = ["Remembered"]

# Samples that take less to load, in seconds, are not worth remembering.
CHEAP = 20e-6
# So many batches in a row of which something other than a region read a tensor: it is loaded from then on.
READ_OFTEN = 3
# After so many changes in a row, of samples or of what the data set's code reads, nothing is remembered any more.
RESTLESS = 3
# So many batches in a row that were read when it was too late to load them ahead: the rest of the pass is.
READ_LATE = 8
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
    reader : Reader
        Loads samples at once, from where this process may.
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
        reader: Reader,
        name: str | None,
        share: float,
        options: CacheOptions | None = None,
    ) -> None:
        self.digest = fetcher.digest
        self.number = next(_numbers)
        self.loaded = self.skipped = 0
        self.reason = ""
        self.forgotten = 0
        self.fetcher, self.reader, self._share = fetcher, reader, share
        self._name, self._options = name, options
        self._program: Program | None = None
        self._state = State()
        self._pages: Pages | None = None
        self._identity = self._who = b""
        self._new: list[tuple[Any, Sample]] = []
        # Structures by their texts, which is what pages have of them.
        self._described: dict[str, Any] = {}
        self._by_number: list[Sample | None] = []
        self._by_name: dict[Any, tuple[Any, Sample]] = {}
        self._structures: dict[Any, Any] = {}
        self._routes: weakref.WeakKeyDictionary[Any, dict[int, tuple[Foresee, int]]] = weakref.WeakKeyDictionary()
        self._passed = 0
        self._foreign: set[int] = set()
        self._streak: dict[int, int] = {}
        self._late: set[Any] = set()
        self._given, self._late_streak, self._ahead = 0, 0, False
        self._renewed = self._restless = 0
        self._seconds, self._timed = 0.0, 0
        self._checked_at = time.perf_counter()
        self._spent = 0.0
        self._checks = 0
        register(self.number, self)
        self._identify()

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """What makes batches of samples."""
        return self.fetcher.collate

    @property
    def collated(self) -> bool:
        """Whether PyTorch does."""
        return self.fetcher.collated

    @property
    def name(self) -> str:
        """The data set's, for people."""
        return type(self.fetcher.dataset).__name__

    def __len__(self) -> int:
        return len(self._by_name) + sum(sample is not None for sample in self._by_number)

    def _identify(self) -> None:
        """See which data set it is, and what earlier processes kept of it."""
        self._who = self._read_program() if self._name is None else self._name.encode()
        if self._options is None or self.reason:
            return
        kind = type(self.fetcher.dataset)
        who = self._who + f" {kind.__module__}.{kind.__qualname__} {self.digest} {self.collated}".encode()
        self._identity = digest_bytes(who)
        self._pages = Pages(self._identity, f"samples of {self.name}", self._options)
        for index, sample in self._pages.read():
            self._keep(index, sample)

    def _read_program(self) -> bytes:
        self._program = Program(self.fetcher.dataset.__getitem__, "the data set")
        if self._program.problem:
            self.refuse(f"{self._program.problem}: name the data set and all that it does with dataset_id=...")
            return b""
        return self._program.digest + self._state.update(self._program.tensors)

    def refuse(self, reason: str) -> None:
        """Load every sample in every epoch from here on."""
        self._forget()
        self.reason = reason
        warn_once(f"samples of {self.name} are loaded in every epoch: {reason}")

    def begin(self) -> None:
        """Look whether what is remembered is still true, as a pass begins."""
        self._ahead = False
        if not len(self):
            self.reader.surroundings = Surroundings.now()
        elif not self.reason and self.look():
            self._renewed = 0
            self._check()

    def look(self) -> bool:
        """Whether what the data set's code reads is what it was; what is remembered is dropped otherwise."""
        program, now = self._program, Surroundings.now()
        if now != self.reader.surroundings:
            self.reader.surroundings = now
            self._forget()
            return False
        if self.reason or program is None or (program.unchanged() and self._state.unchanged(program.tensors)):
            return not self.reason
        names = ", ".join(name for name in program.changes()[:3] if name) or "its tensors"
        if self._read_program() == self._who:
            return True
        self._forget()
        self._renewed += 1
        if self._renewed >= RESTLESS:
            self.refuse(
                f"what its code reads changed {RESTLESS} times ({names}): name the data set and all that it does with "
                "dataset_id=... if its samples do not depend on that"
            )
        elif not self.reason:
            self._identify()
        return False

    def get(self, index: Any) -> Sample | None:
        """What is remembered of a sample."""
        if type(index) is int and 0 <= index < len(self._by_number):
            found = self._by_number[index]
        else:
            _, found = self._by_name.get(name_of(index), (None, None))
        if found is None or isinstance(found.structure, tuple):
            return found
        known = self._described.get(found.structure)
        if known is None:
            return None
        found = found._replace(structure=known)
        self._keep(index, found)
        return found

    def make(self, task: Task) -> Arrived:
        """The batch of ``task``, made in this process."""
        return self.fetcher.make(task, self)

    def add(self, arrived: Arrived) -> None:
        """Take in what a batch brought: samples that were loaded, what was read, and what turned out to be wrong."""
        self._foreign |= arrived.read
        if arrived.learnt is not None:
            self._learn(arrived.learnt)
        for index in arrived.changed[:1]:
            self._changed(index)

    def holds(self, task: Task) -> bool:
        """Whether the batch that was made of ``task`` is right by what is known now; counts its samples."""
        lacking = sum(sample is None for sample in task.known)
        stood = len(task.indices) - lacking
        self._given = len(task.indices)
        holds = not stood or task.forgotten == self.forgotten
        self.loaded += lacking if holds else len(task.indices)
        self.skipped += stood if holds else 0
        return holds

    def _learn(self, learnt: Learnt) -> None:
        if learnt.refused:
            self.refuse(learnt.refused)
        if self.reason:
            return
        self._seconds += learnt.seconds
        self._timed += len(learnt.samples)
        for index, sample in learnt.samples:
            sample = sample._replace(structure=self._known_structure(sample.structure))
            old = self.get(index)
            if old is not None and differ(old, sample):
                self._changed(index)
            if self.reason:
                return
            if old is None or self._pages is None:
                self._keep(index, sample)
            if old is None and self._pages is not None:
                self._new.append((index, sample))
        if len(self._new) >= SAMPLES:
            self.write()
        if self._timed >= 256 and self._seconds < CHEAP * self._timed:
            self.give_up("loading one takes no longer than to leave it out")
        elif learnt.samples and not any(sample.digests for _, sample in learnt.samples):
            self.give_up("there are no large tensors in it")
        elif len(self._by_name) > 2 * self._size() + 1000:
            self.refuse("its sampler gives other indices in every epoch")

    def give_up(self, reason: str) -> None:
        """Load every sample in every epoch, where nothing would be gained."""
        self._forget()
        self.reason = reason

    def _size(self) -> int:
        try:
            return len(self.fetcher.dataset)
        except (TypeError, NotImplementedError):
            return 1_000_000

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

    def known(self, indices: Sequence[Any]) -> tuple[list[Sample | None], bool]:
        """Of which samples of a batch nothing is to be loaded, as far as can be foreseen; whether any is remembered."""
        if not self.reason and any(name_of(index) is None for index in indices):
            self.refuse(f"its sampler gives indices of class {type(indices[0]).__qualname__}")
        nothing: list[Sample | None] = [None] * len(indices)
        if self.reason or self._ahead:
            return nothing, False
        if not self.reader.workers.processes and self._passed and not self.look():  # its code runs here, now
            return nothing, False
        found = [self.get(index) for index in indices]
        remembered = [one for one in found if one is not None]
        if not remembered or (hasattr(self.fetcher.dataset, "__getitems__") and not alike(remembered)):
            return nothing, False
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
        return found, True

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
        names = {name_of(row.index) for row in rows}
        self.loaded += len(names)
        self._late |= names
        if foreign:
            self._foreign.update(row.leaf for row in rows)
        for index in load_rows(rows, self.fetcher, self.reader.samples)[:1]:
            self._changed(index)

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
        # A model that is not cached any more reads in every batch too; it may be cached again in the next pass.
        self._late_streak = self._late_streak + 1 if 2 * len(self._late) > self._given else 0
        self._ahead = self._ahead or self._late_streak >= READ_LATE
        self._foreign.clear()
        self._late.clear()

    def _check(self) -> None:
        """Load some samples again, and compare."""
        known = [index for index, sample in enumerate(self._by_number) if sample is not None]
        known += [index for index, _ in self._by_name.values()]
        unknown = not self._described  # structures, which only samples themselves show
        wanted = min(len(known), max(FEWEST_CHECKED, int(self._share * len(known)))) if self._share or unknown else 0
        if self._checks:
            since, cost = time.perf_counter() - self._checked_at, self._spent / self._checks
            wanted = min(wanted, int(MOST_TIME * since / cost))
        if wanted <= 0:
            return
        start = time.perf_counter()
        indices = _random.sample(known, wanted)
        for index, fresh in zip(indices, self._read_again(indices), strict=True):
            if fresh is not None:
                self._known_structure(fresh.structure)
            old = self.get(index)
            if fresh is None or old is None or differ(old, fresh):
                self._changed(index)
                break
        else:
            self._restless = 0
        self._checked_at = time.perf_counter()
        self._spent += self._checked_at - start
        self._checks += wanted
        self.loaded += wanted

    def _read_again(self, indices: Sequence[Any]) -> Sequence[Sample | None]:
        """Samples as they are now; ``None`` where there is none that is understood."""
        try:
            samples = self.reader.samples(indices)
            return [take_sample(sample, self.digest, self.collated)[0] for sample in samples]
        except Exception:  # where a sampler asks for it, the user gets to see why it cannot be loaded
            logger.debug("samples of %s could not be loaded again", self.name, exc_info=True)
            return [None] * len(indices)

    def _changed(self, index: Any) -> None:
        logger.warning(
            "sample %r of %s is not what it was when it was loaded first: a file, a transform or a label changed; "
            "all samples are loaded anew",
            index,
            self.name,
        )
        if self._pages is not None and self._options is not None:
            self._pages.remove()
            self._pages = Pages(self._identity, f"samples of {self.name}", self._options)
        self._forget()
        self._restless += 1
        if self._restless >= RESTLESS:
            self.refuse(f"samples differed from what they were {RESTLESS} times")

    def _keep(self, index: Any, sample: Sample) -> None:
        if type(index) is not int or index < 0 or index > 2 * len(self._by_number) + 1_000_000:
            self._by_name[name_of(index)] = index, sample
            return
        if index >= len(self._by_number):
            self._by_number.extend([None] * (index + 1 - len(self._by_number)))
        self._by_number[index] = sample

    def _forget(self) -> None:
        self._by_number, self._by_name, self._new = [], {}, []
        self.forgotten += 1
