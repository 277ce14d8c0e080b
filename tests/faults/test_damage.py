"""Whatever happens to the files of a cache, training goes on with right outputs, and is told of it once."""

import random
import shutil
import sqlite3
from contextlib import closing

import pytest
from damage import FILES, HARMS, LARGE, MOMENTS, SMALL, endure, filled, possible
from trained import Run

from torchcache.store.connect import PAGE_SIZE

CASES = [(file, harm, moment) for file in FILES for harm in HARMS for moment in MOMENTS if possible(file, harm, moment)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("filled") / "cache"
    run = filled(directory)
    yield directory
    del run


@pytest.mark.parametrize(("file", "harm", "moment"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_harmed_file_costs_rows_and_neither_the_run_nor_its_outputs(source, tmp_path, warnings, file, harm, moment):
    run = endure(source, tmp_path / "cache", file, harm, moment, seed=1)
    # Each of the two runs is told at most of a store that fails and of rows that were damaged.
    assert len(warnings) <= 4
    if file == "*.val":
        # One row of many: the others are found, and this one is again in the next run.
        assert run.count("misses") <= 20 + 2 + 1
        again = Run(tmp_path / "cache")
        again.steps(SMALL + 20, LARGE + 2)
        assert again.count("misses") == 0 or harm == "folder"
    if file == "torchcache.json" and harm != "folder":
        assert run.count("misses") == 20 + 2
        assert not warnings


@pytest.mark.slow
@pytest.mark.parametrize("file", ["cache.db", "cache.db-wal", "cache.db-shm", "*.val"])
def test_many_flips_cuts_and_zeroed_ranges(source, tmp_path, file):
    for seed in range(60):
        chance = random.Random(seed)
        harm, moment = chance.choice(["truncate", "flip_bits", "zero"]), chance.choice(MOMENTS)
        if possible(file, harm, moment):
            endure(source, tmp_path / str(seed), file, harm, moment, seed)
            shutil.rmtree(tmp_path / str(seed))


def test_a_lost_page_of_the_database_costs_its_own_rows_alone(tmp_path, warnings):
    source = tmp_path / "source"
    run = Run(source)
    run.steps(12_000, 0)
    directory = tmp_path / "cache"
    shutil.copytree(source, directory)
    path = next(directory.rglob("cache.db"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:
        data = file.read()
        # A leaf of the table: the page where up to eight packs begin, each of some 400 rows.
        page = data.index(b"TCB") // PAGE_SIZE
        file.seek(page * PAGE_SIZE)
        file.write(b"\xff" * PAGE_SIZE)
    after = Run(directory)
    after.steps(12_000, 0)
    assert 0 < after.count("misses") < 4_000
    assert after.count("disk_errors") > 0
    assert len(warnings) <= 2


@pytest.mark.parametrize("fate", ["deleted", "emptied", "replaced by a file", "replaced by another cache"])
def test_a_directory_that_vanishes_in_mid_run_is_filled_anew_where_it_can_be(source, tmp_path, warnings, fate):
    directory = tmp_path / "cache"
    shutil.copytree(source, directory)
    run = Run(directory)
    run.steps(100, 4)
    if fate == "emptied":
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        shutil.rmtree(directory)
    if fate == "replaced by a file":
        directory.write_text("no directory")
    elif fate == "replaced by another cache":
        shutil.copytree(source, directory)
    run.steps(SMALL + 200, LARGE + 4)
    assert run.count("disk_errors") > 0
    assert len(warnings) <= 1
    if fate != "replaced by a file":
        again = Run(directory)
        again.steps(SMALL + 200, LARGE + 4)
        assert again.count("disk_hits") >= 150
        assert again.count("disk_errors") == 0
