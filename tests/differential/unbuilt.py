"""Runs of a program on a backbone that is deferred: the second finds what the first stored, and need not build it."""

import collections
import copy
import dataclasses
import random

import nets
from harness import Run, clean, follow
from pair import Pair
from program import Program

import torchcache

STEPS = ("call", "call", "every_form", "train_step", "autocast", "input_gradient", "bypass")
CALLS = ("call", "every_form", "train_step", "autocast")


class _Deferred(Run):
    """A run whose model has a deferred backbone."""

    def __init__(self, program, directory, counts):
        plain = dataclasses.replace(program, mark="instance", door="eager", persistent=False)
        twin = Pair.build(plain, directory).twin
        self.built = 0

        def build():
            self.built += 1
            return copy.deepcopy(twin.backbone)

        backbone = torchcache.deferred(
            build,
            identity="backbone",
            persistent_cache_dir=str(directory),
            release=program.seed % 2 == 0,
            max_memory_cache_size=program.memory,
            batch_dim=nets.KINDS[program.net].BATCH_DIM,
        )
        model = nets.Model(backbone)
        model.head = copy.deepcopy(twin.head)
        super().__init__(program, directory, counts, Pair.of(model, twin, ("",), plain))

    def _train(self, pair):
        super()._train(dataclasses.replace(pair, model=pair.model.head, twin=pair.twin.head))


def drawn(seed, names=STEPS):
    """A program of calls alone."""
    draw = random.Random(seed)
    program = Program.random(draw, doors=("eager",), marks=("instance",))
    steps = tuple((draw.choice(names), number) for _, number in program.steps)
    return dataclasses.replace(program, steps=steps, persistent=True)


def again(program, directory):
    """Run a program as two processes would, one after the other; what is counted, and how often each built."""
    counts, built = collections.Counter(), []
    with clean():
        for _ in range(2):
            run = _Deferred(program, directory / "cache", counts)
            follow(run)
            built.append(run.built)
    return counts, built
