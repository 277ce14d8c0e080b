"""A training process that is interrupted at any moment, goes on, and is interrupted again.

python tests/stress/interrupts.py DIRECTORY COUNT
"""

import collections
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "faults"))
SMALL, LARGE = 2000, 60


def survive(directory, count, seed):
    """Send ``count`` interrupts to a process that trains; raises for a wrong answer in it or in the next one."""
    chance = random.Random(seed)
    command = [sys.executable, str(Path(__file__).resolve()), str(directory), str(count), str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    answers = selectors.DefaultSelector()
    answers.register(process.stdout, selectors.EVENT_READ)
    for _ in range(count):
        assert process.stdout.readline() == "training\n", process.communicate()[1]
        time.sleep(chance.expovariate(20))
        process.send_signal(signal.SIGINT)
        # Python drops what is raised in a destructor, an interrupt too.
        while not answers.select(2):
            process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n", process.communicate()[1]
    answers.close()
    told, failed = process.communicate(timeout=120)
    assert told == "done\n", failed
    assert process.returncode == 0, failed
    return collections.Counter({"interrupts survived": count})


def train(directory, count, seed):
    """Train until an interrupt, ``count`` times, then to the end."""
    from trained import Run

    import torchcache

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    chance = random.Random(seed)
    run = Run(directory)
    for _ in range(count):
        try:
            print("training", flush=True)
            while True:
                run.step(chance.choices(range(SMALL), k=40))
                run.step(chance.choices(range(LARGE), k=4), "large")
                if chance.random() < 0.1:
                    torchcache.flush()
                if chance.random() < 0.1:
                    run = Run(directory)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            run = Run(directory) if chance.random() < 0.5 else run
    run.steps(200, 4)
    again = Run(directory)
    again.steps(200, 4)
    assert again.count("misses") == 0, again.count("misses")
    assert again.count("disk_errors") == 0
    print("done", flush=True)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
