"""export, import and merge, on caches that a real model filled."""

import json
import os
import shutil
import sqlite3
import struct

import pytest
import torch
from filled import ROWS, Model, data, run
from torch import nn

import torchcache
from torchcache.digest.rows import digest_rows
from torchcache.store.pack import rows_in
from torchcache.store.records import Records

load_file = pytest.importorskip("safetensors.torch").load_file


def blobs(directory):
    """Region and blob of each row, wherever it is."""
    with Records(directory) as records:
        return {key: (entry.tag, blob) for entry in records.entries() for key, blob in entry.rows().items()}


def test_what_is_exported_are_the_features_and_the_digests_of_their_inputs(cache, tmp_path, torchcache_json):
    out = tmp_path / "text.safetensors"
    done = torchcache_json("export", cache, out, "--region", "text")
    assert done["rows"] == ROWS
    tensors = load_file(out)
    assert set(tensors) == {"leaf0", "digests"}
    expected = dict(zip(digest_rows([data()], "xxh3_128"), Model(cache).text(data()), strict=True))
    digests = [row.numpy().tobytes() for row in tensors["digests"]]
    assert digests == sorted(expected)
    torch.testing.assert_close(tensors["leaf0"], torch.stack([expected[digest] for digest in digests]))


class Odd(nn.Module):
    """Leaves of many kinds: dtypes that the format does not name, scalars, empty rows."""

    def forward(self, x):
        return {
            "double": x.double() * torch.pi,
            "complex": torch.complex(x.double(), -x.double()),
            "half": x.half(),
            "brain": x.bfloat16(),
            "sign": x > 0,
            "count": (x * 100).to(torch.int16).sum(1),
            "nothing": x[:, :0],
        }


def odd(directory):
    return torchcache.mark(Odd(), freeze=True, persistent=True, persistent_cache_dir=directory)


def as_it_is(model):
    return model


@pytest.mark.parametrize("call", ["one", "several"])
def test_an_import_gives_every_bit_back_and_the_model_hits(tmp_path, torchcache_json, call):
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "odd.safetensors"
    inputs = [data()] if call == "one" else [data(), data().half(), data()[:, :7]]
    expected = [run(first, x, odd(first), as_it_is)[0] for x in inputs]
    done = torchcache_json("export", first, out)
    assert done["rows"] == ROWS * len(inputs)
    assert len(done["calls"]) == len(inputs)
    assert len(load_file(out)) == 8 * len(inputs)
    stored = torchcache_json("import", out, second)
    assert (stored["stored"], stored["present"]) == (ROWS * len(inputs), 0)
    assert blobs(first) == blobs(second)
    for x, wanted in zip(inputs, expected, strict=True):
        outputs, misses, hits = run(second, x, odd(second), as_it_is)
        assert (misses, hits) == (0, ROWS)
        assert all(torch.equal(outputs[name], leaf) for name, leaf in wanted.items())
    assert torchcache_json("import", out, second)["present"] == ROWS * len(inputs)
    assert torchcache_json("info", second)["regions"][0]["region"]["name"] == "Odd"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_rows_are_exported_with_their_scales_and_imported_as_they_were(tmp_path, torchcache_json, dtype):
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "scaled.safetensors"

    def model(directory):
        made = nn.Linear(10, 30)
        nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0)), nn.init.zeros_(made.bias)
        options = {"persistent": True, "persistent_cache_dir": directory, "cache_dtype": dtype}
        return torchcache.mark(made, freeze=True, **options)

    exact, _, _ = run(first, None, model(first), as_it_is)
    assert torchcache_json("verify", first)["sound"]
    (call,) = torchcache_json("export", first, out)["calls"]
    assert call["leaves"] == [f"{str(dtype).removeprefix('torch.')} (30,)", "float32 (1,)"]
    tensors = load_file(out)
    values = tensors["leaf0"].float() * tensors["leaf1"]
    expected = dict(zip(digest_rows([data()], "xxh3_128"), exact, strict=True))
    wanted = torch.stack([expected[row.numpy().tobytes()] for row in tensors["digests"]])
    assert ((values - wanted).abs().amax(1) <= 0.072 * wanted.abs().amax(1)).all()
    assert torchcache_json("import", out, second)["stored"] == ROWS
    assert blobs(first) == blobs(second)
    again, misses, hits = run(second, None, model(second), as_it_is)
    assert (misses, hits) == (0, ROWS)
    by_digest = dict(zip(digest_rows([data()], "xxh3_128"), again, strict=True))
    assert torch.equal(torch.stack([by_digest[row.numpy().tobytes()] for row in tensors["digests"]]), values)


