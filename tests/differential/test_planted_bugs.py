"""Bugs planted in the library: the harness finds each within a few programs."""

import collections
import importlib.util
import inspect
import re
from pathlib import Path

import bugs
import pytest
from harness import WrongAnswerError, execute
from program import Program  # noqa: F401

# How many programs are drawn before a bug counts as not found.
PROGRAMS = 60
# These are found within a few programs; ``python tools/soak --planted`` tries all.
SOON = (bugs.rows_swapped,)


@pytest.mark.parametrize("bug", SOON, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(bug, monkeypatch):
    assert bugs.hunt(bug, range(PROGRAMS)) is not None


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.__name__)
def test_each_bug_fits_the_library(bug, monkeypatch):
    setattr_ = monkeypatch.setattr

    def fitting(owner, name, value):
        before = getattr(owner, name)
        if inspect.isroutine(before) and callable(value):
            taken = inspect.signature(before).parameters.values()
            named = {one.name: None for one in taken if one.kind is one.KEYWORD_ONLY}
            placed = [None for one in taken if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
            inspect.signature(value).bind(*placed, **named)
        setattr_(owner, name, value)

    monkeypatch.setattr(monkeypatch, "setattr", fitting)
    bug(monkeypatch)


@pytest.mark.once
def test_the_soak_tool_says_how_to_see_a_wrong_answer_again(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools" / "soak"))
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "tools" / "soak" / "__main__.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool.programs, "DOORS", ("eager",))
    counts = collections.Counter()
    assert tool.soak(0, 1, ["programs"], counts, None) == 0
    assert (counts["rounds"], counts["wrong answers"]) == (1, 0)
    bugs.no_audits(monkeypatch)
    bugs.rows_swapped(monkeypatch)
    assert tool.soak(1, 1, ["programs"], counts, None) == 1
    assert counts["wrong answers"] == 1
    said = capsys.readouterr().out
    again = re.search(r"--minutes 0 --only programs --seed (\d+)", said)
    shorter = re.search(r"^Program\(.*\)$", said, re.MULTILINE)
    assert tool.soak(0, int(again[1]), ["programs"], counts, None) == 1
    with pytest.raises(WrongAnswerError):
        execute(eval(shorter[0]))
