"""Between the host and a device: what is copied beside the step, and what the host waits for.

A device works through streams: what is asked for on one of them is done in order, later than it is asked for. Copies of
rows to the host run on a stream of their own, behind what the caller's stream has to do; copies to the device come from
pinned memory, so that the host need not wait. Where a device has no such streams, or a trial of them fails, all copies
are plain ones.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.int64]


class Coming:
    """Integers that a device computes and the host is to know: all that are under way come at once, with one wait.

    Parameters
    ----------
    tensor : torch.Tensor
        Of int64; the computation may still be going on.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._words: Words | None = None
        _under_way.all.append(weakref.ref(self))

    def words(self) -> Words:
        """The integers, in one dimension; waits for the device the first time."""
        if self._words is None:
            others = [coming for reference in _under_way.all if (coming := reference()) not in (None, self)]
            started, _under_way.all = [self, *others], []
            for device in dict.fromkeys(coming._tensor.device for coming in started if coming._tensor is not None):
                _bring([coming for coming in started if coming._tensor is not None and coming._tensor.device == device])
        assert self._words is not None
        return self._words


class _UnderWay(threading.local):
    def __init__(self) -> None:
        self.all: list[weakref.ref[Coming]] = []


_under_way = _UnderWay()


def _bring(started: Sequence[Coming]) -> None:
    flat = [coming._tensor.reshape(-1) for coming in started if coming._tensor is not None]
    with torch.no_grad():
        words = (torch.cat(flat) if len(flat) > 1 else flat[0]).cpu().numpy()
    ends = np.cumsum([len(part) for part in flat])[:-1]
    for coming, part in zip(started, np.split(words, ends), strict=True):
        coming._tensor, coming._words = None, part


def pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in memory that devices copy from and to by themselves, if there is any left."""
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty(shape, dtype=dtype, device="cpu")


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``; the host waits for nothing. Nobody may write to it meanwhile."""
    if device.type == "cpu":
        return tensor
    if not has_streams(device):
        return tensor.to(device)
    if not tensor.is_pinned():
        tensor = pinned(tensor.shape, tensor.dtype).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def bring_behind(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Begin to copy tensors to the host, behind what the caller's streams have to do; what waits for the copies.

    They may be written to at once. Any thread may wait, once.
    """
    own = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
    here, copied = list(own), list[torch.Event]()
    for device in dict.fromkeys(tensor.device for tensor in own):
        if device.type == "cpu":
            continue
        places = [place for place, tensor in enumerate(own) if tensor.device == device]
        if not has_streams(device):
            for place in places:
                here[place] = own[place].cpu()
            continue
        with beside(device) as side:
            for place in places:
                here[place] = pinned(own[place].shape, own[place].dtype)
                here[place].copy_(own[place], non_blocking=True)
            copied.append(torch.Event(device))
            copied[-1].record(side)

    def wait() -> list[torch.Tensor]:
        for event in copied:
            event.synchronize()
        own.clear()
        return here

    return wait


def send_ahead(tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Tensors of the host on ``device``, copied beside the step, and what has the caller's stream go on behind that.

    Until then only ``beside`` may use them. Nobody may write to the host's meanwhile.
    """
    if not has_streams(device):
        return [tensor.to(device) for tensor in tensors], lambda: None
    with beside(device) as side:
        sent = [send(tensor, device) for tensor in tensors]
        copied = torch.Event(device)
        copied.record(side)

    def arrive() -> None:
        caller = torch.accelerator.current_stream(device)
        caller.wait_event(copied)
        for tensor in sent:
            tensor.record_stream(caller)

    return sent, arrive


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[torch.Stream]:
    """A block on our own stream of ``device``, which has some, behind all that the caller's was asked for."""
    caller, side = torch.accelerator.current_stream(device), _side(device)
    assert side is not None
    side.wait_stream(caller)
    with side:
        yield side


def follow(tensors: Sequence[torch.Tensor], stream: torch.Stream) -> torch.Stream:
    """Have the caller's stream go on behind ``stream``, which used these tensors; the caller's stream."""
    now = torch.accelerator.current_stream(stream.device)
    if now != stream:
        now.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(now)
    return now


def has_streams(device: torch.device) -> bool:
    """Whether copies of a device can run beside its steps."""
    return device.type != "cpu" and _side(device) is not None


@functools.cache
def _side(device: torch.device) -> torch.Stream | None:
    """A stream of our own, where a trial of it gives what went in."""
    if device.type in ("cpu", "meta", "mps"):  # what lies in unified memory is not pinned
        return None
    try:
        side = torch.Stream(device)
        numbers = torch.arange(1 << 16, device="cpu").pin_memory()
        back = torch.empty_like(numbers, pin_memory=True)
        caller = torch.accelerator.current_stream(device)
        doubled = numbers.to(device, non_blocking=True) * 2
        side.wait_stream(caller)
        with side:
            back.copy_(doubled, non_blocking=True)
            event = torch.Event(device)
            event.record(side)
        event.synchronize()
        return side if torch.equal(back, numbers * 2) else None
    except Exception:  # each kind of device fails in its own way
        return None
