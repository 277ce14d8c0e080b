"""What is remembered of a data set's samples, whether it is still true, and which of them need not be loaded."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchcache.digest.cpu import digest_bytes
from torchcache.lazy.rows import Foresee, Row
from torchcache.lazy.use import register, stack_rows
from torchcache.loading.by_index import Block, ByIndex
from torchcache.loading.fetch import Arrived, ChangedError, Fetcher, Learnt, Task, load_rows
from torchcache.loading.pages import SAMPLES, Pages
from torchcache.loading.reader import Reader, Surroundings
from torchcache.loading.samples import Sample, alike, differ, name_of, places
from torchcache.loading.subject import Subject
from torchcache.loading.together import is_simple, rows_of
from torchcache.loading.uses import Uses
from torchcache.logging import logger, warn_once
from torchcache.options import CacheOptions

# Samples that take less to load, in seconds, are not worth remembering.
CHEAP = 20e-6
# After so many changes in a row, of samples or of what the data set's code reads, nothing is remembered any more.
RESTLESS = 3
# Nothing is left out before so many samples were loaded again and were the same; so many are in later passes.
ENOUGH = 8
# The share of the time that loading samples again may take.
MOST_TIME = 0.02
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
        How often all that was remembered was dropped since it may be wrong.
    copied : bool
        Whether workers that persist have a copy of the data set: what changes from here on does not change in theirs.
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
        self.copied = False
        self.forgotten = 0
        self.fetcher, self.reader, self._share = fetcher, reader, share
        self._subject, self._options = Subject(fetcher.dataset, name), options
        self._pages: Pages | None = None
        self._identity = b""
        self._new: list[tuple[Any, Sample]] = []
        self._samples = ByIndex()
        self.uses = Uses()
        # A device computes other digests: what goes there is known by these from the first epoch on.
        self._has_device = torch.accelerator.is_available()
        self._given = self._since = self._agreed = 0
        self._alone = False
        # Whether this pass has compared no samples yet: a process that trains alone does not before it believes them.
        self._unchecked = True
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
    def at_once(self) -> bool:
        """Whether the data set loads a batch at once."""
        return self._subject.at_once

    @property
    def leaves_out(self) -> bool:
        """Whether a batch can be expected that needs no worker."""
        return self.collated and not self.reason and bool(len(self._samples)) and self._believed()

    @property
    def name(self) -> str:
        """The data set's, for people."""
        return type(self.fetcher.dataset).__name__

    def __len__(self) -> int:
        return len(self._samples)

    def _identify(self) -> None:
        """See which data set it is, and what earlier processes kept of it."""
        if self._subject.problem:
            self.refuse(f"{self._subject.problem}: name the data set and all that it does with dataset_id=...")
        if self._options is None or self.reason:
            return
        kind = type(self.fetcher.dataset)
        who = self._subject.who + f" {kind.__module__}.{kind.__qualname__} {self.digest} {self.collated}".encode()
        self._identity = digest_bytes(who)
        self._pages = Pages(self._identity, f"samples of {self.name}", self._options)
        for index, sample in self._pages.read():
            self._samples.keep(index, sample)

    def refuse(self, reason: str, wrong: bool = False) -> None:
        """Load every sample in every epoch from here on. ``wrong`` says that what is remembered may be wrong."""
        if wrong and self._pages is not None:
            self._pages.remove()
        self._forget(wrong)
        self.reason = reason
        warn_once(f"samples of {self.name} are loaded in every epoch: {reason}")

    def leaves(self) -> list[tuple[str, str, str]]:
        """Where each leaf stands in a sample, what it is, and whether it is loaded in later epochs, with the reason."""
        structure = self._samples.structure
        told = []
        for place, kind, leaf in [] if structure is None else places(structure):
            if self.reason:
                how = f"loaded: {self.reason}"
            elif leaf is None:
                how = "not loaded: remembered as it is"
            else:
                how = self.uses.describe(leaf)
            told.append((place, kind, how))
        return told

    def begin(self) -> None:
        """Look whether what is remembered is still true, as a pass begins."""
        self.uses.ahead = False
        self._unchecked = True
        if self.reader.apart:  # workers begin under what the pass begins under; without them each batch has its own
            self._take_surroundings()
        if len(self._samples) and not self.reason and self.look(begins=True):
            self._renewed = 0
            self._check()

    def look(self, begins: bool = False) -> bool:
        """Whether what the data set's code reads is what it was; what is remembered is dropped otherwise."""
        changes = "" if self.reason else self._subject.changes(begins)
        if not changes:
            return not self.reason
        self._forget()
        self._renewed += 1
        if self.copied:
            why = "persistent workers have it as it was: make the loader anew for them to see it"
            self.refuse(f"what its code reads changed ({changes}), and {why}")
        elif self._renewed >= RESTLESS:
            why = "name the data set and all it does with dataset_id=... if its samples do not depend on that"
            self.refuse(f"what its code reads changed {RESTLESS} times ({changes}): {why}")
        else:
            self._identify()
        return False

    def _take_surroundings(self) -> None:
        before, now = self.reader.surroundings, Surroundings.now()
        self.reader.surroundings = now
        if before[:3] != now[:3]:
            self._forget()

    def make(self, task: Task) -> Arrived:
        """The batch of ``task``, made in this process."""
        return self.fetcher.make(task, self)

    def add(self, arrived: Arrived) -> None:
        """Take in what a batch brought: samples that were loaded, what was read, and what turned out to be wrong."""
        self.uses.read(arrived.read)
        if arrived.learnt is not None:
            self._learn(arrived.learnt)
        for index in arrived.changed[:1]:
            self._changed(index)

    def holds(self, task: Task) -> bool:
        """Whether the batch that was made of ``task`` is right by what is known now; counts its samples."""
        lacking = 0 if isinstance(task.known, Block) else task.known.count(None)
        stood = len(task.indices) - lacking
        self._given = len(task.indices)
        holds = not stood or task.forgotten == self.forgotten
        self.loaded += lacking if holds else len(task.indices)
        self.skipped += stood if holds else 0
        return holds

    def _learn(self, learnt: Learnt) -> None:
        if learnt.refused:
            self.refuse(learnt.refused, wrong=True)
        if self.reason:
            return
        self._seconds += learnt.seconds
        self._timed += len(learnt.samples)
        for index, sample in learnt.samples:
            sample = self._samples.with_known_structure(sample)
            old = self._samples.get(index)
            if old is not None and differ(old, sample):
                self._changed(index)
                old = None
            self._agreed += old is not None
            if self.reason:
                return
            if old is None:
                self._samples.keep(index, sample)
                if self._pages is not None:
                    self._new.append((index, sample))
        if len(self._new) >= SAMPLES:
            self.write()
        if self._timed >= 256 and self._seconds < CHEAP * self._timed:
            self._give_up("loading one takes no longer than to leave it out")
        elif learnt.samples and not any(sample.digests for _, sample in learnt.samples):
            self._give_up("there are no large tensors in it")
        elif self._samples.named > 1000 and self._samples.named > 2 * self._size():
            self.refuse("its sampler gives other indices in every epoch")

    def _give_up(self, reason: str) -> None:
        """Load every sample in every epoch, where nothing would be gained."""
        self._forget(wrong=False)
        self.reason = reason

    def _size(self) -> int:
        try:
            return len(self.fetcher.dataset)
        except Exception:  # the user's, and nobody asked for it
            return 1_000_000

    def write(self) -> None:
        """Keep what is new for other processes."""
        if self._pages is not None and self._new and not self.reason:
            self._pages.write(self._new)
            self._new = []

    def known(self, indices: Sequence[Any]) -> tuple[list[Sample | None] | Block, bool]:
        """Of which samples of a batch nothing is to be loaded, as far as can be foreseen; whether it is one of rows."""
        plain = set(map(type, indices)) == {int}
        if not plain and not self.reason and any(name_of(index) is None for index in indices):
            self.refuse(f"its sampler gives indices of class {type(indices[0]).__qualname__}")
        if not self.reason and self.at_once and type(indices) is not list:
            self.refuse(f"it loads batches at once, whose indices come as a {type(indices).__qualname__}")
        nothing: list[Sample | None] = [None] * len(indices)
        if self.reason or self.uses.ahead:
            return nothing, False
        if not self.reader.apart:  # its code runs here, now
            self._take_surroundings()
            if self.uses.batches and not self._subject.seems_to_hold() and not self.look():
                return nothing, self._has_device
        self._since += len(indices)
        endless = self._since > max(len(self._samples), ENOUGH)
        if endless or (self._unchecked and self._believed()):
            self._check()
        block = self._samples.block(indices) if plain and self.collated else None
        if block is not None and is_simple(block.structure) and self._believed() and self._stays(block):
            return block, True
        found = [self._samples.get(index) for index in indices]
        remembered = [one for one in found if one is not None]
        if not (remembered and self._believed()):
            return nothing, self._has_device
        if (self.collated or self.at_once) and not alike(remembered):  # PyTorch makes of them what it makes of them
            return nothing, False
        for leaf, foresee in self.uses.foreseen():
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

    def _stays(self, block: Block) -> bool:
        """Whether every region that will look rows of a block up will find all of them, as far as can be foreseen."""
        for leaf, foresee in self.uses.foreseen():
            if leaf < len(block.digests):
                there = foresee([rows_of(block, leaf, self)])
                if there is not None and not all(there):
                    return False
        return True

    def _row(self, index: Any, sample: Sample | None, leaf: int) -> Row | None:
        kinds = sample.kinds if sample is not None else []
        if sample is None or leaf >= len(kinds):
            return None
        return Row(self, index, leaf, kinds[leaf], sample.digests[16 * leaf : 16 * leaf + 16])

    def learn(self, owner: Any, leaf: int, foresee: Foresee) -> None:
        """Note that a region looks rows of ``leaf`` up, and how to tell whether it will find them."""
        self.uses.looked_up(owner, leaf, foresee)

    def load(self, rows: Sequence[Row], *, foreign: bool) -> None:
        """Load rows that were left out and are used all the same."""
        names = {name_of(row.index) for row in rows}
        self.loaded += len(names)
        self.uses.late(names)
        if foreign:
            self.uses.read(row.leaf for row in rows)
        try:
            changed = load_rows(rows, self.reader.samples)
        except ChangedError as error:
            self._changed(error.index)
            raise
        for index in changed[:1]:
            self._changed(index)

    def passed(self) -> None:
        """Note that a batch was used up."""
        if self.uses.taken(self._given):
            self.refuse(
                "what comes of them is read by other code than cached models in every batch: let the data set do what "
                "is done with a batch before a cached model, or take PyTorch's own loader"
            )

    def _believed(self) -> bool:
        """Whether enough samples were the same when they were loaded again, in passes like those before."""
        if self._agreed < min(ENOUGH, len(self._samples)):
            return False
        if self.at_once and not self._alone:  # it is asked for single ones when they are loaded late
            self._alone = True
            indices = self._samples.some(ENOUGH)
            if any(fresh is None or self._differs(index, fresh) for index, fresh in self._read_again(indices)):
                self.refuse(
                    "its __getitems__ gives a sample alone otherwise than in a batch, or not at all", wrong=True
                )
                return False
        return True

    def _check(self) -> None:
        """Load some samples again, and compare."""
        self._since = 0
        believed = self._believed()
        if not (len(self._samples) and (believed or self.reader.apart)):
            return
        self._unchecked = False
        count = len(self._samples)
        wanted = min(count, max(ENOUGH, int(self._share * count))) if self._share or not believed else 0
        if self._checks and believed:
            since, cost = time.perf_counter() - self._checked_at, self._spent / self._checks
            wanted = min(wanted, int(MOST_TIME * since / cost))
        if wanted <= 0:
            return
        start = time.perf_counter()
        for index, fresh in self._read_again(self._samples.some(wanted)):
            if fresh is None or self._differs(index, fresh):
                self._changed(index)
                break
            self._agreed += 1
        else:
            self._restless = 0
        self._checked_at = time.perf_counter()
        self._spent += self._checked_at - start
        self._checks += wanted
        self.loaded += wanted

    def _differs(self, index: Any, fresh: Sample) -> bool:
        fresh = self._samples.with_known_structure(fresh)
        old = self._samples.get(index)
        return old is None or differ(old, fresh)

    def _read_again(self, indices: Sequence[Any]) -> list[tuple[Any, Sample | None]]:
        """Samples as they are now; ``None`` where there is none that is understood."""
        try:
            return [(index, one) for index, (one, _) in zip(indices, self.reader.samples(indices), strict=True)]
        except Exception:  # where a sampler asks for it, the user gets to see why it cannot be loaded
            logger.debug("samples of %s could not be loaded again", self.name, exc_info=True)
            return [(index, None) for index in indices]

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
        self._restless += 1
        if self._restless >= RESTLESS:
            self.refuse(f"samples differed from what they were {RESTLESS} times")

    def _forget(self, wrong: bool = True) -> None:
        self._samples.clear()
        self._new, self._agreed = [], 0
        self._alone = False
        self.forgotten += wrong
