"""A run that stores rows and serves none is told so, with the likely reason; a run that is served is told nothing."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import torchcache

SETUP = """
import copy, os, torch, torchcache
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def encode_image(self, x):
        return self.linear(x)

    def forward(self, x):
        return self.encode_image(x).tanh()

torch.manual_seed(0)
DATA = torch.randn(20, 4)

def epochs(count, size=5, augment=False):
    for _ in range(count):
        for rows in torch.randperm(20).split(size):
            yield DATA[rows] + (torch.randn(len(rows), 4) if augment else 0)
"""
HEADER = "no row was served in this run: "


def run(script, level="WARNING"):
    """What a process that runs ``script`` says on standard error."""
    environment = {**os.environ, "TORCHCACHE_LOG_LEVEL": level, "TORCHCACHE_LOG_FMT": "%(levelname)s %(message)s"}
    command = [sys.executable, "-c", SETUP + textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_inputs_that_differ_in_every_epoch_are_the_likely_reason():
    told = run(
        """
        model = nn.Sequential(torchcache.mark(Encoder(), freeze=True), nn.Linear(8, 2))
        torchcache.transform(model)
        for x in epochs(4, augment=True):
            model(x)
        """
    )
    assert told.count("WARNING") == told.count(HEADER) == 1
    assert "0 (Encoder): 80 rows stored in 16 calls, none served" in told
    assert "random augmentation" in told


def test_a_program_that_is_read_again_for_long_is_told_of():
    told = run(
        """
        from torchcache.identity import identity
        identity.LONG = 0.0

        class Registry:
            def __init__(self, seen=()):
                self.seen = set(seen)

        REGISTRY = {"state": Registry()}

        class Reading(Encoder):
            def forward(self, x):
                return super().forward(x) + len(REGISTRY["state"].seen)

        model = torchcache.mark(Reading(), freeze=True)
        for x in epochs(4):
            REGISTRY["state"] = Registry(REGISTRY["state"].seen)
            model(x)
        assert torchcache.stats(model).hits == 60
        """
    )
    assert told.count("WARNING") == told.count("was read again and again") == 1
    assert "as the global REGISTRY is replaced or written to" in told


def test_while_it_runs_it_is_said_at_info_and_seldom():
    told = run(
        """
        model = torchcache.mark(Encoder(), freeze=True)
        for step, x in enumerate(epochs(50, augment=True)):
            model(x)
            if step == 100:
                print("halfway", file=__import__("sys").stderr)
        """,
        level="INFO",
    )
    running = [line for line in told.splitlines() if line.startswith("INFO") and "none served so far" in line]
    assert [line.split(" calls")[0].split()[-1] for line in running] == ["8", "32", "128"]
    assert "none served so far" in told.split("halfway")[0]
    assert all("first pass over the data" in line for line in running)


@pytest.mark.parametrize(
    "script",
    [
        # Served from the second epoch on.
        """
        model = torchcache.mark(Encoder(), freeze=True)
        for x in epochs(2):
            model(x)
        """,
        # A first pass that fills a directory.
        """
        model = torchcache.mark(Encoder(), freeze=True, persistent=True)
        for x in epochs(1, size=3):
            model(x)
        """,
        # The caller wanted it computed.
        """
        model = torchcache.mark(Encoder(), freeze=True)
        with torchcache.bypass():
            for x in epochs(2):
                model(x)
        """,
        # Too short a run to judge.
        """
        model = torchcache.mark(Encoder(), freeze=True)
        model(DATA)
        """,
        # Not marked any more, and never enabled.
        """
        model = torchcache.unmark(torchcache.mark(Encoder(), freeze=True))
        other = torchcache.mark(Encoder(), freeze=True, enabled=False)
        for x in epochs(2):
            model(x), other(x)
        """,
        # A copy is used instead of what was marked.
        """
        model = copy.deepcopy(torchcache.mark(Encoder(), freeze=True))
        for x in epochs(2):
            model(x)
        """,
        # What a fork has from its parent is not its own.
        """
        model = torchcache.mark(Encoder(), freeze=True)
        for x in epochs(1):
            model(x)
        pid = os.fork()
        if not pid:
            raise SystemExit(0)
        os.waitpid(pid, 0)
        for x in epochs(1):
            model(x)
        """,
    ],
    ids=["served", "filled", "asked", "short", "unmarked", "copied", "forked"],
)
def test_nothing_is_said_where_all_is_well(script, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path))
    assert HEADER not in run(script)


def test_a_persistent_run_over_several_epochs_is_told_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path))
    told = run(
        """
        model = torchcache.mark(Encoder(), freeze=True, persistent=True)
        for x in epochs(3, size=6, augment=True):
            model(x)
        """
    )
    assert told.count(HEADER) == 1
    assert "random augmentation" in told


@pytest.mark.parametrize("transformed", [False, True])
def test_a_method_that_is_called_and_not_marked(transformed):
    told = run(
        f"""
        model = nn.Sequential(torchcache.mark(Encoder(), freeze=True))
        if {transformed}:
            torchcache.transform(model)
        for x in epochs(2):
            model[0].encode_image(x)
        """
    )
    assert told.count("WARNING") == told.count(HEADER) == 1
    assert ("0.forward: marked, but never called" if transformed else "Encoder.forward: marked, but never") in told
    assert "method=" in told


def test_everything_bypassed_is_told_with_its_reason():
    told = run(
        """
        model = torchcache.mark(Encoder())
        zeros = torchcache.mark(Encoder(), freeze=True)
        for x in epochs(2):
            model(x), zeros(torch.zeros(3, 4))
        """
    )
    assert told.count(HEADER) == 1
    (last,) = (line for line in told.splitlines() if HEADER in line)
    assert last.startswith("WARNING"), "one line for all regions"
    assert "it trains linear.weight, linear.bias" in last
    assert "its rows are all alike" in last


def test_weights_that_keep_changing_are_told():
    told = run(
        """
        teacher = torchcache.mark(Encoder(), freeze=True)
        for x in epochs(2):
            teacher(x)
            for parameter in teacher.parameters():
                parameter.mul_(1.01)
        """
    )
    assert told.count(HEADER) == 1
    assert "change" in told.split(HEADER)[1]
    assert "weights" in told.split(HEADER)[1]


def test_models_that_are_gone_before_the_end_are_told_in_one_warning():
    told = run(
        """
        def main():
            for _ in range(3):
                model = torchcache.mark(Encoder(), freeze=True)
                for x in epochs(2, augment=True):
                    model(x)

        main()
        """
    )
    assert told.count(HEADER) == 1
    assert told.count("Encoder: 40 rows stored in 8 calls") == 1


def test_nothing_is_kept_of_regions_that_are_gone():
    told = run(
        """
        import gc
        from torchcache import usefulness
        for _ in range(50):
            model = torchcache.mark(Encoder(), freeze=True)
            for x in epochs(1, augment=True):
                model(x)
        del model
        gc.collect()
        assert not usefulness._running
        assert len(usefulness._verdicts) <= usefulness.MOST_NAMED
        """
    )
    assert told.count(HEADER) == 1


def test_what_runs_under_a_transform_of_functions_is_told_by_its_name():
    told = run(
        """
        encoder = torchcache.mark(Encoder(), freeze=True)
        for x in epochs(10):
            torch.func.vmap(encoder)(x)
        """
    )
    assert f"{HEADER}Encoder: 0 rows stored" in told


class Stepped(nn.Linear):
    def forward(self, x, step, scale=None):
        return super().forward(x)


@pytest.mark.parametrize("name", ["step", "scale"])
def test_an_argument_that_is_new_in_every_call_is_named(name, warnings):
    module = torchcache.mark(Stepped(4, 4), freeze=True)
    data = torch.randn(40, 8, 4)
    for turn, x in enumerate(data):
        module(x, turn if name == "step" else 0, scale=torch.tensor(float(turn if name == "scale" else 0)))
    assert torchcache.stats(module).hits == 0
    (text,) = [text for text in warnings if "was new in each" in text]
    assert name in text
    assert {"step": "scale", "scale": "step"}[name] not in text


def test_a_mark_that_serves_by_one_of_its_parts_is_told_nothing():
    told = run(
        """
        encoder = Encoder()
        encoder.linear.requires_grad_(False)
        model = torchcache.mark(nn.Sequential(encoder, nn.Linear(8, 2)))
        with torch.no_grad():
            for x in epochs(1):
                model(x)
        for x in epochs(3):
            model(x).sum().backward()
        assert torchcache.stats(model).hits
        """
    )
    assert HEADER not in told
