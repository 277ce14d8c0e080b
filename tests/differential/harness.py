"""Runs programs: every operation on a cached model and on its uncached twin, every answer compared."""

import collections
import contextlib
import copy
import dataclasses
import random
import shutil
import tempfile
from pathlib import Path

import nets
import pytest
import torch
import torch._dynamo.exc
from changes import CHANGES, apply
from nets import SETTINGS
from pair import COPIES, DiffersError, Pair, compare, kept_options
from structures import build, draw_spec, tensors_of, varied

import torchcache
from torchcache.errors import RowwiseError
from torchcache.store import pack, packs

# Forms of a call: what goes together is drawn together, so that keys that should differ meet.
FORMS = (
    ({"scale": 2.0}, {"scale": -1.0}),
    ({"flip": True}, {"flip": None}),
    ({"scale": 2, "flip": True}, {"scale": 2.0}),
    ({"inputs": "reshaped"},),
    ({"inputs": "reshaped"},),
    ({"inputs": "bfloat16"}, {"inputs": "bits"}),
    ({"inputs": "bfloat16"}, {"inputs": "bits"}),
    ({"inputs": "strided"}, {"inputs": "permuted"}),
    ({"inputs": "channels last"}, {"inputs": "broadcast"}),
    ({"inputs": "list"}, {"inputs": "tuple"}),
    ({"gradients": "no"}, {"gradients": "inference"}),
    ({"named": True},),
)
ROUGH = (torch.bfloat16, torch.float16)
ROUGH_SLACK = 3
BITS = {torch.bfloat16: torch.float16}
MOST_PAIRS = 3
CPU = torch.device("cpu")
TAGS = "skip_tensor_guards_with_matching_dict_tags"
# These rows are asked for after every change, so that what is stale is asked for.
SAME = [0, 1, 2]
AUTOCAST = (None, torch.bfloat16, torch.bfloat16, torch.float16)
SIZES = (0, *range(1, 10), *range(2, 10))


class WrongAnswerError(AssertionError):
    """The cached model gave another answer than its twin; says which program and step."""

    def __init__(self, program, step, reason):
        self.program = program
        super().__init__(f"wrong answer at step {step} of {program!r}: {reason}")


class FalseAlarmError(AssertionError):
    """Rows were taken for wrong that were right."""


class NoAnswerError(WrongAnswerError):
    """The cached model raised where its twin answered."""


