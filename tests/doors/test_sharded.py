"""Marks in models that are sharded: what exchanges data with other processes runs in all of them, at each call."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from marked import reasons
from torch import nn

import torchcache

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

RANKS = """
    import os, sys, torch, torchcache
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, how = dist.get_rank(), sys.argv[1]
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))

    def losses(marked):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16)).eval().requires_grad_(False)
        model = nn.Sequential(backbone, nn.Linear(16, 4))
        if marked:
            torchcache.mark(backbone, persistent_module_hash="backbone", pure=True)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for part in {"blocks": [backbone[0], backbone[2]], "whole": [backbone], "root": []}[how]:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer, found = torch.optim.SGD(model[1].parameters(), lr=0.05), []
        for epoch in range(5):
            order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))[rank::2]
            for rows in order.split(4):
                loss = model(x[rows]).pow(2).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        return found, torchcache.stats(backbone) if marked else None

    plain, _ = losses(False)
    ours, stats = losses(True)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert (stats.hits > 0) == (how != "blocks"), stats
    if how == "blocks":
        reason, = {reason for region in stats.regions for reason in region.reasons}
        assert reason == "0 exchanges data with other processes, which must all take part", reason
    dist.barrier()
    os._exit(0)  # tearing gloo down ends a process now and then, without a mark as well
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "whole", "root"])
def test_ranks_that_find_other_rows_train_as_without_a_cache(tmp_path, how):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(RANKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def two_processes():
    """The first of two processes, as it sees itself."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def sharded(part, mesh):
    from torch.distributed.fsdp import fully_shard

    fully_shard(part[0], mesh=mesh)


def split(part, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(part[0], mesh, ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate()))


def wrapped(part, mesh):
    part[0].requires_grad_(True)
    part[0] = nn.parallel.DistributedDataParallel(part[0])


def wrapped_and_sharded(part, mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel

    part[0] = FullyShardedDataParallel(part[0], device_id=torch.device("cpu"))


@pytest.mark.parametrize("name", [None, "by name"])
@pytest.mark.parametrize("how", [sharded, split, wrapped, wrapped_and_sharded])
@pytest.mark.parametrize("function", [False, True], ids=["a module", "a function"])
@pytest.mark.filterwarnings("ignore")
def test_what_exchanges_data_is_computed_whatever_it_is_called(two_processes, how, name, function):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    marked = torchcache.cached(persistent_module_hash=name, pure=True)(lambda x: net(x)) if function else net
    if not function:
        torchcache.mark(net, freeze=True, persistent_module_hash=name, pure=True)
    how(net, two_processes)
    for _ in range(6):
        with torch.no_grad():
            marked(torch.randn(6, 4))
    assert reasons(marked).endswith(" exchanges data with other processes, which must all take part")
    assert torchcache.stats(marked).bypasses == 36


def test_what_is_sharded_after_it_was_cached(two_processes, warnings):
    net, x = torchcache.mark(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), freeze=True), torch.randn(6, 4)
    for _ in range(3):
        net(x)
    assert torchcache.stats(net).hits
    sharded(net, two_processes)
    net(x)
    assert "leave the marked module unsharded, or shard it as a whole and name it" in "".join(warnings)


def test_a_mark_that_is_sharded_is_told_of_as_such(two_processes):
    net = torchcache.mark(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), freeze=True)
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=two_processes)
    net(torch.randn(6, 4))
    assert "each process has a part of its weights" in reasons(net)
