"""The disk tier through the public API: second processes, damage, versions, limits."""

import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import torchcache

RUN = """
    import sys, torch, torchcache
    from torch import nn
    from torchcache import cached

    directory, door, seed, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

    @cached(persistent=True, persistent_cache_dir=directory)
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 10)
            self.names = {"a", "b", "c", "d"}
            self.eval(); self.requires_grad_(False)
        def forward(self, x, scale=2):
            return {"features": self.linear(x) * scale, "sum": x.sum(1)}

    class Model(nn.Module):
        def __init__(self):
            super().__init__(); self.backbone = Backbone(); self.head = nn.Linear(10, 3)
        def forward(self, x):
            out = self.backbone(x)
            return self.head(out["features"]) + out["sum"][:, None]

    torch.manual_seed(seed)
    model = Model()
    torch.manual_seed(0)
    data = torch.randn(20, 10)
    expected = model.head(model.backbone.linear(data) * 2) + data.sum(1)[:, None]
    if door == "transform":
        run = torchcache.transform(model)
    elif door == "compile":
        run = torch.compile(model, backend="torchcache", options={"inner": "aot_eager"})
    else:
        run = model
    for start in range(0, 20, batch):
        torch.testing.assert_close(run(data[start:start + batch]), expected[start:start + batch])
    assert door == "compile" or "torch._dynamo" not in sys.modules  # which takes as long to import as torch
    stats = torchcache.stats(run)
    print(stats.misses, sum(r.disk_hits for r in stats.regions))
"""


def run(directory, door="transform", seed=1, batch=5, environment=None):
    """Misses and disk hits of one process that sees 20 rows."""
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(directory), door, str(seed), str(batch)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}, check=False
    )
    assert done.returncode == 0, done.stderr
    misses, hits = map(int, done.stdout.split())
    return misses, hits, done.stderr


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """What one process stored."""
    directory = tmp_path_factory.mktemp("once")
    assert run(directory)[:2] == (20, 0)
    return directory


@pytest.fixture
def filled(once, tmp_path):
    """A copy of what one process stored."""
    return shutil.copytree(once, tmp_path / "cache")


@pytest.mark.parametrize(
    ("door", "batch"), [("eager", 8), ("compile", 7), pytest.param("transform", 1, marks=pytest.mark.slow)]
)
def test_a_second_process_finds_every_row(filled, door, batch):
    assert run(filled, door, batch=batch, environment={"PYTHONHASHSEED": "7"})[:2] == (0, 20)


def test_a_second_process_with_other_weights_finds_none(filled):
    assert run(filled, seed=2)[:2] == (20, 0)


def test_damaged_rows_are_computed_anew(filled):
    database = next(filled.rglob("cache.db"))
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT rowid, value FROM Cache").fetchall()
        for rowid, value in rows[:7]:
            changed = bytearray(value)
            changed[len(changed) // 2] ^= 1
            connection.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (bytes(changed), rowid))
    misses, hits, log = run(filled)
    assert (misses, hits) == (7, 13)
    assert log.count("WARNING") == 1
    assert run(filled)[:2] == (0, 20)


@pytest.mark.parametrize("harm", ["garbage", "file", pytest.param("deleted", marks=pytest.mark.slow)])
def test_a_broken_store_costs_speed_and_not_the_run(filled, harm):
    directory = filled
    database = next(directory.rglob("cache.db"))
    if harm == "garbage":
        for path in database.parent.glob("cache.db*"):
            path.write_bytes(os.urandom(8192))
    elif harm == "file":
        directory = directory / "torchcache.json"
    else:
        database.unlink()
    misses, _, log = run(directory)
    assert misses == 20
    if harm != "deleted":
        assert log.count("WARNING") == 1


def test_the_directory_vanishing_in_mid_run_is_survived(tmp_path):
    directory = tmp_path / "cache"
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, persistent=True, persistent_cache_dir=directory)
    x = torch.randn(8, 4)
    module(x)
    torchcache.flush()
    shutil.rmtree(directory)
    for _ in range(2):
        y = torch.randn(8, 4)
        torch.testing.assert_close(module(y), nn.functional.linear(y, module.weight, module.bias))
        torchcache.flush()


