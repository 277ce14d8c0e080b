"""Directories made to harm: training and every command end, in little time and memory, and leave the rest alone."""

import os
import shutil

import endurance
import grammar
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks and pipes in the file system")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("honest") / "cache"
    endurance.honest(directory)
    return directory


@pytest.fixture(scope="module")
def limits(source, tmp_path_factory):
    return endurance.endure(source, tmp_path_factory.mktemp("limits"), None)


@pytest.mark.parametrize("seed", [*range(12), *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 300)]])
def test_a_directory_made_to_harm_harms_nobody(source, limits, tmp_path, seed):
    endurance.endure(source, tmp_path / "place", seed, limits)


def test_every_rule_makes_another_directory(source, tmp_path):
    for number, rule in enumerate(dict.fromkeys(grammar.RULES)):
        directory, outside = tmp_path / str(number) / "cache", tmp_path / str(number) / "outside"
        shutil.copytree(source, directory)
        grammar.victims(outside)
        before = endurance.fingerprint(directory)
        rule(directory, outside, grammar.random.Random(2))
        assert endurance.fingerprint(directory) != before, rule.__name__
