"""Realistic slips of the design, each as a patch of the library: the harness must find what they do."""

import dataclasses
import random
import time
import types

import pytest
import torch
import xxhash
from harness import NoAnswerError, execute
from program import Program
from torch import nn

from torchcache import batch as batches
from torchcache import call, padded, padding, regions
from torchcache.call import Region
from torchcache.checks import audit, gradients, learning, probe
from torchcache.digest import cpu
from torchcache.digest import rows as rows_module
from torchcache.graph import rewrite, trial
from torchcache.identity import callables, key, modules, objects, optimizers, program, record, samples, state, watch
from torchcache.identity.identity import Identity
from torchcache.identity.record import Record
from torchcache.identity.state import State
from torchcache.store import precision
from torchcache.store.pack import Pack
from torchcache.store.slab import Slab
from torchcache.store.tiers import Tiers
from torchcache.values import containers, layout, take

__all__ = ["BUGS", "hunt", "no_audits"]


# Where parts are trainable, most of the time goes into traces.
MARKS = ("instance", "class", "body", "nested", "instance", "unfrozen")


def hunt(bug, seeds, seconds=float("inf")):
    """Run random programs with a planted bug until one gives a wrong answer; which seed that was, if any.

    Attributes of ``bug`` say what the programs are to be like.
    """
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        no_audits(patch)
        bug(patch)
        for seed in seeds:
            if time.monotonic() - start > seconds:
                break
            try:
                made = Program.random(random.Random(seed), doors=("eager",), marks=MARKS, steps=(16, 16))
                execute(dataclasses.replace(made, **vars(bug)))
            except NoAnswerError:  # the slip shows, but a patch that does not fit would show so as well
                continue
            except AssertionError:
                return seed
    return None


def no_audits(patch):
    """Audits would find most of them first, and give the right answer."""
    patch.setattr(audit.Schedule, "due", lambda self, form, rows: False)
    patch.setattr(audit.Schedule, "served", lambda self, form, shared, rows, hits: None)


# What a key is made of.


def _key_of(patch, change):
    """Combine keys of arguments that ``change`` altered."""
    combine = key._combine

    def forgetful(who, cache_dtype, digest, mode, shapes, shared, named):
        return combine(*change(who, cache_dtype, digest, mode, shapes, shared, named))

    patch.setattr(key, "_combine", forgetful)


def row_shapes_left_out(patch):
    _key_of(patch, lambda *given: (*given[:4], tuple((dtype, ()) for dtype, _ in given[4]), *given[5:]))


def row_dtypes_left_out(patch):
    _key_of(patch, lambda *given: (*given[:4], tuple((torch.uint8, shape) for _, shape in given[4]), *given[5:]))


def autocast_left_out(patch):
    _key_of(patch, lambda *given: (*given[:3], given[3]._replace(autocast=None, autocasts=(), dtypes=()), *given[4:]))


def contents_of_shared_arguments_left_out(patch):
    _key_of(patch, lambda *given: (*given[:5], (), given[6]))


def identity_left_out(patch):
    _key_of(patch, lambda who, *given: (bytes(16), *given))


def plans_of_all_forms_alike(patch):
    def forgetful(self, batch, roles):
        return batch.who + repr([(leaf.dtype, leaf.shape[1:]) for leaf in batch.rows]).encode()

    patch.setattr(learning.Learning, "_key", forgetful)


# Arguments and outputs.


def order_of_dicts_left_out(patch):
    keys_bytes = containers._keys_bytes
    patch.setattr(containers, "_keys_bytes", lambda keys, whole: keys_bytes(sorted(keys), whole))


def numbers_by_value(patch):
    for kind in (bool, int, float):
        patch.setitem(take.ATOMS, kind, lambda value: b"%d;" % value)


def constants_left_out(patch):
    for kind in (int, float, str):
        patch.setitem(take.ATOMS, kind, lambda value: b"c")


def members_of_enums_left_out(patch):
    plain = take.constant_bytes
    patch.setattr(take, "constant_bytes", lambda value: plain(value) if isinstance(value, str) else b"c")


def classes_of_containers_left_out(patch):
    digest = take._digest
    tags = bytes.maketrans(b"[({", b"(((")
    patch.setattr(take, "_digest", lambda data: digest([part.translate(tags) for part in data]))


# What differs is in structures of arguments, which few nets have.
for _bug in (order_of_dicts_left_out, numbers_by_value, members_of_enums_left_out, classes_of_containers_left_out):
    _bug.net = "Shaped"


def order_in_memory_left_out(patch):
    patch.setattr(layout, "memory_order", lambda shape, stride: tuple(range(len(shape))))


def batch_dimension_of_outputs_left_out(patch):
    patch.setattr(layout.Layout, "of", classmethod(_layout_with_rows_first))


def _layout_with_rows_first(cls, leaf, batch_dim=0):
    return cls(leaf.dtype, tuple(leaf.shape[1:]), layout.memory_order(leaf.shape, leaf.stride()), leaf.device)


# Digests, and rows in the store.