def test_the_size_limit_holds_over_runs(tmp_path):
    def fill(seed):
        torch.manual_seed(0)
        module = nn.Linear(4, 5000)
        torchcache.mark(
            module, freeze=True, persistent=True, persistent_cache_dir=tmp_path, max_persistent_cache_size=400_000
        )
        torch.manual_seed(seed)
        for _ in range(6):
            module(torch.randn(4, 4))
            torchcache.flush()
        return sum(region.rows_written for region in torchcache.stats(module).regions)

    first, second = fill(1), fill(2)
    assert first > 10
    assert second == 0
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".db")
    assert used <= 400_000


def test_the_users_own_name_replaces_the_fingerprint(tmp_path):
    def build(name):
        return torchcache.mark(
            nn.Linear(4, 4), freeze=True, persistent=True, persistent_cache_dir=tmp_path, persistent_module_hash=name
        )

    x = torch.randn(3, 4)
    first = build("v1")
    expected = first(x)
    torchcache.flush()
    again = build("v1")
    again.load_state_dict(first.state_dict())
    again.note = "of no consequence"
    torch.testing.assert_close(again(x), expected)
    assert torchcache.stats(again).hits == 3
    for name in ("v2", "v1"):  # a name that is used for other weights is found out
        other = build(name)
        for _ in range(2):
            torch.testing.assert_close(other(x), nn.functional.linear(x, other.weight, other.bias))
        assert torchcache.stats(other).regions[0].alarms == (name == "v1")


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(1, 2, 60_000) if FLAT else torch.randn(60_000))

    def forward(self, x):
        return x[:, :1] * self.table, x.long()


FLAT = False


@pytest.mark.once
@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("harm", ["none", "flipped", "cut", "longer", "empty", "gone", "folder"])
def test_large_rows_are_files_of_their_own_and_checked(tmp_path, level, flat, harm, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FLAT", flat)

    def module():
        torch.manual_seed(0)
        return torchcache.mark(
            Wide(), freeze=True, persistent=True, persistent_cache_dir=tmp_path, zstd_compression_level=level
        )

    x = torch.randn(6, 3)
    expected = module()(x)
    torchcache.flush()
    files = sorted(tmp_path.rglob("*.val"))
    assert len(files) == (0 if flat and level else 6)
    for path in files[:2]:
        content = path.read_bytes()
        if harm == "flipped":
            path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
        elif harm == "cut":
            path.write_bytes(content[:-1])
        elif harm == "longer":
            path.write_bytes(content + bytes(10_000_000))
        elif harm == "empty":
            path.write_bytes(b"")
        elif harm in ("gone", "folder"):
            path.unlink()
            if harm == "folder":
                path.mkdir()
    again = module()
    for found, wanted in zip(again(x[[5, 0, 1, 2, 3, 4]]), expected, strict=True):
        torch.testing.assert_close(found, wanted[[5, 0, 1, 2, 3, 4]])
    stats = torchcache.stats(again)
    assert stats.misses == (0 if harm == "none" or not files else 2)
    torchcache.flush()
    repaired = module()
    torch.testing.assert_close(repaired(x)[0], expected[0])
    assert torchcache.stats(repaired).misses == 0


def test_rows_too_large_for_memory_come_from_disk(tmp_path):
    module = torchcache.mark(
        nn.Linear(4, 4), freeze=True, persistent=True, persistent_cache_dir=tmp_path, max_memory_cache_size=32
    )
    x = torch.randn(6, 4)
    expected = nn.functional.linear(x, module.weight, module.bias)
    for rows in (range(6), range(6), [5, 5, 0, 1], [3]):
        torch.testing.assert_close(module(x[list(rows)]), expected[list(rows)])
        torchcache.flush()
    (region,) = torchcache.stats(module).regions
    assert region.misses == 6
    assert region.disk_hits == 4 + 1 + 1
