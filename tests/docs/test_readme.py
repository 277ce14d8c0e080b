"""The README is true: its Python blocks run, in order, as one session; its options are the options."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import torchcache

README = Path(__file__).parents[2] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    scope = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), scope)
    printed = capsys.readouterr().out
    assert "backbone (Backbone)" in printed
    assert "4" in printed.splitlines()  # the hits of the partly trainable backbone
    assert "state bytes" in printed  # the explanation
    torchcache.flush()
    assert any(tmp_path.rglob("*.db"))


def test_the_options_table_is_complete_and_its_defaults_are_true():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", README.read_text(encoding="utf-8"), re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(torchcache.CacheOptions)}
    assert {name: eval(default) for name, default in rows.items()} == fields


def test_the_commands_are_those_that_ci_runs():
    commands = "\n".join(blocks("bash"))
    assert "tox run -e demo" in commands
    assert re.search(r"^tox ", commands, re.MULTILINE)
