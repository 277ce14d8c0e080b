"""The recipes run, and cache what they say they do."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import torchcache

RECIPES = Path(__file__).parents[2] / "tools" / "recipes"
TINY = ["--width", "16", "--samples", "40"]
# Rows that must be computed: one a sample and region.
ARGUMENTS = {
    "linear_probe": (["--model", "resnet10t", "--size", "32", "--samples", "40", "--epochs", "3"], 40),
    "image_files": (["--samples", "40", "--width", "8"], 40),
    "trainers": (["--samples", "40", "--width", "8"], 40),
    "trainers --trainer transformers": (["--samples", "40", "--width", "8"], 40),
    "last_blocks": (["--width", "24", "--samples", "40", "--layers", "4"], 40),
    "lora": ([*TINY, "--layers", "3", "--first-block", "2"], 40),
    "sentences": ([*TINY, "--layers", "2"], 40),
    "augmented_images": ([*TINY, "--layers", "2"], 80),
    "latents": (TINY, 80),
}


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_row_is_computed_once_and_training_is_as_without_a_cache(name, tmp_path, monkeypatch):
    arguments, computed = ARGUMENTS[name]
    name, *chosen = name.split()
    arguments = [*chosen, *arguments]
    if name == "latents":
        arguments = [*arguments, "--directory", str(tmp_path)]
    main = recipe(name).main
    model, losses = main(arguments)
    stats = torchcache.stats(model)
    assert stats.misses == computed
    assert stats.hits >= computed
    monkeypatch.setattr(torchcache, "warm", lambda *given, **options: None)  # without a cache nothing can be warmed
    with torchcache.bypass():
        _, uncached = main(arguments)
    assert losses == pytest.approx(uncached, rel=1e-2 if name == "latents" else 1e-3)


@pytest.mark.slow
def test_folds_and_rates_share_one_cache_across_processes(tmp_path):
    command = [sys.executable, RECIPES / "sweep.py", *TINY, "--folds", "2", "--directory", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "40 rows computed ahead, and 0 in 4 runs on 40 samples"


def test_every_recipe_is_listed():
    listed = (RECIPES / "README.md").read_text()
    names = {path.name for path in RECIPES.glob("*.py")}
    assert names
    assert all(f"`{name}`" in listed for name in names)
    assert {f"{name.split()[0]}.py" for name in ARGUMENTS} | {"sweep.py"} == names
