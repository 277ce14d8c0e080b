"""The one way through a marked call: hash, split, call the original, merge; or compute it, with a reason."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchcache import dynamo
from torchcache.batch import Batch, Given, Subject, lacks, number_named, take
from torchcache.checks.alarm import ANOTHER, DEFERRED, MIXED, STALE, Alarm, Recomputation, inspect
from torchcache.checks.audit import Schedule, choose
from torchcache.checks.chance import generators_kept
from torchcache.checks.learning import Learning
from torchcache.checks.novelty import Novelty
from torchcache.checks.plan import CHANGED, OTHERWISE, Plan
from torchcache.checks.rest import Rest
from torchcache.checks.roles import select
from torchcache.checks.stored import keep
from torchcache.checks.undone import undone
from torchcache.context import ASKED, bypassed, current_explainer, current_ids, current_watcher, normal_tensors
from torchcache.counters import Counters, History, Reasons
from torchcache.digest.ahead import learn, prepared
from torchcache.digest.rows import Early
from torchcache.errors import (
    NEEDED,
    Bypass,
    Restless,
    RowwiseError,
    TorchcacheError,
    Trains,
    Unreadable,
    Writes,
    described,
)
from torchcache.foresight import Foresight
from torchcache.identity.key import call_fingerprint, layout_fingerprint
from torchcache.identity.numeric import NumericMode
from torchcache.identity.turnover import Turnover
from torchcache.lazy.tensor import LazyTensor
from torchcache.lazy.use import tell, unloaded_rows
from torchcache.logging import logger, warn_once
from torchcache.looked import Looked
from torchcache.options import CacheOptions
from torchcache.padding import Padding
from torchcache.store.found import Found
from torchcache.store.select import select_rows
from torchcache.store.tiers import Tiers
from torchcache.trainable import FREEZE, goes_by_parts, trained
from torchcache.usefulness import Usefulness
from torchcache.values.merge import assemble
from torchcache.values.take import Taken, take_outputs

Tensors = list[torch.Tensor]

# So many times stored rows were found to be wrong before a region is given up.
MOST_ALARMS = 3


class Region:
    """What one lookup replaces: a marked function or method, or a part that was cut out of a graph.

    Parameters
    ----------
    subject : Subject
        What it stands for.
    options : CacheOptions
        The mark's options.
    mark : Region or None
        That of the whole mark, of which this is a part that was cut out of a graph.

    Attributes
    ----------
    reasons : Reasons
        Why rows were computed and not stored, and how many.
    writes : bool
        Whether the original was seen to write more than its output: graphs do not hold it as one call then.
    inlined : bool
        Whether a call of it is a part of a compiled graph, where calls are not counted.
    apart : str
        Why a call of it cannot be a node of a graph; empty where it can.
    traces : int
        How often a call in a graph returned another form of output than it did when it was traced.
    partial : bool
        Whether its frozen part is looked up, whatever the mode, or it is such a part: what no user chose ends no run.
    rest : Rest
        While it lasts, calls are computed without a look.
    turnover : Turnover
        The identities that its calls had.
    partly : callable or None
        Called in place of a lookup where the original trains: with the call, and why it is not looked up as a whole.
    """

    def __init__(self, subject: Subject, options: CacheOptions, mark: Region | None = None) -> None:
        self.subject = subject
        self.options = options
        self.tiers = Tiers(options, subject.name)
        self.counters = Counters()
        self.family: list[Counters] = mark.family if mark is not None else []
        self.family.append(self.counters)
        self.history, self.reasons = History(), Reasons()
        self.schedule = Schedule(options.audit, functools.partial(lacks, subject))
        self._learning = Learning(subject, options)
        self._early = Early(options.digest)
        self.turnover = Turnover(subject)
        self._novelty = Novelty()
        self._usefulness = Usefulness(self, self.turnover, self._novelty)
        self.writes, self.inlined, self.partial, self.apart, self.traces = False, False, False, "", 0
        self.partly: Callable[[Given, Trains], Any] | None = None
        self.rest = Rest()
        self._padding = Padding(subject, options) if options.padding is not None else None

    @property
    def name(self) -> str:
        """Module path and class."""
        return self.subject.name

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the original returns for these arguments.

        Raises
        ------
        TorchcacheError
            For what can never be cached, at a call before any was served.
        """
        given = Given(self.subject, args, kwargs, number_named(self, args, kwargs))
        return self._ordinary(given) if self._padding is None else self._answered(given, self._without_padding)

    def _ordinary(self, given: Given) -> Any:
        """A call in which all of a row counts."""
        if (explainer := current_explainer()) is not None:
            return explainer(self, given)
        if self.counters.calls >= self._usefulness.next_look:
            self._usefulness.look(self.name)
        return self._answered(given, self._cached)

    def _without_padding(self, given: Given) -> Any:
        """A call of which only the real positions of its rows count."""
        assert self._padding is not None
        self._check()
        return self._padding(given, self._ordinary)

    def _answered(self, given: Given, answer: Callable[[Given], Any]) -> Any:
        """What ``answer`` returns for a call; computed as a whole where it cannot tell."""
        try:
            return answer(given)
        except Bypass as bypass:
            why, resting = bypass, bypass is self.rest.reason
            if isinstance(bypass, Restless):
                self.writes = isinstance(bypass, Writes) and not bypass.quiet  # else it may be setting itself up
                if not (bypass.quiet or resting):
                    self.rest.begin(bypass)
            elif isinstance(bypass, Unreadable) and not resting:
                self.rest.begin_after_some(bypass)
        except TorchcacheError as error:
            if not (self.counters.calls or self.partial):
                raise
            why = Bypass(str(error).removeprefix(f"{self.name} cannot be cached: "))
        except Exception as error:
            if error is given.error:  # the original failed on the caller's own arguments
                given.release()
                raise
            logger.debug("the lookup of %s failed", self.name, exc_info=True)
            why = Bypass(f"its lookup failed ({described(error)})", "please report it")
        # What the original raises from here on is the user's own, and no error of ours is its context.
        why.__traceback__ = None  # it holds this frame, which holds it
        if isinstance(why, Trains) and self.partly is not None:
            return self.partly(given, why)
        return self.compute(given, why)

    def compute(self, given: Given, bypass: Bypass) -> Any:
        """The original on the whole batch, not stored; counted, and said the first time, unless it fails."""
        # It may be kept to be raised again, and is not to keep the arguments of every call meanwhile.
        bypass.__traceback__ = bypass.__context__ = bypass.__cause__ = None
        try:
            outputs = given.run()
        finally:
            given.release()
        self.count(given, bypass)
        return outputs

    def count(self, given: Given, bypass: Bypass) -> None:
        """Count a call that is computed and not stored, and say so the first time."""
        self.counters.count_bypass(given.rows)
        if self.subject.deferred is not None:
            self.subject.deferred.note(True)
        self.note(bypass, given.rows)

    def note(self, bypass: Bypass, rows: int = 0) -> None:
        """Note why ``rows``, or some that nobody counts, are computed and not stored, and say so the first time."""
        if self.reasons.note(bypass.reason, rows) and not bypass.quiet:
            which = "" if self.family[0] is self.counters else "a part of "
            warn_once(f"{which}{self.name} is computed, not cached: {bypass}")

    def _cached(self, given: Given) -> Any:
        batch = self._take(given)
        try:
            plan = self._learning.plan(batch, self.tiers)
            self._novelty.note(self.name, batch, plan.learnt.rows)
            return self._look_up(batch, plan, *self._hash(batch, plan))
        except RowwiseError as error:
            self._learning.refuse(batch, str(error))
            raise

    def examine(self, given: Given) -> tuple[Batch, Plan]:
        """The call taken apart, and what is known of calls like it; nothing is looked up. Raises as a call does."""
        return (batch := self._take(given)), self._learning.plan(batch, self.tiers)

    def _check(self) -> None:
        if bypassed():
            raise Bypass(ASKED, quiet=True)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise Bypass("a CUDA graph is being captured", "capture what follows the mark", lasting=False)
        self.rest.check()

    def _take(self, given: Given) -> Batch:
        """The call taken apart, and who computes it."""
        self._check()
        tensors = (taken := take(given)).tensors
        if not tensors:
            raise Bypass("no argument is a tensor", "mark a part that takes tensors")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise Bypass(*NEEDED)
        if dynamo.keeps_parametrized(self.subject.module):
            raise Bypass("parametrize.cached() is in force, which keeps weights that may change", "", lasting=False)
        started = self._early.start(taken.key, tensors)
        seen = given.seen or self.subject.identity.look()
        unsteady = self.partly is not None and self.turnover.unsteady
        if goes_by_parts(seen.tensors, partial=self.partial, unsteady=unsteady):
            raise Trains(lambda: f"it trains {trained(self.subject.module)}", FREEZE)
        who = seen.who or self.subject.identity.current(seen)
        for gone in self.turnover.note(who, self.counters.hits):
            self._learning.forget(gone)
            self.tiers.drop_state(gone)
        self.turnover.check()
        gradients = given.gradients if who in self._learning.modal else None
        return Batch(given, taken, who, NumericMode.current(tensors[0].device.type, gradients), started)

    def _hash(self, batch: Batch, plan: Plan) -> tuple[bytes, list[bytes], Found | None]:
        """What the rows are filed under, their digests, and what was found for them ahead."""
        start = time.perf_counter()
        named = 0 if self.inlined else batch.given.number
        call = call_fingerprint(plan.form, self.options, batch.mode, batch.rows, batch.shared, named)
        key = layout_fingerprint(call, plan.layout)
        found, digests = None, current_ids(batch.count, self.name) if named else None
        if digests is None:
            digests = self._early.digests(batch.taken.key, batch.taken.tensors, batch.rows, batch.started)
            tell(self, batch.rows, lambda: Foresight(self, batch, plan).hits)
            if self.tiers.beneath:
                found = prepared(self)
                learn(self, batch.rows, lambda: Foresight(self, batch, plan).bring)
        self.counters.hash_seconds += time.perf_counter() - start
        return key, digests, found

    def _look_up(self, batch: Batch, plan: Plan, key: bytes, digests: list[bytes], ahead: Found | None) -> Any:
        if plan.alone is not True and batch.count == 1:
            plan.check_alone(lambda: self._original(batch, plan, [0]), batch)
        start = time.perf_counter()
        with normal_tensors():
            near = plan.place(batch.rows[0].device)
            found = self.tiers.find(key, digests, plan.precision.stored, batch.who, near, ahead)
        missing = found.missing(digests)
        if beneath := found.from_beneath:
            self.tiers.tell(batch.who)
        self.counters.lookup_seconds += time.perf_counter() - start
        if missing:
            who, before = batch.who, plan
            plan = self._learning.prove(batch, plan)
            if (batch.who, plan.layout) != (who, before.layout):
                self._doubt(batch, before, [row for row, digest in enumerate(digests) if digest not in missing])
                raise Bypass(CHANGED, lasting=False, quiet=True)
        computed = self._compute(batch, plan, key, missing)
        outputs, leaves = self._merge(batch, plan, digests, missing, found, computed)
        looked = Looked(
            digests,
            missing,
            found,
            leaves,
            lambda places: plan.rows_again(self._original(batch, plan, places), len(places)),
            plan.learnt.rounding,
            plan.precision.losses,
        )
        hits = batch.count - sum(map(missing.__contains__, digests)) if missing else batch.count
        first = (beneath or (plan.taken_over and hits)) and not (plan.believed or lacks(self.subject))
        beside = self.schedule.served(batch.who + batch.taken.key, b"".join(batch.shared), batch.count, hits)
        due = not batch.given.ran and self.schedule.due(batch.taken.key, batch.count)  # a probe looked at it already
        if first or beside is not None or due:
            alarm = self._audit(batch, plan, looked, bool(first), beside)
            if alarm is not None:
                self._react(batch, alarm)
                return batch.given.run()
        self._count(looked)
        keep(self.name, batch, plan, self.tiers, bool(missing))
        if type(batch.rows[0]) is LazyTensor:
            self.counters.unloaded += unloaded_rows(batch.rows[0])
        watcher = current_watcher()
        if watcher is not None:
            watcher(self, looked)
        return outputs

    def _count(self, looked: Looked) -> None:
        rows, found = len(looked.digests), looked.found
        if rows != self._usefulness.rows:
            self._usefulness.note_rows(rows)
        self.counters.count(rows, len(looked.missing), len(found.from_disk), len(found.from_others))
        self.history.note(self.counters, self.tiers.memory.used, self.tiers.beneath.disk_bytes)

    def _compute(self, batch: Batch, plan: Plan, key: bytes, missing: dict[bytes, int]) -> Tensors:
        """The rows that are missing, computed and stored."""
        if not missing:
            return []
        start = time.perf_counter()
        places = list(missing.values())
        identity = self.subject.identity
        before = identity.steady()
        if identity.current() != batch.who:
            raise Bypass(CHANGED, lasting=False, quiet=True)
        if batch.given.ran or len(missing) == batch.count:
            output = take_outputs(batch.given.run())
        else:
            output = self._original(batch, plan, places)
        self.counters.compute_seconds += time.perf_counter() - start
        # Another thread may load weights meanwhile, and put them back.
        if identity.current() != batch.who or not before.holds(identity.look().tensors) or batch.overwritten():
            raise Bypass(CHANGED, lasting=False, quiet=True)
        if not plan.fits(output, batch.count if batch.given.ran else len(missing)):
            raise Bypass(*OTHERWISE, lasting=False)
        leaves = plan.rows_first(output)
        if leaves[0].shape[0] > 1:  # one row alone does not tell where the batch lies in memory
            plan.note(output)
        if leaves[0].shape[0] > len(missing):
            leaves = [select_rows(leaf, places) for leaf in leaves]
        self._learning.check(batch, plan, places, leaves)
        start = time.perf_counter()
        with normal_tensors(), torch.no_grad():
            self.tiers.keep(key, list(missing), leaves, plan.precision, batch.who)
        self.counters.merge_seconds += time.perf_counter() - start
        return leaves

    def _original(self, batch: Batch, plan: Plan, places: Sequence[int]) -> Taken:
        """What the original returns for rows of the batch; one is given twice, unless alone it is known to be alike."""
        twice = len(places) == 1 and plan.alone is not True
        rows = [select_rows(leaf, [*places] * 2 if twice else places) for leaf in batch.rows]
        with undone(self.subject, self.options), normal_tensors():
            output = take_outputs(batch.original(select(batch.taken.tensors, plan.learnt.rows, rows)))
        return plan.first_of_two(output) if twice else output

    def _merge(
        self,
        batch: Batch,
        plan: Plan,
        digests: list[bytes],
        missing: dict[bytes, int],
        found: Found,
        computed: Tensors,
    ) -> tuple[Any, Tensors]:
        """The outputs as the original gives them, and their leaves, rows first."""
        if batch.given.ran:
            outputs = batch.given.run()
            return outputs, plan.rows_first(take_outputs(outputs))
        start = time.perf_counter()
        with normal_tensors():
            layouts = plan.layouts(batch, lambda places: self._original(batch, plan, places))
            near, buffers = batch.rows[0].device, self.tiers.memory.buffers
            leaves = assemble(plan.precision, digests, missing, found, computed, layouts, near, buffers)
            merged = plan.laid(layouts, leaves, near, buffers)
        self.counters.merge_seconds += time.perf_counter() - start
        return plan.output.rebuild(merged), plan.rows_first_of(merged)

    def _audit(self, batch: Batch, plan: Plan, looked: Looked, first: bool, beside: int | None) -> Alarm | None:
        """Compute some of the rows again, or every hit; those from beneath memory before they are believed."""
        start = time.perf_counter()
        misses = list(looked.missing.values())
        hits = [row for row, digest in enumerate(looked.digests) if digest not in looked.missing]
        if first and beside is None:
            misses = []
            if not plan.taken_over:
                hits = [row for row in hits if looked.digests[row] in looked.found.from_beneath]
        early = self.schedule.early(batch.taken.key, batch.count)
        again = Recomputation(
            looked.outputs,
            batch.count,
            frozenset(misses),
            looked.compute,
            lambda: plan.rows_again(take_outputs(batch.given.run()), batch.count),
            plan.learnt.rounding,
            plan.precision.losses,
            self.counters,
        )
        with generators_kept(), normal_tensors(), torch.no_grad():
            alarm = inspect(again, choose(hits, misses, ends=early, beside=beside))
        plan.believed = plan.believed or (first and alarm is None)
        self.counters.audit_seconds += (seconds := time.perf_counter() - start)
        if beside is None:  # what is served first is looked at beyond the share
            self.schedule.note(batch.taken.key, batch.count, seconds)
        return alarm

    def _doubt(self, batch: Batch, plan: Plan, hits: Sequence[int]) -> None:
        """Rows were found by a plan of another process, and computed ones look otherwise: whether these would, too."""
        if plan.taken_over and hits and not plan.fits(self._original(batch, plan, hits), len(hits)):
            self._react(batch, ANOTHER)

    def _react(self, batch: Batch, alarm: Alarm) -> None:
        """Empty the region; a region whose rows depend on each other, or keep being wrong, is given up.

        Its keys do not tell what another process computes apart: rows are kept in memory only from here on.
        """
        self.counters.alarms += 1
        self.counters.count_bypass(batch.count)
        self.tiers = self.tiers.emptied(batch.who)
        self.schedule.forget()
        what = DEFERRED if self.subject.deferred is not None else STALE
        if not alarm.stale or self.counters.alarms >= MOST_ALARMS:
            what = MIXED
            self.rest.begin_for_good(Bypass("rows that were served differed from what the original gives", quiet=True))
        self.reasons["rows were found to be wrong when computed again"] += batch.count
        logger.warning("%s was cached wrongly and its rows are removed: %s: %s", self.name, alarm.found, what)
