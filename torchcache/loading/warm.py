"""``warm``: fills the cache ahead of training, running a model no further than its last region."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from torchcache.call import Region
from torchcache.context import watching_lookups
from torchcache.errors import ArgumentError, MarkError
from torchcache.loading.feeding import Feeder, as_given, moved
from torchcache.loading.prefetch import prefetch
from torchcache.logging import warn_once
from torchcache.looked import Looked
from torchcache.quantity import size_text
from torchcache.regions import regions_in
from torchcache.store.writer import flush

__all__ = ["Warmed", "warm"]

# The seed by which processes agree on the order of a shuffled loader while its batches are shared out.
SHARED_SEED = 0


@dataclasses.dataclass(frozen=True)
class Warmed:
    """What a warm-up did in this process.

    Parameters
    ----------
    rows : int
        Rows looked up, over all regions.
    hits, misses : int
        Those that were there before, and those that were computed.
    seconds : float
        How long it took.
    bytes : int
        Bytes that were stored: on disk, as compressed, for regions that keep rows there; else in memory.
    """

    rows: int
    hits: int
    misses: int
    seconds: float
    bytes: int


def warm(
    model: Callable[..., Any],
    loader: Iterable[Any],
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
    batch_to_inputs: Callable[[Any], Any] | None = None,
) -> Warmed:
    """Fill the cache of ``model`` with the rows of ``loader``, ahead of training.

    The model runs as far as its last region: whole for the first batch of each form (shapes and dtypes of its
    inputs), which tells how many lookups a forward makes, and from then on no further than the last of them. It runs
    in the mode it is in (``train`` or ``eval``, autocast, gradients enabled or not), so that what is traced and stored
    is what training asks for; its buffers and the random numbers are given back as they were. Rows that are present
    are read and not computed: a second call goes on where the first one was stopped, and with ``persistent=True`` so
    does another process. Ctrl-C keeps what was done.

    Under ``torch.distributed`` each process takes every n-th batch, unless the loader has a ``DistributedSampler``
    or is accelerate's, and waits for the others at the end; without ``persistent=True`` the rows stay in the process
    that computed them. ``DistributedDataParallel`` is looked through.

    Parameters
    ----------
    model : nn.Module or marked function
        What ``transform`` or ``torch.compile`` returned, or a model with marks that is called eagerly.
    loader : iterable
        Batches. A mapping is passed by name, as far as the forward has such parameters, or whole if it has none of
        them. A tuple or list is passed by position, cut to the parameters that the forward requires; where it is
        longer and the forward has optional ones, that is an error. Anything else is passed as it is.
    device : str, torch.device or None
        Where tensors are moved to; ``None`` is where the model's first parameter is.
    progress : bool
        Show a progress bar on standard error, in the first process only.
    batch_to_inputs : callable or None
        From a batch to what is passed: a mapping by name, a tuple or list by position, both uncut, anything else as
        it is.

    Returns
    -------
    Warmed
        With ``rows``, ``hits``, ``misses``, ``seconds`` and ``bytes``, of this process.

    Raises
    ------
    MarkError
        When a forward looked nothing up.
    ArgumentError
        When it is not clear which items of a tuple the model takes, or for a compiled ``DistributedDataParallel``.
    KeyboardInterrupt
        After Ctrl-C, when everything done so far is on disk.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    plain: Any = getattr(model, "_orig_mod", model)
    plain = getattr(plain, "_torchdynamo_orig_callable", plain)
    if isinstance(plain, nn.parallel.DistributedDataParallel):
        raise ArgumentError("torchcache.warm: call it on the model, before DistributedDataParallel and torch.compile")
    rank, world = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    target = torch.device(device) if device is not None else _device_of(plain)
    feeder = Feeder(plain)
    watch = _Watch(regions_in(plain))
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.callback(flush)
        stack.enter_context(_left_as_found(plain, [] if world == 1 else _generators_of(loader)))
        if world > 1:
            torch.manual_seed(SHARED_SEED)
        share = loader if world == 1 or _is_divided(loader) else _share(loader, rank, world)
        show = stack.enter_context(_bar(share, progress and rank == 0))
        for batch in prefetch(share):
            args, kwargs = feeder(batch) if batch_to_inputs is None else as_given(batch_to_inputs(batch))
            if target is not None:
                args, kwargs = moved(args, target), moved(kwargs, target)
            watch.run(model, args, kwargs)
            show(watch)
    if world > 1:
        dist.barrier()
    return Warmed(watch.rows, watch.hits, watch.misses, time.perf_counter() - started, watch.bytes)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_divided(loader: Any) -> bool:
    """Whether each process has its own part of the data: by a sampler, or by accelerate's loaders."""
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    divided = any(isinstance(sampler, DistributedSampler) for sampler in samplers)
    return divided or type(loader).__module__.partition(".")[0] == "accelerate"


class _Share:
    """Every ``world``-th of ``items``, from item ``rank`` on."""

    def __init__(self, items: Iterable[Any], rank: int, world: int) -> None:
        self.items, self.rank, self.world = items, rank, world

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.items), self.rank, None, self.world)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.items), self.world))  # type: ignore[arg-type]  # raises what items raise


