"""``torchcache.audit`` computes a sample of hits again, and says which rows differ."""

import pytest
import torch
from torch import nn

import torchcache
from torchcache.errors import ArgumentError


@pytest.fixture(params=["eager", "transform", "compile"])
def model(request, tmp_path):
    backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    options = {"persistent": True, "persistent_cache_dir": str(tmp_path), "freeze": True, "audit": 0}
    whole = nn.Sequential(torchcache.mark(backbone, **options), nn.Linear(8, 2))
    if request.param == "transform":
        return torchcache.transform(whole)
    if request.param == "compile":
        return torch.compile(whole, backend=torchcache.torchcache_backend, options={"inner": "eager"})
    return whole


def test_a_sample_of_hits_is_computed_again_and_agrees(model):
    x = torch.randn(20, 4)
    first = torchcache.audit(model, x)
    assert not first.ok
    assert [region.recomputed for region in first.regions] == [0]
    assert "NOTHING COMPARED" in str(first)
    assert "no row was served" in str(first)
    again = torchcache.audit(model, x, rows=5)
    assert again.ok
    (region,) = again.regions
    assert (region.memory_rows, region.disk_rows, region.recomputed) == (20, 0, 5)
    assert region.wrong == ()
    assert "audit: ok" in str(again)


def test_rows_that_differ_are_named(model):
    x = torch.randn(20, 4)
    with torchcache.sample_keys(range(20)):
        model(x)
    new = torch.cat([torch.randn(3, 4), x])
    with torchcache.sample_keys([100, 101, 102, 7, *range(1, 20)]):
        found = torchcache.audit(model, new, rows=100)
    assert not found.ok
    (region,) = found.regions
    assert (region.memory_rows, region.recomputed) == (20, 20)  # those that it computed are right
    assert region.wrong == (3,)
    assert region.largest_absolute > 0.1
    assert "WRONG ROWS" in str(found)


def test_rows_from_disk_are_audited_as_those_from_memory(tmp_path):
    source = nn.Linear(4, 8)

    def run():
        backbone = nn.Linear(4, 8)
        backbone.load_state_dict(source.state_dict())
        return torchcache.mark(backbone, freeze=True, persistent=True, persistent_cache_dir=str(tmp_path))

    x = torch.randn(6, 4)
    run()(x)
    torchcache.flush()
    (region,) = torchcache.audit(run(), x).regions
    assert (region.memory_rows, region.disk_rows, region.recomputed) == (0, 6, 6)
    assert region.wrong == ()


def test_a_wrong_sample_id_is_found():
    backbone = torchcache.mark(nn.Linear(4, 8), freeze=True, audit=0)
    x = torch.randn(6, 4)
    with torchcache.sample_keys(range(6)):
        backbone(x)
    with torchcache.sample_keys([0, 1, 2, 4, 3, 5]):
        found = torchcache.audit(backbone, x)
    assert found.regions[0].wrong == (3, 4)


def test_a_mark_that_is_refused_is_not_ok_and_says_why():
    class Mixing(nn.Module):
        def forward(self, x):
            return x / 255 if x.max() > 1 else x * 1

    backbone = torchcache.mark(Mixing())
    x = torch.rand(6, 4)
    backbone(x)
    x[2] *= 255
    backbone(x)
    found = torchcache.audit(backbone, x)
    assert not found.ok
    (region,) = found.regions
    assert (region.recomputed, region.wrong) == (0, ())
    assert "other rows" in region.reason
    assert "NOTHING COMPARED" in str(found)
    assert "Mixing was computed: a row's output" in str(found)


def test_arguments_are_checked_and_a_model_without_a_region_says_so():
    plain = nn.Linear(4, 8)
    with pytest.raises(ArgumentError, match="rows"):
        torchcache.audit(plain, torch.randn(2, 4), rows=0)
    assert "nothing was looked up" in str(torchcache.audit(plain, torch.randn(2, 4)))
