"""Bugs planted in the library: the harness finds each within a few programs."""

import collections
import importlib.util
import random
import re
from pathlib import Path

import pytest
import torch
from harness import NoAnswerError, WrongAnswerError, execute
from program import Program

from torchcache.lookup import cache_lookup, fingerprint, key, module_parts

# From here on each is found soon, which keeps the test short.
SEEDS = range(15, 45)


def row_shapes_left_out(patch):
    combine = key._combine

    def forgetful(region, cache_dtype, digest, mode, shapes, *others):
        return combine(region, cache_dtype, digest, mode, tuple((dtype, ()) for dtype, _ in shapes), *others)

    patch.setattr(key, "_combine", forgetful)


def row_dtypes_left_out(patch):
    combine = key._combine

    def forgetful(region, cache_dtype, digest, mode, shapes, *others):
        shapes = tuple((torch.uint8, shape) for _, shape in shapes)
        return combine(region, cache_dtype, digest, mode, shapes, *others)

    patch.setattr(key, "_combine", forgetful)


def attribute_left_out(patch):
    ignored = module_parts.ignored
    patch.setattr(module_parts, "ignored", lambda name: name == "gain" or ignored(name))


def rows_swapped(patch):
    merge = cache_lookup.CacheLookup._merge

    def swapped(self, call, split, computed):
        merged = merge(self, call, split, computed)
        return merged if len(split.missing) == len(split.digests) else [leaf.flip(0) for leaf in merged]

    patch.setattr(cache_lookup.CacheLookup, "_merge", swapped)


def weights_never_looked_at_again(patch):
    patch.setattr(fingerprint.State, "unchanged", lambda self, tensors: True)


BUGS = (row_shapes_left_out, row_dtypes_left_out, attribute_left_out, rows_swapped, weights_never_looked_at_again)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(bug, monkeypatch):
    bug(monkeypatch)
    for seed in SEEDS:
        program = Program.random(random.Random(seed), doors=("eager",), steps=(16, 16))
        try:
            execute(program)
        except NoAnswerError:
            continue
        except WrongAnswerError:
            return
    pytest.fail(f"no wrong answer in {len(SEEDS)} programs")


def test_the_soak_tool_says_how_to_see_a_wrong_answer_again(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools" / "soak"))
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "tools" / "soak" / "__main__.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool.programs, "DOORS", ("eager",))
    counts = collections.Counter()
    assert tool.soak(0, 1, ["programs"], counts) == 0
    assert (counts["rounds"], counts["wrong answers"]) == (1, 0)
    rows_swapped(monkeypatch)
    assert tool.soak(1, 1, ["programs"], counts) == 1
    assert counts["wrong answers"] == 1
    said = capsys.readouterr().out
    again = re.search(r"--minutes 0 --only programs --seed (\d+)", said)
    shorter = re.search(r"^Program\(.*\)$", said, re.MULTILINE)
    assert tool.soak(0, int(again[1]), ["programs"], counts) == 1
    with pytest.raises(WrongAnswerError):
        execute(eval(shorter[0]))