def _share(loader: Iterable[Any], rank: int, world: int) -> Iterable[Any]:
    """The part of ``loader`` that is this process's; a ``DataLoader`` over indexed data loads nothing else."""
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return _Share(loader, rank, world)
    part = copy.copy(loader)
    vars(part).update(batch_sampler=_Share(loader.batch_sampler, rank, world), persistent_workers=False)
    return part


def _generators_of(loader: Any) -> list[torch.Generator]:
    """The random generators that decide the order of ``loader``."""
    found = [getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None))]
    return [generator for generator in dict.fromkeys(found) if isinstance(generator, torch.Generator)]


class _Reached(BaseException):
    """Leaves a forward after its last lookup; no ``except Exception`` on the way is to hold it."""


class _Watch:
    """Counts lookups, and stops each forward after its last one, once their number is known.

    Parameters
    ----------
    regions : list of Region
        Those that exist already.
    """

    def __init__(self, regions: list[Region]) -> None:
        self.rows = 0
        self.misses = 0
        self._stored = {region: _stored(region) for region in regions}
        self._held: dict[Region, int] = {}
        self._lookups_by_form: dict[Any, int] = {}
        self._last = 0
        self._count = 0

    @property
    def hits(self) -> int:
        """Rows that were there before."""
        return self.rows - self.misses

    @property
    def bytes(self) -> int:
        """Bytes stored since the beginning."""
        return sum(_stored(region) - before for region, before in self._stored.items())

    def run(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call ``model``, no further than to its last lookup."""
        form = _form(args, kwargs)
        self._last, self._count = self._lookups_by_form.get(form, 0), 0
        with watching_lookups(self._looked_up), _modes_restored(), contextlib.suppress(_Reached):
            model(*args, **kwargs)
        if self._count:
            self._lookups_by_form[form] = self._count
        elif any(leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)):
            raise MarkError(
                "torchcache.warm: the model looked nothing up for a batch, so there is nothing to fill: call "
                "torchcache.explain(model, batch) to see why, and torchcache.transform or mark before warm"
            )

    def _looked_up(self, region: Region, looked: Looked) -> None:
        if region not in self._stored:  # made in this call, unless it is that of a function used before
            self._stored[region] = 0 if region.counters.calls == 1 else _stored(region)
        self.rows += len(looked.digests)
        self.misses += len(looked.missing)
        self._count += 1
        if looked.missing and not region.tiers.beneath:
            held = region.tiers.used
            if held == self._held.get(region):
                warn_once(
                    f"warm: the memory of {region.name} is full at {size_text(held)}, so further rows are computed and "
                    "not kept: set persistent=True, or a larger max_memory_cache_size"
                )
            self._held[region] = held
        if self._count == self._last:
            raise _Reached


def _stored(region: Region) -> int:
    tiers = region.tiers
    return tiers.used if tiers.beneath.disk is None else tiers.beneath.disk_bytes


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What decides which way a forward goes, short of the data itself."""
    leaves = [
        (leaf.shape[1:], leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), repr(leaf))
        for leaf in tree_leaves((args, kwargs))
    ]
    return tuple(kwargs), tuple(leaves)


def _device_of(model: Any) -> torch.device | None:
    """Where the first parameter or buffer is; ``None`` without any."""
    if not isinstance(model, nn.Module):
        return None
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


@contextlib.contextmanager
def _left_as_found(model: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """Give back buffers and random numbers as they were: what precedes the last region runs, and may change them."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(SHARED_SEED)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for holder, name, buffer, content in buffers:
            holder[name] = buffer
            if not torch.equal(buffer, content):  # BatchNorm's statistics change without a new version
                with torch.no_grad():
                    buffer.copy_(content)


@contextlib.contextmanager
def _modes_restored() -> Iterator[None]:
    """Gradient mode and autocast's depth as they were: a traced graph that is left halfway does not see to them."""
    enabled = torch.is_grad_enabled()
    depth = torch.autocast_increment_nesting()
    try:
        yield
    finally:
        while torch.autocast_decrement_nesting() >= depth:
            pass
        if depth == 1:
            torch.clear_autocast_cache()
        torch.set_grad_enabled(enabled)


@contextlib.contextmanager
def _bar(batches: Iterable[Any], visible: bool) -> Iterator[Callable[[_Watch], None]]:
    """A progress bar, as a function that shows how far the warm-up is."""
    try:
        total: int | None = len(batches)  # type: ignore[arg-type]
    except TypeError:
        total = None
    fields = ("{task.fields[rows]:,} rows", "{task.fields[rate]:,.0f} rows/s", "{task.fields[hits]:.0%} hits")
    columns = (
        TextColumn("torchcache"),
        BarColumn(),
        *(TextColumn(field) for field in fields),
        TextColumn("{task.fields[size]} stored"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    started = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as bar:
        task = bar.add_task("", total=total, rows=0, rate=0.0, hits=0.0, size=size_text(0))

        def show(watch: _Watch) -> None:
            rate = watch.rows / (time.perf_counter() - started)
            hits = watch.hits / max(watch.rows, 1)
            bar.update(task, advance=1, rows=watch.rows, rate=rate, hits=hits, size=size_text(watch.bytes))

        yield show
