"""Random programs on a backbone that is not built: a second run answers as its twin does from what the first stored."""

import dataclasses

import pytest
from unbuilt import CALLS, again, drawn

from torchcache.checks import stored


@pytest.mark.once
@pytest.mark.parametrize("seed", range(60))
def test_a_second_run_answers_as_its_twin(seed, tmp_path):
    program = drawn(seed)
    counts, built = again(program, tmp_path)
    assert counts["calls compared"]
    assert program.seed % 2 == 0 or max(built) <= 1


def test_second_runs_build_nothing(tmp_path):
    """Those in which nothing is asked for that is computed in any case: no rows, rows that depend on each other."""
    for net in ("Mlp", "Cnn", "Several", "Sequence", "Containers", "Attention", "Tokens"):
        for seed in (1, 3):
            program = dataclasses.replace(drawn(seed, CALLS), net=net, memory=1_000_000, seed=2 * seed + 1)
            assert again(program, tmp_path / f"{net}{seed}")[1] == [1, 0]


def _orders_left_out(patch):
    patch.setattr(stored, "_order", lambda order, length=None: tuple(range(len(order))))


def _dimensions_left_out(patch):
    encoded = stored._encoded
    patch.setattr(stored, "_encoded", lambda plan: encoded(plan) | {"dims": [0] * len(plan.learnt.output_dims)})


def _roles_left_out(patch):
    encoded = stored._encoded
    patch.setattr(stored, "_encoded", lambda plan: encoded(plan) | {"roles": [0] * len(plan.learnt.rows)})


def test_a_slip_is_found(tmp_path, monkeypatch):
    _orders_left_out(monkeypatch)

    def all_right(seed):
        program = dataclasses.replace(drawn(seed, CALLS), net=("Several", "Sequence")[seed % 2])
        try:
            again(program, tmp_path / str(seed))
        except AssertionError:
            return False
        return True

    assert not all(map(all_right, range(60)))


@pytest.mark.parametrize("slip", [_dimensions_left_out, _roles_left_out])
def test_slips_that_no_note_can_make(slip, tmp_path, monkeypatch):
    """Which arguments and outputs have rows, and where, are parts of the keys of rows."""
    slip(monkeypatch)
    for seed, net in enumerate(("Several", "Sequence", "Mlp")):
        again(dataclasses.replace(drawn(seed, CALLS), net=net), tmp_path / str(seed))
