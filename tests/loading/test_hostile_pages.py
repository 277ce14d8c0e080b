"""Remembered samples of a directory that others wrote: forged pages execute nothing and end nothing."""

import json
import pickle

import image_files
import pytest
import torch
from torch import nn

import torchcache
from torchcache.loading import pages

SEEN = []


class Planted:
    def __reduce__(self):
        return SEEN.append, ("executed",)


def samples(values, structures=("",), number=0, digests="00" * 16):
    held = [[index, number, digests, values] for index in range(24)]
    return json.dumps({"structures": list(structures), "samples": held}).encode()


FORGED = {
    "pickle": pickle.dumps(Planted()),
    "no JSON": b"\xff" * 1000,
    "nested": b"[" * 400_000,
    "a list": b"[]",
    "no samples": b'{"structures": []}',
    "a number of a structure": samples([1], number=7),
    "a negative number": samples([1], number=-1),
    "structures that are no text": samples([1], structures=[{}]),
    "no digests": samples([1], digests=""),
    "digests that are none": samples([1], digests="zz"),
    "half a digest": samples([1], digests="00" * 7),
    "no values": samples([]),
    "an unknown value": samples([["x", "y"]]),
    "an array of objects": samples([["a", "|O", [1], "AAAAAAAAAAA="]]),
    "a dtype that is a dict": samples([["a", {"names": ["a"], "formats": ["O"]}, [1], "AAAAAAAAAAA="]]),
    "a shape without end": samples([["t", "float32", [0, 10**18], ""]]),
    "a shape that does not fit": samples([["t", "float32", [10**12], "AAAA"]]),
    "no dtype of tensors": samples([["t", "Tensor", [1], "AAAA"]]),
    "a float that is none": samples([["f", "__import__('os')"]]),
    "a large number": b'{"structures": [""], "samples": [[' + b"9" * 100_000 + b"]]}",
}


def epoch(loader, model):
    torch.manual_seed(1)
    return [(x.clone() + 0, y, model(x)) for x, y in loader]


@pytest.mark.parametrize("forged", FORGED)
def test_forged_pages_of_samples_are_ignored(forged, tmp_path, monkeypatch):
    files = image_files.Files(tmp_path / "files", 24)
    directory = tmp_path / "cache"

    def loader():
        return torchcache.DataLoader(files, batch_size=8, persistent=True, persistent_cache_dir=directory)

    model = image_files.encoder()
    with monkeypatch.context() as planting:
        planting.setattr(pages, "_encoded", lambda held: iter([FORGED[forged]]) if held else iter(()))
        first = loader()
        epoch(first, model)
        epoch(first, model)
        torchcache.flush()
    read, decode = [], pages._decoded
    monkeypatch.setattr(pages, "_decoded", lambda key, blob: read.append(key) or decode(key, blob))
    twin = torch.utils.data.DataLoader(files, batch_size=8)
    for _ in range(2):
        for (x, y, out), (want, label) in zip(epoch(loader(), model), twin, strict=True):
            assert torch.equal(x, want)
            assert torch.equal(y, label)
            torch.testing.assert_close(out, nn.Sequential(*model)(want))
    assert read, "no forged page was read"
    assert not SEEN
