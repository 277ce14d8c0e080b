"""Threads of one process on one directory, one model, one memory tier."""

import contextlib
import contextvars
import random
import sys
import threading
import time

import numpy as np
import processes
import pytest
import torch
from torch import nn
from trained import Run

import torchcache

THREADS = 8


def together(work):
    """Call ``work`` with the numbers of as many threads; raises what one of them raised."""
    raised = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(processes.HUNG_SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    if raised:
        raise raised[0]


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model a thread"])
def test_threads_read_and_write_right_rows_and_lose_none(tmp_path, shared):
    first = Run(tmp_path / "cache")
    seen = [(set(), set()) for _ in range(THREADS)]

    def work(number):
        chance = random.Random(number)
        run = first if shared else Run(tmp_path / "cache")
        _, *stored = processes.operate(tmp_path / "cache", 40, chance, removals=False, run=run)
        for mine, rows in zip(seen[number], stored, strict=True):
            mine.update(rows)

    together(work)
    again = Run(tmp_path / "cache")
    again.step(sorted(set().union(*(small for small, _ in seen))))
    again.step(sorted(set().union(*(large for _, large in seen))), "large")
    assert again.count("misses") == 0
    assert processes.damaged(tmp_path / "cache") == 0


def test_threads_on_a_directory_that_is_cleared_meanwhile_get_right_rows(tmp_path):
    run = Run(tmp_path / "cache")
    run.steps(20, 2)
    together(lambda number: processes.operate(tmp_path / "cache", 30, random.Random(number), removals=True, run=run))
    assert processes.damaged(tmp_path / "cache") == 0


def test_counters_add_up_over_threads(tmp_path):
    run = Run(tmp_path / "cache")

    def work(number):
        for start in range(0, 200, 20):
            run.step(range(start, start + 20))

    together(work)
    torchcache.flush()
    assert run.count("hits") + run.count("misses") == THREADS * 200
    assert run.count("rows_stored") == 200


SCALE = contextvars.ContextVar("SCALE", default=1.0)


class ByContext(nn.Linear):
    """Computes something else in each thread."""

    def forward(self, x):
        return super().forward(x) * SCALE.get()


def test_threads_that_compute_something_else_have_rows_of_their_own():
    module, data, wrong = torchcache.mark(ByContext(8, 8), freeze=True, audit=0), torch.randn(6, 4, 8), []

    def work(scale):
        SCALE.set(scale)
        for turn in range(300):
            x = data[turn % 6]
            if not torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias) * scale, atol=1e-5):
                wrong.append((scale, turn))

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 5.0)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = torch.relu(self.first(x))
        time.sleep(0.05)
        return self.second(y)


def test_rows_that_are_computed_while_a_thread_loads_weights_are_not_kept():
    module, data = torchcache.mark(Slow(), freeze=True, audit=0), torch.randn(4, 8, 8)
    module(data[0])
    old = {name: value.clone() for name, value in module.state_dict().items()}

    def swap():
        time.sleep(0.02)
        module.load_state_dict({name: value + 1 for name, value in old.items()})

    for x in data[1:]:
        thread = threading.Thread(target=swap)
        thread.start()
        module(x)
        thread.join()
        module.load_state_dict(old)
    for x in data:
        with torchcache.bypass():
            expected = module(x)
        torch.testing.assert_close(module(x), expected)


INSIDE, PROCEED, DRAWN = threading.Semaphore(0), threading.Semaphore(0), []


class Meets(nn.Module):
    """Lets another thread draw while its forward runs."""

    def __init__(self, own=None):
        super().__init__()
        self.layer, self.own = nn.Linear(4, 4), own

    def forward(self, x):
        INSIDE.release()
        PROCEED.acquire(timeout=60)
        return self.layer(x) + (0 if self.own is None else self.own(x))


@contextlib.contextmanager
def drawing(draw):
    """Another thread draws once in every run of a forward."""
    over = threading.Event()
    DRAWN.clear()

    def work():
        while not over.is_set():
            if INSIDE.acquire(timeout=0.01):
                DRAWN.append(draw())
                PROCEED.release()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def numpy_row(x):
    return 0 * x + np.random.standard_normal()


DRAWS = {
    "torch": lambda: torch.randint(1 << 62, ()).item(),
    "numpy": lambda: np.random.randint(1 << 62),
    "python": lambda: random.getrandbits(62),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_what_another_thread_draws_is_not_taken_for_the_originals_nor_taken_back(kind):
    module, data = torchcache.mark(Meets(), freeze=True), [torch.randn(6, 4) for _ in range(3)]
    with drawing(DRAWS[kind]):
        for x in data:
            module(x), module(x)
    assert len(set(DRAWN)) == len(DRAWN)
    with drawing(lambda: None):
        module(data[0]), module(data[0])
    hits = torchcache.stats(module).hits
    assert hits >= (30 if kind == "torch" else 6), "refused for good"


@pytest.mark.parametrize("own", [torch.rand_like, lambda x: nn.functional.dropout(x * 0, 0.5), numpy_row])
def test_what_draws_itself_is_not_cached_beside_a_thread_that_draws(own):
    module, x = torchcache.mark(Meets(own), freeze=True), torch.randn(6, 4)
    with drawing(DRAWS["torch"]):
        for _ in range(6):
            module(x)
    assert torchcache.stats(module).misses == torchcache.stats(module).hits == 0
    assert "random" in str(torchcache.stats(module).regions[0].reasons)


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).requires_grad_(False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("backend", ["aot_eager", "torchcache"])
def test_threads_compute_while_another_compiles(backend):
    model, twin = Headed(), Headed()
    twin.load_state_dict(model.state_dict())
    torchcache.mark(model.body)
    options = {"options": {"inner": "aot_eager"}} if backend == "torchcache" else {}
    compiled = torch.compile(model, backend=backend, **options)
    batches = [torch.randn(rows, 16) for rows in [1, 3, 8, 5] * 3]

    def work(number):
        for turn, batch in enumerate(batches):
            with torch.no_grad():
                answer = (compiled if (number + turn) % 2 else model)(batch)
                torch.testing.assert_close(answer, twin(batch))

    together(work)
