"""Random programs: whatever is done to a cached model, it answers as the uncached one does."""

import random

import nets
import pytest
import torch
from changes import CHANGES
from harness import execute
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pair import DiffersError, compare
from program import KEPT, MARKS, MEMORY, NUMBERS, OPERATIONS, Program

numbers = st.integers(0, NUMBERS - 1)
names = st.sampled_from([name for name, weight in OPERATIONS.items() for _ in range(weight)])


def programs(door, steps):
    return st.builds(
        Program,
        net=st.sampled_from(sorted(nets.KINDS)),
        door=st.just(door),
        mark=st.sampled_from(MARKS),
        persistent=st.booleans(),
        memory=st.sampled_from(MEMORY),
        seed=numbers,
        kept=st.sampled_from(sorted(set(KEPT))),
        steps=st.lists(st.tuples(names, numbers), min_size=steps, max_size=steps).map(tuple),
    )


def runs(examples, phases=tuple(Phase)):
    return settings(max_examples=examples, phases=phases, deadline=None, suppress_health_check=list(HealthCheck))


# Programs that are traced again in most of their steps take minutes to shrink.
AS_DRAWN = (Phase.reuse, Phase.generate)


@runs(24)
@given(programs("eager", 16))
def test_marked_modules_called_on_their_own(program):
    execute(program)


@runs(5, AS_DRAWN)
@given(programs("transform", 10))
def test_transformed_models(program):
    execute(program)


@runs(4, AS_DRAWN)
@given(programs("compile", 10))
def test_compiled_models(program):
    execute(program)


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_the_harness_meets_hits_misses_and_every_operation(door):
    counts = execute(
        Program("Mlp", door, "instance", True, 1_000_000, 0, tuple((name, 3) for name in [*OPERATIONS, "call"]))
    )
    assert counts["rows hit"]
    assert counts["rows missed"]
    assert counts["gradients compared"]
    assert all(counts[f"operation {name}"] for name in OPERATIONS)


@pytest.mark.parametrize("name", sorted(nets.KINDS))
@pytest.mark.parametrize("change", ["weights", "load"])
def test_a_stale_answer_would_be_seen(name, change):
    torch.manual_seed(0)
    model = nets.Model(nets.KINDS[name](nets.Block, 0.0)).eval()
    inputs = nets.KINDS[name].pool(torch.Generator().manual_seed(0))
    inputs = (inputs,) if name == "Shaped" else inputs
    seen = 0
    for number in range(20):
        with torch.no_grad():
            before = model(*inputs)
            CHANGES[change](model, random.Random(number))
            after = model(*inputs)
        try:
            compare(before, after, torch.bfloat16)
        except DiffersError:
            seen += 1
    assert seen >= 10