def rows_swapped(patch):
    merge = Region._merge

    def swapped(self, batch, plan, digests, missing, found, computed):
        outputs, leaves = merge(self, batch, plan, digests, missing, found, computed)
        return (outputs if batch.given.ran else plan.output.rebuild([leaf.flip(0) for leaf in leaves])), leaves

    patch.setattr(Region, "_merge", swapped)


def digests_of_one_byte(patch):
    def short(rows, algorithm, started):
        return [bytes(rows_module.row_bytes(cpu.host_rows(rows[0]))[row][3:4]).ljust(16) for row in range(len(rows[0]))]

    patch.setattr(rows_module, "digest_rows", short)


def digests_of_the_first_argument(patch):
    digest_rows = rows_module.digest_rows
    patch.setattr(rows_module, "digest_rows", lambda rows, *others: digest_rows(rows[:1], *others))


def ids_taken_for_names_of_what_is_computed(patch):
    patch.setattr(batches, "was_there", lambda tensor: True)


ids_taken_for_names_of_what_is_computed.net, ids_taken_for_names_of_what_is_computed.mark = "Containers", "blocks"


def one_slot_for_all(patch):
    find = Slab.find
    patch.setattr(Slab, "find", lambda self, digests: [min(slot, 0) for slot in find(self, digests)])


def rows_stored_under_digests_of_others(patch):
    keep = Tiers.keep

    def mixed(self, fingerprint, digests, *others):
        return keep(self, fingerprint, digests[::-1], *others)

    patch.setattr(Tiers, "keep", mixed)


def rows_on_disk_under_digests_of_others(patch):
    submit = Tiers._submit

    def mixed(self, fingerprint, region, digests, *others):
        return submit(self, fingerprint, region, digests[::-1], *others)

    patch.setattr(Tiers, "_submit", mixed)
    patch.setattr(Region, "_audit", lambda self, batch, plan, looked, first, beside: None)


def rows_of_a_pack_under_digests_of_others(patch):
    blob = Pack.blob

    def next_one(self, place):
        key, body = self.keys[place], blob(self, (place + 1) % len(self))[:-8]
        return body + xxhash.xxh3_64_digest(key + body)

    patch.setattr(Pack, "blob", next_one)
    patch.setattr(Region, "_audit", lambda self, batch, plan, looked, first, beside: None)


def stored_rows_given_out(patch):
    gather = Slab.gather

    def shared(self, slots, to_send):
        run = len(slots) and list(slots) == list(range(slots[0], slots[0] + len(slots)))
        return [leaf[slots[0] : slots[0] + len(slots)] for leaf in self.leaves] if run else gather(self, slots, to_send)

    patch.setattr(Slab, "gather", shared)


# State.


def weights_never_looked_at_again(patch):
    current = State.current
    patch.setattr(State, "current", lambda self, tensors: self.digest or current(self, tensors))


def versions_only(patch):
    patch.setattr(record, "samples_of", lambda tensors: [])
    patch.setattr(state, "suspect_after_steps", lambda record: None)


def samples_of_the_first_tensor(patch):
    patch.setattr(record, "samples_of", lambda tensors: samples.samples_of(tensors[:1]))


def steps_of_optimizers_unseen(patch):
    patch.setattr(optimizers, "_after_step", lambda *given: None)
    patch.setattr(state, "suspect_after_steps", lambda record: None)


steps_of_optimizers_unseen.net, steps_of_optimizers_unseen.mark = "Tokens", "instance"


def place_in_memory_not_compared(patch):
    patch.setattr(Record, "in_place", lambda self, tensors: len(tensors) == len(self.contents))


def buffers_left_out(patch):
    made = program.Program.__init__

    def partly(self, *given, **more):
        made(self, *given, **more)
        self.tensors = [leaf for leaf in self.tensors if isinstance(leaf, nn.Parameter)]

    patch.setattr(program.Program, "__init__", partly)


buffers_left_out.net = "Cnn"


def trainable_weights_taken_for_frozen(patch):
    patch.setattr(call, "goes_by_parts", lambda state, *, partial, unsteady: False)
    for module in (gradients, learning):
        patch.setattr(module, "check_outputs", lambda form, batch, output: None)


trainable_weights_taken_for_frozen.mark = "unfrozen"


# Program.


def identity_never_looked_at_again(patch):
    current = Identity.current

    def forgetful(self, *given):
        if "known" not in vars(self):
            self.known = current(self, *given)
        return self.known

    patch.setattr(Identity, "current", forgetful)


def _describe(patch, kind, describe):
    """Describe values of a kind in another way."""
    patch.setitem(callables._DESCRIBERS, kind, describe)
    patch.setattr(callables, "_describer", lambda kind: callables._DESCRIBERS.get(kind))


def closures_left_out(patch):
    def function(value):
        node = callables._function(value)
        node.parts = [part for part in node.parts if not part[0].startswith("the variable")]
        return node

    _describe(patch, types.FunctionType, function)


def attributes_left_out(patch):
    def space(kind, *others, **more):
        found = objects.member_space(kind, *others, **more)
        if kind == "attribute":
            found.held.clear()
        return found

    patch.setattr(modules, "member_space", space)