def test_one_kind_of_call_can_be_exported_alone(cache, tmp_path, torchcache_json):
    with torch.autocast("cpu", torch.bfloat16):
        run(cache)
    both = torchcache_json("export", cache, tmp_path / "both", "--region", "text")["calls"]
    assert sorted(load_file(tmp_path / "both")) == ["call0.digests", "call0.leaf0", "call1.digests", "call1.leaf0"]
    wanted = next(call for call in both if call["leaves"] == ["bfloat16 (800,)"])
    done = torchcache_json("export", cache, tmp_path / "one", "--region", "text", "--call", wanted["call"][:8])
    assert done["calls"] == [wanted | {"prefix": ""}]
    assert load_file(tmp_path / "one")["leaf0"].dtype == torch.bfloat16


def spoil(directory, chosen="min"):
    """Damage the first or last entry of the database, and say how many rows it has."""
    with sqlite3.connect(directory / "rows-1" / "cache.db") as connection:
        where = f"rowid = (SELECT {chosen}(rowid) FROM Cache WHERE filename IS NULL)"
        ((key,),) = connection.execute(f"SELECT key FROM Cache WHERE {where}")
        connection.execute(f"UPDATE Cache SET value = zeroblob(50) WHERE {where}")
    return rows_in(key)


def test_damaged_rows_are_not_exported(cache, tmp_path, torchcache_json):
    lost = spoil(cache)
    done = torchcache_json("export", cache, tmp_path / "out", "--region", "text", code=1)
    assert (done["rows"], done["damaged"]) == (ROWS - lost, lost)
    assert load_file(tmp_path / "out")["leaf0"].shape == (ROWS - lost, 800)


def lies(header, about):
    """Each way in which a header can lie, done to it."""
    leaf, call = header["leaf0"], about["calls"][0]
    start, stop = leaf["data_offsets"]
    return {
        "no header": lambda: None,
        "offsets": lambda: leaf.update(data_offsets=[0, 2**62]),
        "offsets backwards": lambda: leaf.update(data_offsets=[stop, start]),
        "negative offsets": lambda: leaf.update(data_offsets=[-8, stop - start - 8]),
        "one offset": lambda: leaf.update(data_offsets=[start]),
        "texts for offsets": lambda: leaf.update(data_offsets="ab"),
        "dtype": lambda: leaf.update(dtype="I32"),
        "no dtype": lambda: leaf.pop("dtype"),
        "a list for a dtype": lambda: leaf.update(dtype=["F32"]),
        "a scalar": lambda: leaf.update(shape=[]),
        "a wide shape": lambda: leaf.update(shape=[ROWS, 0, 2**62, 2**62], data_offsets=[start, start]),
        "a deep shape": lambda: leaf.update(shape=[ROWS, *[1] * 100, 800]),
        "many empty rows": lambda: leaf.update(shape=[2**62, 0], data_offsets=[start, start]),
        "a number for a tensor": lambda: header.update(leaf0=7),
        "shared bytes": lambda: header.update(more=dict(leaf)),
        "a list of metadata": lambda: header.update(__metadata__=["torchcache"]),
        "a number in metadata": lambda: header["__metadata__"].update(more=7),
        "digests": lambda: header.pop("digests"),
        "prefix": lambda: call.update(prefix=7),
        "call": lambda: call.update(call="12"),
        "a number for a call": lambda: call.update(call=12),
        "no leaves": lambda: call.update(leaves=[]),
        "a text for leaves": lambda: call.update(leaves="float32"),
        "many leaves": lambda: call.update(leaves=["float32"] * 300),
        "a foreign dtype": lambda: call.update(leaves=["float99 (800,)"]),
        "a quantized dtype": lambda: call.update(leaves=["qint8 (800,)"]),
        "another width": lambda: call.update(leaves=["complex128 (800,)"]),
        "a function for a dtype": lambda: call.update(leaves=["load (800,)"]),
        "one call many times": lambda: about.update(calls=[call] * 20_000),
        "no calls": lambda: about.pop("calls"),
        "a number for calls": lambda: about.update(calls=7),
        "a list for options": lambda: about.update(options=[]),
        "tag": lambda: about.update(tag="../../../../escaped"),
    }


