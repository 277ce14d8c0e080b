"""Warming up: the rows are there before training, at no more than the regions cost, and nothing else has changed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from models import CASES, build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchcache
from torchcache.logging import logger
from torchcache.store.disk import DiskTier
from torchcache.store.writer import Writer

CASE = {case.name: case for case in CASES}


HEADS = []


@torch.library.custom_op("torchcache_tests::seen", mutates_args=())
def seen(x: torch.Tensor) -> torch.Tensor:
    """Note that the head ran; an operator, so that it does in traced models, too."""
    HEADS.append(x.shape[0])
    return x.clone()


seen.register_fake(torch.empty_like)
seen.register_autograd(lambda _, gradient: gradient)


class SeenHead(nn.Linear):
    def forward(self, x):
        return seen(super().forward(x))


def prepared(name, door, **options):
    """A cached model whose head is seen when it runs."""
    HEADS.clear()
    case = CASE[name]
    model = build(case)
    model.shows = False
    torchcache.mark(model.backbone, **options)
    model.head = SeenHead(model.head.in_features, 3)
    if door == "transform":
        return torchcache.transform(model)
    if door == "compile":
        return torch.compile(model, backend="torchcache", options={"inner": "eager"})
    if door == "inductor":
        return torch.compile(model, backend="torchcache")
    return model


def loader(name, rows=24, **options):
    torch.manual_seed(3)
    inputs = CASE[name].inputs(rows)
    return DataLoader(TensorDataset(*inputs, torch.arange(rows)), batch_size=8, **options)


def trained(model, data):
    """Logits of one epoch, without the labels."""
    return [model(*inputs) for *inputs, _ in data]


def without_labels(batch):
    return batch[:-1]


@pytest.mark.parametrize("door", ["transform", "compile", "eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "persistent"), [("vit", False), ("bert", True), ("clip", True)])
def test_training_after_a_warm_up_computes_nothing_and_agrees(name, door, persistent):
    model = prepared(name, door, persistent=persistent)
    data = loader(name)
    done = torchcache.warm(model, data, progress=False, batch_to_inputs=without_labels)
    assert (done.rows, done.hits, done.misses) == (24, 0, 24)
    assert done.bytes > 0
    assert done.seconds > 0
    assert HEADS == [8]  # with the first batch, to learn which lookup comes last
    with torchcache.bypass():
        expected = trained(model, data)
    torch.testing.assert_close(trained(model, data), expected)
    stats = torchcache.stats(model)
    assert (stats.hits, stats.misses) == (24, 24)
    again = torchcache.warm(model, data, progress=False, batch_to_inputs=without_labels)
    assert (again.hits, again.misses, again.bytes) == (24, 0, 0)


class Fed(nn.Module):
    """A model that takes its input and optional other things."""

    def __init__(self):
        super().__init__()
        self.backbone = torchcache.mark(nn.Linear(4, 8), freeze=True)
        self.head = nn.Linear(8, 2)


class TakesOne(Fed):
    def forward(self, x):
        return self.head(self.backbone(x))


class TakesOptions(Fed):
    def forward(self, x, mask=None, *, labels=None):
        assert mask is None
        return self.head(self.backbone(x))


class TakesBatch(Fed):
    def forward(self, batch):
        return self.head(self.backbone(batch["x"]))


X, Y = torch.randn(6, 4), torch.arange(6)


@pytest.mark.parametrize(
    ("model", "batch", "options"),
    [
        (TakesOne, X, {}),
        (TakesOne, (X, Y), {}),
        (TakesOne, [X, Y, Y], {}),
        (TakesOne, {"x": X, "labels": Y}, {}),
        (TakesOptions, (X,), {}),
        (TakesOptions, {"x": X, "labels": Y, "id": Y}, {}),
        (TakesOptions, (X, Y), {"batch_to_inputs": lambda batch: batch[0]}),
        (TakesBatch, {"deep": Y, "x": X}, {}),
    ],
)
def test_batches_are_passed_as_the_rule_says(model, batch, options):
    assert torchcache.warm(model(), [batch], progress=False, **options).misses == 6


def test_what_the_rule_does_not_decide_is_not_guessed():
    with pytest.raises(torchcache.ArgumentError, match="TakesOptions takes 1 to 2 of them: say which with"):
        torchcache.warm(TakesOptions(), [(X, Y)], progress=False)


def test_a_model_that_caches_nothing_is_an_error_and_an_empty_batch_is_not():
    model = torchcache.unmark(TakesOne().backbone)
    with pytest.raises(torchcache.MarkError, match="nothing up"):
        torchcache.warm(model, [X], progress=False)
    assert torchcache.warm(TakesOne(), [X[:0], X, X[:3]], progress=False).rows == 9


def test_rows_that_memory_has_no_room_for_are_told(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    for size, full in ((100_000, False), (8 * 8 * 4, True)):
        model = nn.Sequential(torchcache.mark(nn.Linear(4, 8), freeze=True, max_memory_cache_size=size))
        torchcache.warm(model, [torch.randn(6, 4) for _ in range(3)], progress=False)
        assert ("memory of Linear is full at 256 B" in caplog.text) == full


class Uneven(nn.Module):
    """Looks up once or twice a forward, as its input's width says; keeps modes, statistics and chance of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.BatchNorm1d(4)
        self.backbone = torchcache.mark(nn.Linear(4, 4), freeze=True)
        self.drop = nn.Dropout()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        self.drop(self.stem(x[:, :4]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, x.shape[1], 4):
                found = self.backbone(x[:, start : start + 4])
            found = found * 2
        return self.head(found.float())


@pytest.mark.parametrize("door", ["transform", "eager"])
def test_a_model_and_its_surroundings_are_left_as_they_were(door):
    model = Uneven()
    if door == "transform":
        torchcache.transform(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    nesting = torch.autocast_increment_nesting()
    batches = [torch.randn(5, width, generator=torch.Generator().manual_seed(width)) for width in (4, 8, 4, 8)]
    done = torchcache.warm(model, [batches[0], *batches], progress=False)
    assert (done.rows, done.misses) == (35, 15)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.autocast_increment_nesting() == nesting + 1
    for _ in range(2):
        torch.autocast_decrement_nesting()
    assert model.training
    after = model.state_dict()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


def test_ctrl_c_keeps_what_is_done_and_a_second_run_goes_on(tmp_path, capsys, monkeypatch):
    options = {"persistent": True, "persistent_cache_dir": str(tmp_path)}
    batches = list(loader("vit"))
    flushing, written = threading.Event(), []

    def interrupted():
        yield from batches[:2]
        os.kill(os.getpid(), signal.SIGINT)
        yield batches[2]

    def write(tier, entries, *given):
        flushing.wait(10)  # a disk that is slower than the warm-up
        written.extend(entries)
        return write_rows(tier, entries, *given)

    def flush(writer):
        flushing.set()
        return flush_rows(writer)

    write_rows, flush_rows = DiskTier.write, Writer.flush
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    monkeypatch.setattr(DiskTier, "write", write)
    monkeypatch.setattr(Writer, "flush", flush)
    model = prepared("vit", "transform", **options)
    try:
        with pytest.raises(KeyboardInterrupt):
            torchcache.warm(model, interrupted(), batch_to_inputs=without_labels)
    finally:
        signal.signal(signal.SIGINT, before)
    # The batch that was ahead of the signal is lost with it, those before are on disk.
    assert len(written) == 8
    fresh = prepared("vit", "transform", **options)
    done = torchcache.warm(fresh, batches, batch_to_inputs=without_labels)
    assert (done.hits, done.misses) == (8, 16)
    shown = capsys.readouterr().err
    assert "24 rows" in shown
    assert "33% hits" in shown
    assert "stored" in shown


@pytest.mark.slow
def test_a_warm_up_fills_the_disk_for_another_process(tmp_path):
    script = """
        import sys, torch, torchcache
        from torch import nn
        torch.manual_seed(0)
        model = nn.Sequential(torchcache.mark(nn.Linear(4, 8), freeze=True, persistent=True), nn.Linear(8, 2))
        data = [torch.randn(16, 4) for _ in range(3)]
        print(torchcache.warm(torchcache.transform(model), data[: int(sys.argv[1])], progress=False))
    """
    environment = {**os.environ, "TORCHCACHE_DIR": str(tmp_path)}
    told = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), count],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for count in "23"
    ]
    assert "hits=0, misses=32" in told[0]
    assert "hits=32, misses=16" in told[1]