class Run:
    """One program in progress.

    Parameters
    ----------
    program : Program
        What to run.
    directory : Path
        Where rows are kept, if they are.
    counts : collections.Counter
        What is counted: operations, calls, rows and their hits.
    device : torch.device
        Where models and inputs are. On another than the CPU there is no autocast; rows stay there in half the programs.
    """

    def __init__(self, program, directory, counts, pair=None, autocast=None, device=CPU):
        self.program = program
        self.directory = directory
        self.counts = counts
        self.autocast = autocast
        self.device = device
        self.pair = pair or Pair.build(program, directory)
        self.pairs = [self.pair]
        pool = nets.KINDS[program.net].pool(torch.Generator().manual_seed(program.seed))
        self.pool = [tensor.to(device) for tensor in pool]
        if device != CPU:
            for model in self.pair.both:
                model.to(device)
            for part in self.pair.marked() if program.seed % 2 else ():
                part.torchcache_memory_cache_device = None
        draw = random.Random(program.seed)
        self.forms = [{}, *(form for group in draw.sample(FORMS, 2) for form in group)]
        if program.net == "Shaped":
            zeros = program.door == "compile"  # Dynamo takes zeros of either sign for one
            (given, *others), (answer, *more) = _specs(draw, zeros), _specs(draw, zeros)
            shaped = [{"given": one, "answer": answer} for one in (given, *others)]
            shaped += [{"given": given, "answer": one} for one in more]  # one of both changes: the key must hold both
            self.forms = [*shaped, *({**form, **shaped[0]} for form in self.forms[1:])]

    def step(self, name, number):
        """Run one operation."""
        draw = random.Random(number)
        if name in CHANGES:
            apply(CHANGES[name], self.pair, number)
        else:
            getattr(self, f"_{name}")(draw)
        if name in CHANGES or name in ("settings", "mode", "autocast"):
            self.answer(self.forms[0], SAME, False)
        self.counts["operations"] += 1
        self.counts[f"operation {name}"] += 1

    def _call(self, draw, **ways):
        form = draw.choice([self.forms[0], *self.forms])
        rows = [draw.randrange(nets.POOL) for _ in range(draw.choice(SIZES))]
        overwrite = draw.random() < 0.3
        self.answer({**form, **ways}, rows, overwrite)
        if overwrite:
            self.answer(form, rows, False)

    def _every_form(self, draw):
        for form in self.forms:
            self.answer(form, SAME, False)

    def _bypass(self, draw):
        self._call(draw, bypass=True)

    def _train_step(self, draw):
        self._call(draw, gradients="step")

    def _input_gradient(self, draw):
        self._call(draw, gradients="input")

    def _autocast(self, draw):
        if self.device == CPU:
            self.autocast = draw.choice([dtype for dtype in AUTOCAST if dtype is not self.autocast])

    def _copy(self, draw):
        if draw.random() < 0.5:
            torchcache.flush()
        self.pair = self.pair.copied(self.program, COPIES[draw.choice(list(COPIES))])
        self.pairs.append(self.pair)
        if len(self.pairs) > MOST_PAIRS:
            self._count_rows(self.pairs.pop(0))

    def _switch(self, draw):
        self.pair = draw.choice(self.pairs)

    def _clear(self, draw):
        if draw.random() < 0.5:
            torchcache.flush()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _settings(self, draw):
        way = draw.randrange(4)
        if way == 0:
            SETTINGS["gain"] = draw.choice((1.0, 2.5, -2.0))
        elif way == 1:
            nets.OFFSET = draw.choice((0.0, 4.0))
        elif way == 2:
            nets.RAISE.__closure__[0].cell_contents = draw.choice((0.0, 2.0))
        else:
            nets.Net.turn = staticmethod(draw.choice(nets.TURNS))

    def _mode(self, draw):
        self.pair.set_mode(draw.random() < 0.5)

    def _mark_again(self, draw):
        if self.program.mark in ("class", "blocks"):
            return
        options = {"max_memory_cache_size": draw.choice((0, 400, 1_000_000)), "persistent": self.program.persistent}
        options["zstd_compression_level"] = draw.choice((1, None))
        options |= {"batch_dim": nets.KINDS[self.program.net].BATCH_DIM, **kept_options(self.program)}
        if self.program.persistent:
            options["persistent_cache_dir"] = str(self.directory)
        for part in self.pair.marked():
            if draw.random() < 0.5:
                torchcache.unmark(part)
            torchcache.mark(part, **options)

    def answer(self, form, rows, overwrite):
        """Call both models on the same rows in one form, and compare outputs and gradients."""
        pair = self.pair
        gradients = form.get("gradients", "yes")
        arguments = {key: form[key] for key in ("scale", "flip", "answer") if key in form}

        def run(model, ambient):
            inputs = self._batch(rows, form, gradients == "input")
            with contextlib.ExitStack() as stack:
                if gradients in ("no", "inference"):
                    stack.enter_context(torch.no_grad() if gradients == "no" else torch.inference_mode())
                if self.autocast is not None:
                    stack.enter_context(torch.autocast("cpu", dtype=self.autocast))
                for context in ambient:
                    stack.enter_context(context)
                outputs = model(*_given(inputs, form), **arguments)
            return outputs, self._gradients(pair, model, outputs, inputs, gradients), inputs

        try:
            expected, expected_gradients, _ = run(pair.twin, [])
        except (RuntimeError, IndexError, ValueError, AttributeError, TypeError):
            self.counts["calls that the model itself refuses"] += 1
            return
        ambient = [torchcache.bypass()] if form.get("bypass") else []
        if form.get("named"):
            ambient.append(torchcache.sample_keys(rows))
        try:
            found, found_gradients, inputs = run(pair.run, ambient)
        except RowwiseError:
            if arguments.get("flip", False) is not None:
                raise
            self.counts["calls refused"] += 1
            return
        except torch._dynamo.exc.TorchRuntimeError:
            if rows or self.program.door == "transform":
                raise
            # Attention takes no rows in one of torch's ways through it, and refuses them in the one that is compiled.
            self.counts["empty batches that torch does not trace"] += 1
            return
        rounded = self.autocast is not None or "cache_dtype" in kept_options(self.program)
        coarse = torch.bfloat16 if rounded else pair.twin.head.weight.dtype
        try:
            compare(found, expected, coarse)
            compare(found_gradients, expected_gradients, coarse, "gradients")
        except DiffersError:
            if coarse not in ROUGH:
                raise
            # Large inputs amplify rounding: how much, the twin's own error tells.
            slack = ROUGH_SLACK * self._error(pair.twin, self._batch(rows, form, False), form, arguments, expected)
            compare(found, expected, coarse, slack=slack)
        self.counts["calls compared"] += 1
        self.counts["rows compared"] += len(rows)
        self.counts["gradients compared"] += len(expected_gradients)
        if gradients == "step":
            self._train(pair)
        if overwrite:  # nothing that was given back or passed in may be what is stored
            with torch.no_grad(), torch.inference_mode(gradients == "inference"):
                for leaf in [*tensors_of(found), *inputs]:
                    leaf.detach().fill_(1)

    def _batch(self, rows, form, needs_gradient):
        how = form.get("inputs")
        shared = [tensor.shape[0] != nets.POOL for tensor in self.pool]
        batch = [tensor.clone() if alike else tensor[rows] for tensor, alike in zip(self.pool, shared, strict=True)]
        if how == "reshaped":
            batch = list(nets.KINDS[self.program.net].reshaped(*batch))
        elif how in ("bfloat16", "bits"):
            batch = [x.bfloat16() if x.is_floating_point() else x for x in batch]
            if how == "bits":
                batch = [x.view(BITS.get(x.dtype, x.dtype)) for x in batch]
        elif how == "strided":
            batch = [torch.stack([x, x], dim=-1)[..., 1] for x in batch]
        elif how == "permuted":
            batch = [x.mT.contiguous().mT if x.ndim > 2 else x for x in batch]
        elif how == "channels last":
            batch = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in batch]
        elif how == "broadcast":
            batch = [x[..., :1].expand(x.shape) if x.ndim > 2 else x for x in batch]
        batch = [*nets.KINDS[self.program.net].arranged(*batch)]
        if needs_gradient:
            batch = [x.requires_grad_() if x.is_floating_point() else x for x in batch]
        return batch

    def _error(self, twin, inputs, form, arguments, found):
        """The largest rounding error in what the twin answered: its distance from the answer in float64."""
        exact_twin = copy.deepcopy(twin).double()
        inputs = [x.double() if x.is_floating_point() else x for x in inputs]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            exact = exact_twin(*_given(inputs, form), **arguments)
        pairs = zip(tensors_of(found), tensors_of(exact), strict=True)
        return max((a.detach().double() - b.double()).abs().nan_to_num(0, 0, 0).max().item() for a, b in pairs)

    def _gradients(self, pair, model, outputs, inputs, gradients):
        if gradients not in ("step", "input"):
            return {}
        owner = pair.twin if model is pair.twin else pair.model
        for parameter in owner.parameters():  # what is a replica warns in zero_grad
            parameter.grad = None
        outputs[1].float().pow(2).mean().backward()
        found = {name: p.grad for name, p in owner.named_parameters()}
        found.update({f"input {index}": x.grad for index, x in enumerate(inputs)})
        # Compilers give zeros where autograd gives none.
        return {name: grad.clone() for name, grad in found.items() if grad is not None and grad.any()}

    def _train(self, pair):
        """One step of the twin's, given to both: rounding in their gradients must not add up."""
        with torch.no_grad():
            for p, q in zip(pair.model.parameters(), pair.twin.parameters(), strict=True):
                if q.requires_grad and q.grad is not None:
                    q.sub_(q.grad.clamp(-1, 1), alpha=0.1)
                    p.copy_(q)

    def _count_rows(self, pair):
        stats = torchcache.stats(pair.model)
        self.counts["rows hit"] += stats.hits
        self.counts["rows hit on disk"] += sum(region.disk_hits for region in stats.regions)
        self.counts["rows missed"] += stats.misses
        self.counts["rows bypassed"] += stats.bypasses
        if any(region.alarms for region in stats.regions):
            raise FalseAlarmError(f"false alarm in {self.program!r}")
        failed = [reason for region in stats.regions for reason in region.reasons if "its lookup failed" in reason]
        if failed:
            raise NoAnswerError(self.program, len(self.program.steps), failed[0])

    def close(self):
        """Count what the caches did."""
        for pair in self.pairs:
            self._count_rows(pair)
        torchcache.flush()


