"""warm: a cache filled from the command line is the one that training finds."""

import json
import os
import subprocess
import sys

import pytest
from filled import ROWS, Model, data, run

import torchcache

TRAINING = """
import torch, torchcache
from torch.utils.data import DataLoader, TensorDataset
from filled import Model, data

def make_model():
    return Model({directory!r}, vision=50)

def make_transformed():
    return torchcache.transform(make_model())

def make_loader():
    return DataLoader(TensorDataset(data(), torch.zeros(len(data()))), batch_size=8)

def make_forgetful():
    return torchcache.mark(torch.nn.Linear(10, 2), freeze=True)

def make_broken():
    import no_such_module_at_all

number = 3
"""


@pytest.fixture
def training(tmp_path, monkeypatch):
    """The name of an importable module in the working directory; its cache is ``tmp_path / "cache"``."""
    name = f"training_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(TRAINING.format(directory=str(tmp_path / "cache")))
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("function", "flags", "door"),
    [
        ("make_transformed", [], torchcache.transform),
        ("make_model", ["--transform"], torchcache.transform),
        ("make_model", [], lambda model: model),
    ],
)
def test_training_finds_what_the_command_computed(training, tmp_path, torchcache_json, function, flags, door):
    found = torchcache_json("warm", f"{training}:{function}", f"{training}:make_loader", *flags)
    assert (found["misses"], found["hits"]) == (2 * ROWS, 0)
    assert found["directories"] == [str(tmp_path / "cache")]
    again = torchcache_json("warm", f"{training}:{function}", f"{training}:make_loader", *flags)
    assert (again["misses"], again["hits"]) == (0, 2 * ROWS)
    model = sys.modules[training].make_model()
    _, misses, disk_hits = run(tmp_path / "cache", data(), model, door)
    assert (misses, disk_hits) == (0, 2 * ROWS)


@pytest.mark.parametrize(
    ("model", "loader", "complaint"),
    [
        ("make_model", "{}:make_loader", "package.module:function"),
        ("no.such.place:make", "{}:make_loader", "no module 'no.such.place'"),
        ("{}:make_nothing", "{}:make_loader", "has no function 'make_nothing'"),
        ("{}:number", "{}:make_loader", "has no function 'number'"),
        ("{}:make_forgetful", "{}:make_loader", "persistent=True"),
    ],
)
def test_mistakes_are_said_in_one_line(training, torchcache_command, model, loader, complaint):
    code, out, err = torchcache_command("warm", model.format(training), loader.format(training))
    assert (code, out) == (2, "")
    assert complaint in err
    assert len(err.splitlines()) == 1


def test_a_device_that_is_none_is_refused(training, torchcache_command):
    code, _, err = torchcache_command(
        "warm", f"{training}:make_model", f"{training}:make_loader", "--device", "toaster"
    )
    assert code == 2
    assert "--device" in err


def test_errors_of_the_users_code_keep_their_traceback(training, torchcache_command):
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        torchcache_command("warm", f"{training}:make_broken", f"{training}:make_loader")


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work(training, tmp_path):
    place = [f"{training}:make_transformed", f"{training}:make_loader"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "torchcache", "warm", *place, "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["misses"] < 2 * ROWS
    assert run(tmp_path / "cache", data(), Model(str(tmp_path / "cache"), vision=50))[1:] == (0, 2 * ROWS)
