"""Write-behind."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest

from torchcache.store.writer import Writer


def test_jobs_run_in_order_and_flush_waits_for_them():
    writer, done = Writer(), []
    for number in range(100):
        writer.submit(1, lambda number=number: done.append(number))
    writer.flush()
    assert done == list(range(100))


def test_a_job_that_fails_does_not_stop_the_next():
    writer, done = Writer(), []
    writer.submit(1, lambda: 1 / 0)
    writer.submit(1, lambda: done.append(1))
    writer.flush()
    assert done == [1]


def test_submit_waits_when_too_much_is_waiting_and_takes_one_that_is_larger_than_all():
    writer, gate, entered = Writer(limit=10), threading.Event(), threading.Event()
    writer.submit(100, gate.wait)  # larger than the limit: runs alone

    def third():
        writer.submit(5, entered.set)

    thread = threading.Thread(target=third)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    gate.set()
    thread.join(10)
    writer.flush()
    assert entered.is_set()


SCRIPT = """
    import os, sys, torch, torchcache
    from torch import nn
    torch.manual_seed(0)
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, persistent=True, persistent_cache_dir=sys.argv[1])
    data = torch.randn(40, 4)
    if sys.argv[2] == "exit":
        module(data)
    elif sys.argv[2] == "fork":
        torch.set_num_threads(1)
        module(data[:10])
        child = os.fork()
        module(data[10:20] if child else data[20:30])
        if child:
            assert os.waitpid(child, 0)[1] == 0
        else:
            torchcache.flush()
            os._exit(0)
    else:
        module(data[:int(sys.argv[2])])
        print(torchcache.stats(module).misses)
"""


def run(directory, what):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(directory), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_waits_is_written_at_exit(tmp_path):
    run(tmp_path, "exit")
    assert run(tmp_path, "40") == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_writes_too(tmp_path):
    run(tmp_path, "fork")
    assert run(tmp_path, "30") == "0"
