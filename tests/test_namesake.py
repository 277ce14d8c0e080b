"""PyPI's package of the same name beside this one is told at import: its files, its metadata, anywhere on the path."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchcache
from torchcache import namesake

PACKAGE = Path(torchcache.__file__).parent
THEIRS = "torchcache/__init__.py,sha256=x,218\ntorchcache/torchcache.py,sha256=x,32188\n"
OURS = "torchcache/__init__.py,sha256=x,218\ntorchcache/marks.py,sha256=x,12000\n"


def metadata(folder, version, record):
    written = folder / f"torchcache-{version}.dist-info" / "RECORD"
    written.parent.mkdir(parents=True)
    written.write_text(record)


def module(folder):
    (folder / "torchcache").mkdir(parents=True, exist_ok=True)
    (folder / "torchcache" / "torchcache.py").touch()


# What `pip install --target`, `--ignore-installed`, two folders on the path, and an unpacked wheel leave.
LEFT = {
    "its file in the folder of this one": lambda home, other: module(home),
    "its metadata beside this one": lambda home, other: metadata(home, "0.6.0", THEIRS),
    "another folder on the path": lambda home, other: module(other),
}
FINE = {
    "this one alone": lambda home, other: metadata(home, "0.1.0", OURS),
    "two versions of this one": lambda home, other: (metadata(home, "0.1.0", OURS), metadata(home, "0.2.0", OURS)),
    "metadata without a list of files": lambda home, other: (home / "torchcache-0.6.0.dist-info").mkdir(parents=True),
    "other packages": lambda home, other: (metadata(home, "audio-1.0", "torchaudio/x.py,,\n"), other.mkdir()),
}


@pytest.mark.parametrize("left", [*LEFT, *FINE])
def test_the_other_package_is_told_and_nothing_else(left, tmp_path, monkeypatch, warnings):
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    {**LEFT, **FINE}[left](home, other)
    monkeypatch.setattr(namesake, "__file__", str(home / "torchcache" / "namesake.py"))
    monkeypatch.setattr(sys, "path", ["", str(home), str(other), "/no/such/folder", str(tmp_path / "an.egg")])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        namesake.warn_of_namesake()
    assert len(warnings) == (left in LEFT)
    assert all(str(tmp_path) in text and "pip uninstall torchcache" in text for text in warnings)


def test_an_import_says_it_once_for_a_process_and_its_children(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "torchcache", ignore=shutil.ignore_patterns("__pycache__"))
    module(tmp_path)
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, torchcache\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=len, args=('',))\n"
        "    child.start(); child.join(); print(torchcache.__file__, child.exitcode)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "torchcache" / "__init__.py"), "0"]
    assert done.stderr.count("another one by others") == 1
