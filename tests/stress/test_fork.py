"""Forks of a process that uses a cache, and data loader workers that use one."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from trained import Run, rows

import torchcache

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_a_fork(work, *arguments):
    def alone():
        torch.set_num_threads(1)  # OpenMP hangs in a fork of a process that used its threads
        work(*arguments)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def on_disk(directory, numbers):
    run = Run(directory)
    run.step(numbers)
    return run.count("disk_hits")


def test_a_fork_reads_and_writes_and_its_parent_goes_on(tmp_path):
    run = Run(tmp_path / "cache")
    run.step(range(100))  # its rows may still be waiting to be written
    children = [in_a_fork(run.steps, 400 + 50 * number) for number in range(3)]
    run.step(range(100, 300))
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    torchcache.flush()
    assert run.count("disk_errors") == 0
    assert on_disk(tmp_path / "cache", range(500)) == 500


def test_a_fork_of_a_fork_has_a_cache_too(tmp_path):
    run = Run(tmp_path / "cache")
    run.steps(50, 2)

    def middle():
        run.steps(100, 2)
        child = in_a_fork(run.steps, 200)
        child.join(60)
        os._exit(child.exitcode)

    child = in_a_fork(middle)
    child.join(60)
    assert child.exitcode == 0
    assert on_disk(tmp_path / "cache", range(200)) == 200


def test_a_fork_answers_whatever_threads_of_its_parent_are_doing():
    import torch._dynamo  # as an optimizer loads it

    torch.manual_seed(0)
    model = torchcache.mark(torch.nn.Linear(64, 16), freeze=True)
    x = torch.randn(48, 64)
    expected = torchcache.unmark(copy.deepcopy(model))(x)
    [model(x) for _ in range(3)]
    over = threading.Event()

    def use():
        while not over.is_set():
            model(x[torch.randint(48, (4,))])

    threads = [threading.Thread(target=use, daemon=True) for _ in range(4)]
    [thread.start() for thread in threads]
    try:
        for _ in range(25):
            child = os.fork()
            if not child:
                right = False
                try:
                    signal.alarm(10)  # ends it wherever it hangs
                    right = all(torch.allclose(model(x[:count]), expected[:count], atol=1e-5) for count in range(1, 6))
                finally:
                    os._exit(not right)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        over.set()
    [thread.join() for thread in threads]


def test_a_fork_does_not_fall_into_an_import_that_a_thread_of_its_parent_caused():
    code = """
        import os, signal, sys, threading, time, torch, torchcache

        model = torchcache.mark(torch.nn.Linear(4, 2), freeze=True)
        x = torch.randn(6, 4)

        def use(calls=10**6):
            for _ in range(calls):
                model(x)

        threading.Thread(target=use, daemon=True).start()
        while "torch._dynamo" not in sys.modules:  # it is loaded where that pays
            time.sleep(0.001)
        child = os.fork()
        if not child:
            signal.alarm(20)
            use(1200)
            os._exit(0)
        os._exit(os.waitpid(child, 0)[1] != 0)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == 0


class Features(Dataset):
    """What a frozen model makes of each number, computed where the sample is loaded."""

    def __init__(self, directory, count):
        self.count = count
        self.model = Run(directory).models["small"]

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        with torch.no_grad():
            features = self.model(rows([number]))[0]
        torchcache.flush()  # a worker ends without a word
        return number, features


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_fill_the_directory_that_training_reads(tmp_path, method):
    directory = tmp_path / "cache"
    data, training = Features(directory, 60), Run(directory)
    if method == "fork":
        training.step(range(10))
    for number, features in DataLoader(data, batch_size=10, num_workers=2, multiprocessing_context=method):
        assert torch.equal(features, training.twins["small"](rows(number.tolist())))
        training.step(number.tolist())
        training.step(range(100, 110))
    torchcache.flush()
    assert on_disk(directory, range(60)) == 60
    assert training.count("disk_errors") == 0