def hooks_left_out(patch):
    patch.setattr(modules, "_hooks", lambda *given: None)


def globals_never_looked_at_again(patch):
    patch.setattr(program, "_bound", lambda read: lambda mapping: [])


# Checks, and who is called.


def probe_that_compares_nothing(patch):
    patch.setattr(probe._Trial, "_neighbours", lambda self, *given: None)
    patch.setattr(probe.Rounding, "learn", lambda self, a, b: True)


def all_arguments_shared_but_the_first(patch):
    def guesses(tensors, whole, batch_dim):
        yield (batch_dim, *[None] * (len(tensors) - 1))

    patch.setattr(probe, "guesses", guesses)
    probe_that_compares_nothing(patch)


def regions_shared_by_copies(patch):
    patch.setattr(regions._Regions, "is_of", lambda self, owner: True)
    patch.setattr(regions._Regions, "__deepcopy__", lambda self, memo: self)


def regions_shared_by_shallow_copies(patch):
    patch.setattr(regions._Regions, "is_of", lambda self, owner: True)


def parts_named_without_their_state(patch):
    named, regions = rewrite._name, rewrite.regions_for
    patch.setattr(rewrite, "_name", lambda plan, paths, passed, call: named(plan, (), passed, call))
    patch.setattr(rewrite, "regions_for", lambda plan, paths, *rest: regions(plan, (), *rest))


parts_named_without_their_state.net, parts_named_without_their_state.mark = "Branches", "partial"


# What of an output is stored, and of rows that are padded.


def scales_of_other_rows(patch):
    pack = precision.Precision.pack

    def mixed(self, rows):
        packed, held = pack(self, rows)
        return [*packed[: len(rows)], *(scale.flip(0) for scale in packed[len(rows) :])], held

    patch.setattr(precision.Precision, "pack", mixed)


scales_of_other_rows.kept, scales_of_other_rows.mark = "int8", "instance"


def lengths_put_together_in_another_order(patch):
    merged = padding.Padding._merged

    def mixed(self, batch, groups, made, proof):
        return merged(self, batch, [rows[::-1] for rows in groups], made, proof)

    patch.setattr(padding.Padding, "_merged", mixed)
    patch.setattr(padding.Padding, "_agree", lambda *given: None)


def rows_cut_shorter_than_they_are(patch):
    patch.setattr(padded.PaddedBatch, "cut_to", lambda self, length: max(1, length - 1))
    patch.setattr(padding.Padding, "_agree", lambda *given: None)


lengths_put_together_in_another_order.net, lengths_put_together_in_another_order.mark = "Padded", "instance"
rows_cut_shorter_than_they_are.net, rows_cut_shorter_than_they_are.mark = "Padded", "instance"


def arguments_with_gradients_taken_for_others(patch):
    arguments = batches.take_arguments

    def detached(args, kwargs, names, **options):
        taken = arguments(args, kwargs, names, **options)
        return dataclasses.replace(taken, tensors=[leaf.detach() for leaf in taken.tensors])

    patch.setattr(batches, "take_arguments", detached)


def a_trial_that_compares_nothing(patch):
    patch.setattr(trial, "_gap", lambda found, true: 0.0)


def a_watch_that_takes_in_what_it_did_not_look_at(patch):
    patch.setattr(watch.Namespace, "intact", lambda self, live: True)


a_trial_that_compares_nothing.mark = "partial"

BUGS = [
    row_shapes_left_out,
    row_dtypes_left_out,
    autocast_left_out,
    contents_of_shared_arguments_left_out,
    identity_left_out,
    plans_of_all_forms_alike,
    order_of_dicts_left_out,
    numbers_by_value,
    constants_left_out,
    members_of_enums_left_out,
    classes_of_containers_left_out,
    order_in_memory_left_out,
    batch_dimension_of_outputs_left_out,
    rows_swapped,
    digests_of_one_byte,
    digests_of_the_first_argument,
    ids_taken_for_names_of_what_is_computed,
    one_slot_for_all,
    rows_stored_under_digests_of_others,
    rows_on_disk_under_digests_of_others,
    rows_of_a_pack_under_digests_of_others,
    stored_rows_given_out,
    weights_never_looked_at_again,
    versions_only,
    samples_of_the_first_tensor,
    steps_of_optimizers_unseen,
    place_in_memory_not_compared,
    buffers_left_out,
    trainable_weights_taken_for_frozen,
    identity_never_looked_at_again,
    closures_left_out,
    attributes_left_out,
    hooks_left_out,
    globals_never_looked_at_again,
    probe_that_compares_nothing,
    all_arguments_shared_but_the_first,
    regions_shared_by_copies,
    regions_shared_by_shallow_copies,
    parts_named_without_their_state,
    scales_of_other_rows,
    lengths_put_together_in_another_order,
    rows_cut_shorter_than_they_are,
    arguments_with_gradients_taken_for_others,
    a_trial_that_compares_nothing,
    a_watch_that_takes_in_what_it_did_not_look_at,
]
