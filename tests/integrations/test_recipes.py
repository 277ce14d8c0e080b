"""Several processes on one machine: plain DistributedDataParallel and accelerate, one disk tier for all ranks."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

MODEL = """
    import json, os, sys, torch, torchcache
    import torch.distributed as dist
    from torch import nn
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16)).requires_grad_(False)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.backbone(x))

    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randint(3, (40,), generator=generator))

    def report(model, head, rank):
        region, = torchcache.stats(model).regions
        found = [region.misses, region.memory_hits, region.disk_hits, region.bypasses]
        with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as told:
            json.dump([found, head.weight.tolist()], told)
"""

DDP = """
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = Model()
    if sys.argv[2] != "plain":
        torchcache.mark(model.backbone, persistent=True)
        torchcache.transform(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    sampler = DistributedSampler(data)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data, batch_size=5, sampler=sampler):
            nn.functional.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        torchcache.flush()
        dist.barrier()
    if sys.argv[2] == "plain":
        with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as told:
            json.dump([[], model.head.weight.tolist()], told)
    else:
        report(model, model.head, rank)
    dist.destroy_process_group()
"""

ACCELERATE = """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Model()
    if sys.argv[2] != "plain":
        torchcache.mark(model.backbone, persistent=True)
        torchcache.transform(model)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=5, shuffle=True))
    if sys.argv[2] == "warm":
        done = torchcache.warm(wrapped, loader, progress=False)
        assert done.misses == 20, done
    torch.manual_seed(7)
    for epoch in range(4):
        for x, y in loader:
            accelerator.backward(nn.functional.cross_entropy(wrapped(x), y))
            optimizer.step()
            optimizer.zero_grad()
        torchcache.flush()
        accelerator.wait_for_everyone()
    rank = accelerator.process_index
    if sys.argv[2] == "plain":
        with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as told:
            json.dump([[], model.head.weight.tolist()], told)
    else:
        report(model, accelerator.unwrap_model(wrapped).head, rank)
    accelerator.end_training()
"""


def ranks(tmp_path, training, how):
    """What each of two ranks counted, and its head, after a run of its own."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(MODEL) + textwrap.dedent(training))
    environment = {**os.environ, "TORCHCACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    told = subprocess.run([*command, str(tmp_path), how], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("training", [DDP, ACCELERATE], ids=["ddp", "accelerate"])
def test_ranks_train_as_without_a_cache_and_share_the_disk(tmp_path, training):
    if training is ACCELERATE:
        pytest.importorskip("accelerate")
    _, (plain, _) = ranks(tmp_path, training, "plain")
    counts, heads = ranks(tmp_path, training, "cached")
    for head in heads:
        for row, expected in zip(head, plain, strict=True):
            assert row == pytest.approx(expected, abs=1e-6)
    for misses, memory, disk, bypasses in counts:
        assert misses + memory + disk == 80
        assert disk > 0, "what the other rank computed comes from disk"
        assert bypasses == 0
    # A row is computed by the rank that has it first, and by no other.
    assert sum(misses for misses, *_ in counts) == 40
    counts, _ = ranks(tmp_path, training, "cached")
    assert [misses for misses, *_ in counts] == [0, 0]


@pytest.mark.slow
def test_accelerate_loaders_are_divided_already(tmp_path):
    pytest.importorskip("accelerate")
    counts, _ = ranks(tmp_path, ACCELERATE, "warm")
    assert [misses for misses, *_ in counts] == [20, 20]
