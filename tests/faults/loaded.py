"""Training through the loader on a cache directory, and pages in place of those that it keeps there of samples."""

import io
import json
import pickle

import torch
from torch import nn
from torch.utils import data
from trained import WrongRowError, begin_anew

import torchcache
from torchcache.digest.cpu import digest_bytes
from torchcache.store.blob import Codec, RowSpec
from torchcache.store.header import read_header

COUNT, BATCH = 24, 8
RAN = []


class Samples(data.Dataset):
    """Tensors that are large enough to be left out, with labels."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return torch.randn(20, 20, generator=torch.Generator().manual_seed(index)), index % 5


class Body(nn.Module):
    """Right to the bit in any batch."""

    def forward(self, x):
        return x.flatten(1).cumsum(1)


def epochs(directory, count=2):
    """Train with a new loader, and look at every batch; what it says of its samples after each epoch."""
    begin_anew(directory)
    place = {"persistent": True, "persistent_cache_dir": directory}
    loader = torchcache.DataLoader(Samples(), batch_size=BATCH, check=1.0, **place)
    body = torchcache.mark(Body(), **place)
    told = []
    for _ in range(count):
        for batch, ((x, y), (wanted, labels)) in enumerate(
            zip(loader, data.DataLoader(Samples(), batch_size=BATCH), strict=True)
        ):
            right = torch.equal(body(x), Body()(wanted)) and torch.equal(y, labels)
            # What is read in every batch would be loaded from then on.
            if not right or (batch == 0 and not torch.equal(x + 0, wanted)):
                raise WrongRowError(f"batch {batch} of the loader")
        told.append(torchcache.stats(loader))
    torchcache.flush()
    return told


class Planted:
    def __reduce__(self):
        return RAN.append, ("executed",)


def page(values, structures=("",), number=0, digests="00" * 16):
    """A page with all samples, each with these values."""
    held = [[index, number, digests, values] for index in range(COUNT)]
    return json.dumps({"structures": list(structures), "samples": held}).encode()


FORGED = {
    "pickle": pickle.dumps(Planted()),
    "no JSON": b"\xff" * 1000,
    "nested": b"[" * 400_000,
    "a list": b"[]",
    "no samples": b'{"structures": []}',
    "a number of a structure": page([1], number=7),
    "a negative number": page([1], number=-1),
    "structures that are no text": page([1], structures=[{}]),
    "no digests": page([1], digests=""),
    "digests that are none": page([1], digests="zz"),
    "half a digest": page([1], digests="00" * 7),
    "no values": page([]),
    "an unknown value": page([["x", "y"]]),
    "an array of objects": page([["a", "|O", [1], "AAAAAAAAAAA="]]),
    "a dtype that is a dict": page([["a", {"names": ["a"], "formats": ["O"]}, [1], "AAAAAAAAAAA="]]),
    "a shape without end": page([["t", "float32", [0, 10**18], ""]]),
    "a shape that does not fit": page([["t", "float32", [10**12], "AAAA"]]),
    "no dtype of tensors": page([["t", "Tensor", [1], "AAAA"]]),
    "a float that is none": page([["f", "__import__('os')"]]),
    "a large number": b'{"structures": [""], "samples": [[' + b"9" * 100_000 + b"]]}",
    "a text of a megabyte": b'{"structures": ["' + b"x" * 1_000_000 + b'"], "samples": []}',
    "lists of lists": b'{"structures": [], "samples": [' + b"[],[[]]," * 100_000 + b"[]]}",
}


def pages(directory, connection):
    """Where pages of samples are: place, region, key and blob."""
    names = {path.stem: json.loads(path.read_text())["name"] for path in (directory / "regions").iterdir()}
    held = connection.execute("SELECT rowid, tag, key, value FROM Cache").fetchall()
    return [entry for entry in held if names.get(entry[1], "").startswith("samples of ")]


def multiply(directory, connection, page, count):
    """Put ``count`` more pages after the first, which is as it was."""
    (tag, first) = next(
        (tag, key) for _, tag, key, _ in pages(directory, connection) if key[16:] == digest_bytes(b"page 0")
    )
    row = torch.frombuffer(bytearray(page), dtype=torch.uint8)[None]
    codec = Codec(RowSpec.of([row]), 1)
    connection.execute("BEGIN")
    for number in range(1, count + 1):
        key = first[:16] + digest_bytes(b"page %d" % number)
        columns = "(key, raw, store_time, tag, size, mode, value) VALUES (?, 1, 1.0, ?, 0, 1, ?)"
        blob = codec.encode([key], [row])[0]
        connection.execute(f"INSERT OR REPLACE INTO Cache {columns}", (key, tag, blob))
    connection.execute("COMMIT")


def forge(directory, connection, change):
    """Put ``change(page)`` in place of every page of samples; how many there are."""
    held = pages(directory, connection)
    for place, _, key, blob in held:
        page = Codec(read_header(io.BytesIO(blob)).spec).decode([key], [blob])[1][0]
        row = torch.frombuffer(bytearray(change(page.numpy().tobytes())), dtype=torch.uint8)[None]
        forged = Codec(RowSpec.of([row]), 1).encode([key], [row])[0]
        connection.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (forged, place))
    return len(held)


def change(page, chance):
    """A page with samples that are not so, or of other types."""
    held = json.loads(page)
    for sample in chance.sample(held["samples"], chance.choice([1, 5, len(held["samples"])])):
        part = chance.choice([0, 1, 2, 3])
        value = chance.choice([None, -1, 2**70, 0.5, "", "ff" * 16, [], [[]], {}, [1, 2], [["t", "int64", [], "AAAA"]]])
        sample[part] = chance.choice([value, chance.choice(held["samples"])[part]])
    return json.dumps(held).encode()
