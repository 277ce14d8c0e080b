"""Pages of remembered samples that others wrote: nothing of them is executed or believed, and they end nothing."""

import contextlib
import random
import shutil
import sqlite3

import loaded
import pytest

from torchcache.cli.main import main
from torchcache.store import note
from torchcache.store.blob import Codec


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loaded") / "cache"
    loaded.epochs(directory)
    return directory


@pytest.fixture
def cache(source, tmp_path):
    return shutil.copytree(source, tmp_path / "cache")


@contextlib.contextmanager
def connected(cache):
    with contextlib.closing(sqlite3.connect(cache / "rows-1" / "cache.db", isolation_level=None)) as connection:
        yield connection


def forge(cache, change):
    with connected(cache) as connection:
        assert loaded.forge(cache, connection, change)


def test_what_others_remembered_is_taken(cache):
    forge(cache, lambda page: page)
    assert loaded.epochs(cache)[0].skipped > 0


@pytest.mark.parametrize("name", loaded.FORGED)
def test_forged_pages_of_samples_are_ignored(cache, name):
    forge(cache, lambda page: loaded.FORGED[name])
    assert loaded.epochs(cache)[0].skipped == 0
    assert main(["info", str(cache)]) == 0
    assert not loaded.RAN


@pytest.mark.parametrize("seed", range(20))
def test_samples_that_are_not_so_are_not_served(cache, seed):
    forge(cache, lambda page: loaded.change(page, random.Random(seed)))
    loaded.epochs(cache)


class Counted(Codec):
    decoded = 0

    def decode(self, keys, blobs):
        Counted.decoded += 1
        return super().decode(keys, blobs)


@pytest.mark.parametrize("name", ["lists of lists", "a text of a megabyte"])
def test_pages_without_end_are_not_read_to_the_end(cache, monkeypatch, name):
    with connected(cache) as connection:
        loaded.multiply(cache, connection, loaded.FORGED[name], 300)
    monkeypatch.setattr(Counted, "decoded", 0)
    monkeypatch.setattr(note, "Codec", Counted)
    loaded.epochs(cache)
    assert 1 < Counted.decoded < 100
