"""A cache directory that a real model filled, the commands, and their JSON."""

import gc
import json

import pytest
from filled import command, run


@pytest.fixture
def cache(tmp_path):
    directory = tmp_path / "cache"
    run(directory)
    gc.collect()  # what its models used is noted as they go
    return directory


@pytest.fixture
def torchcache_command(capsys):
    return lambda *arguments: command(capsys, *arguments)


@pytest.fixture
def torchcache_json(capsys):
    def call(*arguments, code=0):
        found, out, err = command(capsys, *arguments, "--json")
        assert found == code, err
        return json.loads(out)

    return call
