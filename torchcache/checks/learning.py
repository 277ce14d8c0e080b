"""What is learnt of a region's calls before any is served: the form of each, and what its outputs look like."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator, Sequence

import torch

from torchcache.batch import Batch, Subject, lacks, take
from torchcache.checks.arguments import Arguments
from torchcache.checks.chance import Draws, check_again, generators_kept
from torchcache.checks.company import check_company
from torchcache.checks.gradients import Original, check_outputs, check_recorded, modes_agree
from torchcache.checks.patience import told_if_long
from torchcache.checks.plan import CHANGED, Form, Plan
from torchcache.checks.probe import Learnt, Unproven, learn, may_lie_elsewhere
from torchcache.checks.roles import Roles, rows_of, select
from torchcache.checks.said import check_said
from torchcache.checks.stored import stored, suffices
from torchcache.checks.undone import is_set_up
from torchcache.context import computing, normal_tensors
from torchcache.digest.cpu import digest_bytes
from torchcache.digest.rows import digest_tensor
from torchcache.errors import Bypass, RowwiseError, Writes
from torchcache.identity.containers import Difference, names_of
from torchcache.identity.content import content_digest
from torchcache.identity.key import call_fingerprint
from torchcache.identity.written import Written, written_text
from torchcache.options import CacheOptions
from torchcache.store.select import select_rows
from torchcache.store.tiers import Tiers
from torchcache.values.layout import lie_of
from torchcache.values.take import Taken, take_arguments, take_outputs

# A module may set itself up in its first calls; one that changes in so many keeps state.
SETUP_CALLS = 3
EMPTY = "the batch is empty"
# Forms and plans that are remembered.
MOST = 256


class Learning:
    """What is known of one region's calls.

    Parameters
    ----------
    subject : Subject
        What the region stands for.
    options : CacheOptions
        Its options.
    """

    def __init__(self, subject: Subject, options: CacheOptions) -> None:
        self._subject = subject
        self._options = options
        self._forms: dict[bytes, Form] = {}
        self._plans: dict[bytes, Plan] = {}
        self._stacked: set[bytes] = set()
        # Identities that compute other values where gradients are recorded.
        self.modal: set[bytes] = set()

    def plan(self, batch: Batch, tiers: Tiers) -> Plan:
        """The plan for ``batch``, whose rows are known then.

        Where the form is new the caller's batch is computed on the way, unless a tier beneath memory knows this
        identity: then a few of its rows are. What is not built yet computes nothing where another process did.

        Raises
        ------
        Bypass
            When such calls cannot be cached.
        RowwiseError
            When their rows depend on each other or on chance.
        """
        self._check_mode()
        self._read_lists(batch)
        form = self._form(batch)
        if form.roles is not None and self._assign(batch, form.roles):
            plan = self._plans.get(self._key(batch, form.roles))
            if plan is not None and (not lacks(self._subject) or suffices(plan, batch, self._options)):
                check_recorded(form, batch, form.roles)
                return plan
        first, dim = batch.taken.tensors[0], self._options.batch_dim
        if first.ndim > dim and not first.shape[dim]:
            raise Bypass(EMPTY, lasting=False, quiet=True)
        if lacks(self._subject):
            plan = self._taken_over(batch, form, tiers)
            if plan is not None:
                return plan
            batch.given.build()
            self._subject.identity.look()
            self._check_mode()
        try:
            if not tiers.knows(batch.who):
                whole = self._run_watched(batch, form)
                self._check_writes(batch, form)
                if batch.moved and not batch.wrote and self._subject.identity.current() == batch.who:
                    form.unsettled += 1
                    advice = "let neither its forward nor another thread write to its weights and buffers meanwhile"
                    raise Bypass(CHANGED, advice, lasting=False, quiet=form.unsettled < SETUP_CALLS)
                return self._learn_either(batch, form, whole)
            plan = self._recall(batch, form)
            return plan if plan is not None else self._learn_either(batch, form, None)
        except Bypass as bypass:
            form.refuse(batch, bypass)
            raise

    def prove(self, batch: Batch, plan: Plan) -> Plan:
        """``plan``, probed before rows of its shape are stored; raises as ``plan``."""
        if plan.proven:
            return plan
        batch.given.build()
        form = self._form(batch)
        try:
            proven = self._learn(batch, form, None)
        except Bypass as bypass:
            form.refuse(batch, bypass)
            raise
        proven.taken_over, proven.alone = plan.taken_over, plan.alone
        return proven

    def check(self, batch: Batch, plan: Plan, places: Sequence[int], computed: Sequence[torch.Tensor]) -> None:
        """Compare computed rows at ``places`` that are unlike all before, and refuse such calls where they differ."""
        try:
            check_company(self._subject.name, batch, plan, places, computed, self._options)
        except Bypass as bypass:
            self._form(batch).refuse(batch, bypass)
            raise

    def _taken_over(self, batch: Batch, form: Form, tiers: Tiers) -> Plan | None:
        """What another process learnt of such calls."""
        found = stored(batch, tiers)
        if found is None or not self._assign(batch, found.learnt.rows):
            return None
        if found.form != self._key(batch, found.learnt.rows):
            return None
        plan = self._plans[found.form] = found.plan(self._subject.name, self._options)
        form.roles, form.learnt = found.learnt.rows, found.learnt
        return plan

    def _recall(self, batch: Batch, form: Form) -> Plan | None:
        """A plan for rows of another shape than before, which a directory may hold: two rows show the layout.

        Rows are stored after a probe only, by whichever process, so finding them needs none.
        """
        learnt = form.learnt
        if learnt is None or form.roles is None or not batch.rows:
            return None
        rows = [select_rows(leaf, [0, batch.count - 1]) for leaf in batch.rows]
        with generators_kept(), normal_tensors(), torch.no_grad():
            output = take_outputs(batch.original(select(batch.taken.tensors, form.roles, rows)))
        dims = learnt.output_dims
        if len(output.tensors) != len(dims):
            return None
        if any(leaf.ndim <= dim or leaf.shape[dim] != 2 for leaf, dim in zip(output.tensors, dims, strict=True)):
            return None
        check_outputs(form, batch, output)
        return self._keep(batch, dataclasses.replace(learnt, alone=None), output, proven=False)

    def _keep(self, batch: Batch, learnt: Learnt, output: Taken, *, proven: bool) -> Plan:
        if len(self._plans) >= MOST:
            self._plans.clear()
        key = self._key(batch, learnt.rows)
        plan = self._plans[key] = Plan.of(key, learnt, output, self._subject.name, self._options, proven=proven)
        return plan

    def refuse(self, batch: Batch, why: str) -> None:
        """Refuse calls of this form as long as the identity that ``batch`` was looked at with computes them.

        Other rows, or fewer, may be such that a probe of them shows nothing.
        """
        self._form(batch).refused = (batch.who, why)

    def forget(self, who: bytes) -> None:
        """Drop what was learnt of an identity."""
        self.modal.discard(who)
        self._plans = {key: plan for key, plan in self._plans.items() if not key.startswith(who)}

    def _form(self, batch: Batch) -> Form:
        tensors = batch.taken.tensors
        key = batch.taken.key + bytes([tensor.ndim for tensor in tensors])  # one sample alone is another form
        form = self._forms.get(key)
        if form is None:
            if len(self._forms) >= MOST:
                self._forms.clear()
            form = self._forms[key] = Form()
        if form.refused is not None:
            if form.refused[0] == batch.who:
                why = form.refused[1]
                raise RowwiseError(why) if isinstance(why, str) else why
            form.refused = None
        return form

    def _assign(self, batch: Batch, roles: Roles) -> bool:
        """Divide the arguments into rows and shared ones; ``False`` where these cannot have the roles."""
        counts = {
            tensor.shape[dim] if tensor.ndim > dim else -1
            for tensor, dim in zip(batch.taken.tensors, roles, strict=True)
            if dim is not None
        }
        if len(counts) != 1 or -1 in counts:
            return False
        batch.rows = rows_of(batch.taken.tensors, roles)
        batch.lies = tuple(map(lie_of, batch.taken.tensors, roles))
        batch.shared = [
            self._digest(tensor) for tensor, dim in zip(batch.taken.tensors, roles, strict=True) if dim is None
        ]
        if not batch.count:
            raise Bypass(EMPTY, lasting=False, quiet=True)
        return True

    def _digest(self, shared: torch.Tensor) -> bytes:
        """Digest of an argument that all rows share, by the user's choice as that of rows is."""
        chosen = self._options.digest
        if chosen == "xxh3_128":
            return content_digest(shared)
        described = f"{shared.dtype} {tuple(shared.shape)}".encode()
        return digest_bytes(described + digest_tensor(shared, chosen), chosen)

    def _key(self, batch: Batch, roles: Roles) -> bytes:
        """Identity and all else that a proof holds for: not the contents of shared arguments, but their shapes.

        How arguments lie in memory is part of it, since code may ask for it and it decides how outputs lie.
        """
        shared = [tensor.shape for tensor, dim in zip(batch.taken.tensors, roles, strict=True) if dim is None]
        what = batch.taken.key + repr((roles, shared, batch.lies)).encode()
        return batch.who + call_fingerprint(what, self._options, batch.mode, batch.rows, (), 0)

    def _check_mode(self) -> None:
        if self._subject.identity.asks_for_inference and torch.is_inference_mode_enabled():
            raise Bypass("it asks whether inference mode is on", "call it under torch.no_grad()", lasting=False)

    def _read_lists(self, batch: Batch) -> None:
        """Take lists of tensors for batches where such calls were learnt so."""
        if self._stacked:
            taken = take(batch.given, stack_lists=True)
            if taken.key in self._stacked:
                batch.taken = taken

    def _learn_either(self, batch: Batch, form: Form, whole: Taken | None) -> Plan:
        """Learn with the arguments as they are; where that fails, with lists of tensors taken for batches."""
        try:
            return self._learn(batch, form, whole)
        except Writes:
            raise
        except (Bypass, RowwiseError) as failed:
            plain, stacked = batch.taken, take(batch.given, stack_lists=True)
            if stacked.key == plain.key:
                raise
            batch.taken = stacked
            try:
                plan = self._learn(batch, self._form(batch), whole)
            except (Bypass, RowwiseError) as again:
                batch.taken = plain
                early = isinstance(again, Bypass) and not again.lasting
                raise (again if early else failed) from None
        self._stacked.add(stacked.key)
        return plan

    def _learn(self, batch: Batch, form: Form, whole: Taken | None) -> Plan:
        names: list[str] = []
        steady = self._subject.identity.steady()
        try:
            told = told_if_long(self._subject.name)
            with told, generators_kept(), normal_tensors(), torch.no_grad(), self._noting(batch, names) as noted:
                learnt, output, agree = self._probe(batch, form, whole)
                if noted is not None and (found := noted.differences()) and all(one.grew for one in found):
                    noted.is_set_up = is_set_up(noted, batch, learnt.rows)
        except Unproven:
            form.keep_spare(batch)
            alike = "its rows are all alike so far, so that it cannot be told whether they depend on each other"
            raise Bypass(alike, lasting=False, quiet=True) from None
        except RowwiseError:
            if not names and (batch.moved or not steady.holds(self._subject.identity.look().tensors)):
                raise Bypass(CHANGED, lasting=False, quiet=True) from None
            if not names and may_lie_elsewhere(batch.taken.tensors, self._options.batch_dim):
                raise Bypass(
                    "its rows depend on each other, or do not lie along the first dimension of every argument",
                    "mark a part whose arguments have their rows first",
                ) from None
            if not names:
                raise
            raise self._writes(form, names) from None
        if learnt.alone is False:  # it tells nothing of other batches
            whole = None
        elif self._subject.identity.asks_for_gradients:  # seen in one mode
            learnt = dataclasses.replace(learnt, alone=None)
        self._settle(batch, form, names, learnt, whole)
        check_said(output, lambda: batch.original(batch.taken.tensors, gradients=False))
        if not (agree or modes_agree(batch, learnt, whole)):
            self.modal.add(batch.who)
            why = "where gradients are recorded it computes other values: each mode has rows of its own from now on"
            raise Bypass(why, lasting=False, quiet=True)
        form.roles, form.learnt, form.spare = learnt.rows, learnt, None
        self._assign(batch, learnt.rows)
        return self._keep(batch, learnt, output, proven=True)

    def _probe(self, batch: Batch, form: Form, whole: Taken | None) -> tuple[Learnt, Taken, bool]:
        """What the probe learns, and whether grad modes matter to nothing, as far as that is known then."""
        ask = self._subject.identity.asks_for_gradients and batch.who not in self.modal
        tensors, state, dim = batch.taken.tensors, self._subject.identity.look().tensors, self._options.batch_dim
        for both in (True, False) if ask else (False,):
            original = Original(batch, both)
            try:
                learnt, output = learn(
                    self._subject.name, tensors, whole, original, batch_dim=dim, spare=form.spare, state=state
                )
            except (Bypass, RowwiseError, Unproven):
                if not original.crossed:  # else it may be the other mode that differs
                    raise
            else:
                return learnt, output, original.crossed or not ask
        raise AssertionError("the last probe is in one mode")

    def _run_watched(self, batch: Batch, form: Form) -> Taken:
        """The original on the caller's own arguments: what it is given must stay as it is, and nothing be drawn."""
        with computing():
            batch.given.load()
        given = take_arguments(batch.given.args, batch.given.kwargs, self._subject.names)
        draws, arguments = Draws(), Arguments(given.tensors)
        identity = self._subject.identity
        steady = identity.steady()
        if identity.current() != batch.who:
            raise Bypass(CHANGED, lasting=False, quiet=True)
        written = Written(self._subject.module, identity.outside())
        outputs = batch.given.run()
        wrote = written.differences()
        batch.wrote = [] if self._options.pure else wrote
        identity.rewritten |= written.rewritten
        batch.moved = not steady.holds(identity.look().tensors)
        draws.check()
        if draws.unclear():
            self._check_draws(batch, form)
        taken = take_outputs(outputs)
        check_outputs(form, batch, taken)
        again = take_arguments(batch.given.args, batch.given.kwargs, self._subject.names)
        same = again.key == given.key and all(map(operator.is_, again.tensors, given.tensors))
        arguments.check(same=same)
        if not taken.tensors:
            raise Bypass("its output holds no tensor", "mark a part that returns tensors")
        return taken

    def _check_writes(self, batch: Batch, form: Form) -> None:
        """Refuse to learn of a call that wrote to parameters, or where nobody looks: a probe would do it again."""
        identity, module = self._subject.identity, self._subject.module
        if identity.current() != batch.who:
            parameters = dict(module.named_parameters()) if module is not None else {}
            seen = [name for name in names_of(batch.wrote) if name and name not in parameters]
            within = tuple(name + end for name in seen for end in ".[")
            written = [name for name in identity.changed if name not in seen and not name.startswith(within)]
            if written:
                raise self._writes(form, written)

    def _check_draws(self, batch: Batch, form: Form) -> None:
        """Refuse to learn of a call whose original drew random numbers, or may have while another thread did."""
        form.unsettled += 1
        often = form.unsettled & (form.unsettled - 1)  # it is run once more in a first call, and then ever less often
        with self._noting(batch, []):
            run = None if often else lambda: batch.original(batch.taken.tensors)
            check_again(run, quiet=form.unsettled < SETUP_CALLS)

    @contextlib.contextmanager
    def _noting(self, batch: Batch, names: list[str]) -> Iterator[Written | None]:
        """Add what a probe writes to ``names``, unless it sets something up, and put it back: nobody is to see it.

        It stays where nothing was learnt before, and the caller's call wrote nothing: it is set up for such rows now.
        """
        written = self._watch(batch.wrote)
        try:
            yield written
        finally:
            names += written.changes() if written is not None and not written.is_set_up else []
            if written is not None and (batch.wrote or not batch.given.ran or self._plans):
                written.restore()

    def _settle(self, batch: Batch, form: Form, names: list[str], learnt: Learnt, whole: Taken | None) -> None:
        """Go on with the identity after a first call, which may set a module up; another call must not change it."""
        identity = self._subject.identity
        who = identity.current()
        if not names and (who != batch.who or batch.moved):
            settled = Written(self._subject.module, identity.outside())
            tensors = batch.taken.tensors
            backwards = [select_rows(leaf, range(leaf.shape[0])[::-1]) for leaf in rows_of(tensors, learnt.rows)]
            with generators_kept():
                again = take_outputs(batch.original(select(tensors, learnt.rows, backwards)))
                names = identity.changes() or settled.changes()
                settled.restore()
                if identity.changes():  # what it keeps is to be of the caller's rows
                    batch.original(tensors)
            if names:
                identity.current()
            elif whole is not None and not _backwards(again, whole, learnt):
                raise Bypass(CHANGED, lasting=False, quiet=True)
        batch.who = who
        if not names:
            form.unsettled = 0
            return
        raise self._writes(form, names)

    def _watch(self, wrote: Sequence[Difference] = ()) -> Written | None:
        """What may be written, as it is, where it matters that it is written."""
        if self._options.pure:
            return None
        return Written(self._subject.module, self._subject.identity.outside(), wrote)

    def _writes(self, form: Form, names: list[str]) -> Writes:
        """Why a call that writes is computed; said where it is no setting up."""
        form.unsettled += 1
        return Writes(*written_text(names, self._subject.module), lasting=False, quiet=form.unsettled < SETUP_CALLS)


def _backwards(again: Taken, whole: Taken, learnt: Learnt) -> bool:
    """Whether ``again`` has the rows of ``whole`` from the last to the first."""
    pairs = zip(again.tensors, whole.tensors, learnt.output_dims, strict=False)
    turned = [(one.flip(dim), other) for one, other, dim in pairs]
    return again.key == whole.key and learnt.rounding.agree(*zip(*turned, strict=True))
