"""What the environment says is warned of and left where it cannot be: it ends neither an import nor a training."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import torchcache
from torchcache.cli.main import main
from torchcache.logging import configure, logger
from torchcache.options import CacheOptions, default_cache_dir

TRAIN = """
import torch, torchcache
model = torchcache.mark(torch.nn.Linear(2, 2), freeze=True, persistent=True)
model(torch.randn(3, 2))
torchcache.flush()
print(torchcache.stats(model).misses)
"""
BAD = {
    "TORCHCACHE_LOG_LEVEL": "²",
    "TORCHCACHE_LOG_FMT": "%(message)99999999999999s",
    "TORCHCACHE_LOG_FILE": "~nosuchuser/log",
    "TORCHCACHE_DIR": "~nosuchuser/cache",
}


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_a_bad_value_is_warned_of_and_its_default_used(tmp_path, name, value):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), name: value}
    if name != "TORCHCACHE_DIR":
        environment["TORCHCACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], capture_output=True, text=True, errors="replace", env=environment, cwd=tmp_path
    )
    assert done.stdout == "3\n", done.stderr
    assert done.stderr.count(f"{name}=") == 1
    assert len(done.stderr.splitlines()) == 1
    assert len(list(tmp_path.rglob("cache.db"))) == 1


def test_commands_fall_back_as_training_does(monkeypatch, tmp_path, capsys, warnings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHCACHE_DIR", "~nosuchuser")
    assert main(["info"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert default_cache_dir() == tmp_path / "torchcache"
    assert main(["info", "~nosuchuser"]) == 2
    assert "nosuchuser" in capsys.readouterr().err
    assert len(warnings) == 1


def test_a_directory_that_cannot_be_is_an_error_of_its_mark():
    with pytest.raises(ValueError, match="nosuchuser"):
        CacheOptions(persistent=True, persistent_cache_dir="~nosuchuser/cache")


def test_no_name_in_a_message_is_a_line_or_a_command_of_its_own(capsys, monkeypatch):
    monkeypatch.delenv("TORCHCACHE_LOG_FMT", raising=False)
    handlers, level = logger.handlers[:], logger.level
    try:
        configure()
        logger.warning("module %s", "a\n[torchcache] - all is well \x1b[2J\u202e")
        try:
            raise ValueError("\x1b[2J\u202e")
        except ValueError:
            logger.warning("failed", exc_info=True)
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
    said = capsys.readouterr().err
    assert "a?[torchcache] - all is well ?[2J?" in said
    assert "Traceback" in said
    assert all(sign.isprintable() for sign in said.replace("\n", ""))


class Echo(torch.nn.Module):
    def forward(self, x):
        return x * 2


def test_tables_of_models_show_names_as_they_are():
    model = torch.nn.Module()
    Echo.__name__ = "Echo[/red]\x1b[2J\n"
    try:
        model.add_module("[/]\x1b[2J\u202e\n", torchcache.mark(Echo()))
        next(model.children())(torch.randn(2, 2))
        for report in (torchcache.stats(model), torchcache.summary(model)):
            for said in (str(report), report._repr_html_()):
                assert "Echo[/red]?[2J?" in said
                assert all(sign.isprintable() for sign in said.replace("\n", ""))
    finally:
        Echo.__name__ = "Echo"
    assert logging.getLogger("torchcache") is logger
