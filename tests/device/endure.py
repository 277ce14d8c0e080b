"""Random programs on the stand-in device, on streams of their own, where rows leave it at random times.

    python endure.py SEED COUNT

As a program, since a process keeps the device for good. Prints what was counted, and ends with 1 after a wrong answer.
"""

import collections
import contextlib
import json
import logging
import random
import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "differential")]

import torch  # noqa: E402
from harness import WrongAnswerError, execute  # noqa: E402
from program import DOORS, Program  # noqa: E402
from standin import open_device  # noqa: E402

import torchcache  # noqa: E402
from torchcache.store import near  # noqa: E402


@contextlib.contextmanager
def scarce(chance):
    """Have the device be short of memory at random times, and have few rows fill it."""
    with (
        mock.patch.object(near, "FIRST_SLOTS", 2),
        mock.patch.object(near, "LOOK_SECONDS", 0.0),
        mock.patch.object(near, "REST_SECONDS", 0.0),
        mock.patch.object(near._Device, "_free", side_effect=lambda: chance.choice([0, 1 << 12, *[1 << 30] * 3])),
        mock.patch.object(near._Device, "_part", property(lambda self: 1.0, lambda self, part: None), create=True),
    ):
        yield


def endure(seed, count):
    """Run some programs; what was counted."""
    device, counts = open_device(), collections.Counter()
    for number in range(seed * count, (seed + 1) * count):
        chance = random.Random(number)
        program = Program.random(chance, DOORS)
        stream = torch.Stream(device) if chance.random() < 0.5 else contextlib.nullcontext()
        with scarce(chance), stream:
            execute(program, counts, device=device)
        torchcache.flush()
        races = torch.ops.standin.races()
        if races:
            raise WrongAnswerError(program, len(program.steps), f"streams without order: {', '.join(set(races))}")
        counts["programs on a device"] += 1
    return counts


if __name__ == "__main__":
    torch._logging.set_logs(dynamo=logging.CRITICAL)
    logging.getLogger("torchcache").setLevel(logging.CRITICAL)
    try:
        print(json.dumps(endure(int(sys.argv[1]), int(sys.argv[2]))))
    except WrongAnswerError as error:
        sys.exit(str(error))