def _specs(draw, zeros):
    """Structures that are alike but for an order, a constant or a kind; with ``zeros`` none is negative."""
    spec = draw_spec(draw, 3)
    specs = spec, *(varied(draw, spec) for _ in range(3))
    return [*map(_unsigned, specs)] if zeros else specs


def _unsigned(spec):
    if len(spec) < 3:
        return ("constant", 0.0) if spec[0] == "constant" and repr(spec[1]) == "-0.0" else spec
    return (*spec[:2], tuple(map(_unsigned, spec[2])))


def _given(inputs, form):
    """The arguments of a call: its tensors as they are, in a structure, or as lists of rows."""
    if "given" in form:
        return (build(form["given"], inputs, inputs[0].shape),)
    if form.get("inputs") in ("list", "tuple"):
        return [list(x) if form["inputs"] == "list" else tuple(x) for x in inputs]
    return inputs


@contextlib.contextmanager
def small_packs():
    """A few rows make a pack, and a few of those a long one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "FEWEST", 2)
        for module in (pack, packs):
            patch.setattr(module, "LONGEST_PACK", 2000)
        patch.setattr(packs, "SHORT", 1800)
        yield


@contextlib.contextmanager
def clean():
    """Globals as they were before, no traces left over; Dynamo looks at hooks that come late."""
    torch._dynamo.reset()
    known = nets.world()
    asked = {"skip_nnmodule_hook_guards": False}
    # With this, torch 2.8 asks no guard of weights whose ``data`` was replaced.
    if hasattr(torch._dynamo.config, TAGS):
        asked[TAGS] = False
    try:
        with torch._dynamo.config.patch(asked), small_packs():
            yield
    finally:
        nets.set_world(known)


def execute(program, counts=None, after=None, device=CPU):
    """Run a program.

    Parameters
    ----------
    program : Program
        What to run.
    counts : collections.Counter, optional
        Where to count.
    after : callable, optional
        Called with the ``Run`` at its end, while its directory is there.
    device : torch.device, optional
        Where models and inputs are.

    Raises
    ------
    WrongAnswerError
        At the first answer that differs from the twin's, or that was not given; not where it does so without marks.
    """
    counts = collections.Counter() if counts is None else counts
    try:
        with clean(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            run = Run(program, Path(temporary) / "cache", counts, device=device)
            follow(run)
            if after is not None:
                after(run)
    except WrongAnswerError:
        if program.door != "compile" or not _is_wrong_without_marks(program):
            raise
        counts["programs that torch compiles wrongly"] += 1
    return counts


def _is_wrong_without_marks(program):
    """Whether this release of torch is wrong where nothing is marked: some find no writes to a copy's weights."""
    steps = tuple(step for step in program.steps if step[0] != "mark_again")
    program = dataclasses.replace(program, steps=steps)
    with clean(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        pair = Pair.build(program, Path(temporary))
        for part in pair.marked():
            torchcache.unmark(part)
        try:
            follow(Run(program, Path(temporary), collections.Counter(), pair=pair))
        except WrongAnswerError:
            return True
    return False


def follow(run):
    """Run the steps of a run's program."""
    run.counts["programs"] += 1
    for index, (name, number) in enumerate(run.program.steps):
        try:
            run.step(name, number)
        except DiffersError as error:
            raise WrongAnswerError(run.program, index, error) from None
        except Exception as error:
            raise NoAnswerError(run.program, index, f"{type(error).__name__}: {error}") from error
    run.close()