RANKS = """
    import json, os, sys, time, torch, torchcache
    import torch.distributed as dist
    from torch import nn
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    frozen = torchcache.mark(nn.Linear(4, 8), freeze=True, persistent=True)
    model = nn.parallel.DistributedDataParallel(
        torchcache.transform(nn.Sequential(frozen, nn.BatchNorm1d(8), nn.Linear(8, 2)))
    )

    class Rows(TensorDataset):
        read = []

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    data = Rows(torch.randn(40, 4), torch.arange(40))
    torch.manual_seed(dist.get_rank())  # as when each rank shuffles on its own
    kind = sys.argv[1]
    if kind == "sampler":
        loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data))
    elif kind == "generator":
        def generated():
            for at in range(0, 40, 8):
                time.sleep(dist.get_rank())  # the one rank is done long before the other
                yield data.tensors[0][at : at + 8], None

        loader = generated()
    else:
        own = torch.Generator().manual_seed(dist.get_rank()) if kind == "own generator" else None
        loader = DataLoader(data, batch_size=8, shuffle=True, generator=own)
    done = torchcache.warm(model, loader, progress=False)
    loaded = len(data.read)
    everything = DataLoader(data, batch_size=8)
    after = torchcache.warm(model.module, list(everything) * 2, progress=False)
    with open(f"{sys.argv[2]}/{dist.get_rank()}.json", "w") as told:
        json.dump([loaded, done.misses, after.rows, after.hits], told)
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shuffled", "own generator", "sampler", "generator"])
def test_each_rank_takes_its_share_and_finds_those_of_the_others(tmp_path, kind):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    environment = {**os.environ, "TORCHCACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), kind]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    shares = [20, 20] if kind == "sampler" else [24, 16]
    assert [misses for _, misses, *_ in told] == shares
    assert [loaded for loaded, *_ in told] == ([0, 0] if kind == "generator" else shares)
    # Together they have seen all rows: what the one did not compute, it finds on disk.
    assert [found for *_, rows, hits in told for found in (rows, hits)] == [40] * 4