LIES = [*lies({"leaf0": {"data_offsets": [0, 0]}}, {"calls": [{}]}), "cut", "length", "text", "deep metadata", "sparse"]


@pytest.mark.parametrize("harm", LIES)
def test_a_file_that_export_did_not_write_is_refused(cache, tmp_path, torchcache_command, harm):
    path = tmp_path / "file"
    torchcache_command("export", cache, path, "--region", "text")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["torchcache"])
    lies(header, about).get(harm, lambda: None)()
    if isinstance(header["__metadata__"], dict):
        header["__metadata__"]["torchcache"] = json.dumps(about) if harm != "deep metadata" else "[" * 100_000
    text = json.dumps(header).encode() if harm not in ("text", "no header") else b"[" * 100_000
    text = b'"__metadata__"' if harm == "no header" else text
    start = struct.pack("<Q", 2**63 if harm == "length" else len(text))
    path.write_bytes((start + text + content[8 + length :])[: -1000 if harm == "cut" else None])
    if harm == "sparse":
        with open(path, "r+b") as file:
            file.truncate(2**40)
    code, out, err = torchcache_command("import", path, tmp_path / "new")
    assert code == 2, out
    assert "Traceback" not in err
    assert "tells more" not in err  # it was foreseen
    assert not list((tmp_path / "new").rglob("escaped*"))


def test_import_waits_for_no_pipe(tmp_path, torchcache_command):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = torchcache_command("import", tmp_path / "pipe", tmp_path / "new")
    assert code == 2
    assert "no regular file" in err


def test_merging_joins_what_two_machines_filled(tmp_path, torchcache_json):
    first, second, both = (tmp_path / name for name in ("first", "second", "both"))
    x = data(60)
    run(first, x[:40])
    run(second, x[20:])
    merged = torchcache_json("merge", first, second, both)
    assert (merged["stored"], merged["present"], merged["damaged"]) == (2 * 60, 2 * 20, 0)
    assert blobs(both) == blobs(first) | blobs(second)
    assert run(both, x)[1:] == (0, 2 * 60)
    assert torchcache_json("verify", both)["sound"]


def test_merging_takes_no_damaged_row_and_mends_those_of_the_target(tmp_path, torchcache_json):
    first, second = tmp_path / "first", tmp_path / "second"
    run(first)
    shutil.copytree(first, second)
    lost, lacking = spoil(first, "min"), spoil(second, "max")
    merged = torchcache_json("merge", first, second, code=1)
    assert (merged["stored"], merged["present"], merged["damaged"]) == (lacking, 2 * ROWS - lacking - lost, lost)
    assert torchcache_json("verify", second)["checked"] == 2 * ROWS
    assert torchcache_json("verify", second)["sound"]


def test_a_merge_stops_at_the_size_it_was_given(cache, tmp_path, torchcache_json):
    merged = torchcache_json("merge", cache, tmp_path / "small", "--max-size", "2MB", code=1)
    assert merged["left_out"] > 0
    assert merged["stored"] + merged["left_out"] == 2 * ROWS
    assert torchcache_json("info", tmp_path / "small")["volume"] <= 2_100_000


def test_a_directory_is_not_merged_into_itself(cache, torchcache_command):
    code, _, err = torchcache_command("merge", cache, cache / ".." / "cache")
    assert (code, "at once" in err) == (2, True)
