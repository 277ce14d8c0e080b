"""Small marked modules, and what is asked of their counters."""

import contextlib
import copy
import time

import torch
from torch import nn

import torchcache


class Forward(nn.Module):
    """A module whose forward is a function of the module and its arguments."""

    def __init__(self, forward, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.run = forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def frozen(forward, *parts, **options):
    """A frozen, marked module with this forward; nothing is computed again unless options say so."""
    return torchcache.mark(Forward(forward, *parts), freeze=True, **{"audit": 0, **options})


def unmarked(module):
    """An uncached copy."""
    return torchcache.unmark(copy.deepcopy(module))


def counts(target):
    """Rows that were computed and stored, and rows that were served."""
    stats = torchcache.stats(target)
    return stats.misses, stats.hits


def reasons(target):
    """Why rows were computed and not stored, as one text."""
    return "; ".join(reason for region in torchcache.stats(target).regions for reason in region.reasons)


def assert_same(got, expected):
    """Same classes, structure, dtypes and values."""
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (got.dtype, got.stride()) == (expected.dtype, expected.stride())
        torch.testing.assert_close(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key, value in expected.items():
            assert_same(got[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            assert_same(*pair)
    else:
        assert got == expected


@contextlib.contextmanager
def process_group():
    """A process group of this process alone, for the block."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        # Gloo's thread takes the interpreter's lock to let go of the last reduction, and whoever lets go of the reducer
        # waits for that thread with the lock held.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
