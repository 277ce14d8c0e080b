"""What a user can set on a mark, checked when it is set."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch

from torchcache.address import check_remote, default_remote
from torchcache.errors import NoDirectoryError
from torchcache.logging import warn_once
from torchcache.switching import FORMER, translated

__all__ = ["SCALED", "CacheOptions", "absolute", "cache_dtype_text", "default_cache_dir"]

DIGESTS = ("xxh3_128", "blake3")
# Stored with a scale a row; the others of ``cache_dtype`` are cast.
SCALED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_CAST = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# In a mapping, the name of all outputs that it does not name.
OTHERS = "*"


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return None


# What a relative TORCHCACHE_DIR starts from, wherever the process goes later.
_STARTED_IN = _working_directory()


def default_cache_dir() -> Path:
    """``$TORCHCACHE_DIR`` where that is a path, else the platform's cache directory for the user; absolute.

    Raises
    ------
    NoDirectoryError
        There is neither.
    """
    chosen = os.environ.get("TORCHCACHE_DIR")
    why = ""
    if chosen:
        try:
            return absolute(chosen, _STARTED_IN)
        except ValueError as error:
            why = f"TORCHCACHE_DIR={chosen!r} cannot be used ({error})"
    try:
        default = absolute(platformdirs.user_cache_dir("torchcache"))
    except (RuntimeError, ValueError):
        reason = why or "there is no home directory"
        raise NoDirectoryError(f"{reason}: set TORCHCACHE_DIR, or give a directory") from None
    if why:
        warn_once(f"{why}: {default} is used")
    return default


def absolute(path: str | os.PathLike[str], start: Path | None = None) -> Path:
    """``path`` with ``~`` and ``~user`` in its place, from the root on; nothing else in it is replaced.

    Parameters
    ----------
    path : str or Path
        A relative one starts from ``start``.
    start : Path or None
        ``None`` is the working directory.

    Raises
    ------
    ValueError
        There is no such user, no home directory or no working directory.
    """
    try:
        whole = Path(path).expanduser()
        return (start / whole if start is not None else whole).absolute()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The options of one mark.

    Parameters
    ----------
    enabled : bool
        Cache at all; ``False`` makes the mark do nothing.
    persistent : bool
        Keep rows on disk too, for later runs and other processes.
    persistent_cache_dir : str, Path or None
        Directory of the disk tier; ``None`` is ``$TORCHCACHE_DIR``, else the user's cache directory. ``~`` is replaced,
        ``$NAME`` is not; a relative path starts from the working directory of the moment when the mark is made.
    group : bool
        Give the directory to its group as well: all that is made there can be read and written by the members, whatever
        the umask, and by nobody else. Without it, a directory that exists and that its group may write to is used as
        the umask says, and any other one is for you alone.
    persistent_module_hash : str or None
        Your own name for program and weights instead of the computed fingerprint. Changing the
        code or the weights under the same name then returns the old rows: change the name with them.
    max_persistent_cache_size : int
        Bytes that the cache directory may hold, over all runs and processes. When full, rows of what no living process
        uses give way to new ones, those used longest ago first; where there are none, no more is stored. A directory
        that holds much more than that, since others allow more, is left as it is.
    max_memory_cache_size : int
        Bytes that the memory tier of one region may hold. When full, rows that come back take the place of rows that
        were idle for longer than rows usually take to come back; the others stay.
    memory_cache_device : str, torch.device or None
        "cpu": rows are kept in the host's memory, and sent to a device for each batch that lies there. "auto", or
        ``None``: those that were served are kept on the device of the outputs as well. A device: there.
    memory_device_share : float
        Share of a device's memory that is free, from 0 to 0.9, which rows of all regions may take there together. When
        something else comes to need it, they leave it, and fewer are kept there from then on.
    cache_dtype : torch.dtype, mapping of str to (torch.dtype or None), or None
        Store floating-point outputs in this dtype and give them back in their own. ``torch.int8``,
        ``torch.float8_e4m3fn`` and ``torch.float8_e5m2`` are stored with a scale a row, which its largest magnitude
        decides; other floating dtypes are cast. A mapping says it for outputs by their names, as ``torchcache.explain``
        shows them, and by ``"*"`` for all others; ``None`` stores one as it is. A row with values that its dtype has
        not is computed every time: what a cast would make infinite, and infinities and not-a-number where there is a
        scale. With ``padding`` there is none. ``torchcache.stats`` shows the largest error that was seen.
    zstd_compression_level : int or None
        Level for rows on disk that gain from compression (-100 to 22); ``None`` stores all as they are.
    digest : {"xxh3_128", "blake3"}
        Hash of the inputs; "blake3" (of the package blake3) where inputs come from adversaries. With the default, what
        lies on a device is hashed there, by a function of our own; BLAKE3 is computed on the CPU.
    audit : float
        Share of the run's time, 0 to 0.5, in which rows that were served are computed again and compared, beside the
        rows that are served first, which all are; 0 compares only the first rows that come from disk or a server.
    batch_dim : int
        The dimension of the arguments along which samples lie: 1 for sequence-first modules.
    padding : str or None
        The argument, of shape ``(B, S)``, that tells real positions from padding: an attention mask, or token ids. A
        row's key and what is stored of it then cover its real positions, however long its batch was; outputs come back
        with the batch's length, and with zeros where there is padding. Your promise that padding changes nothing at
        real positions is checked for every length of batches. For wholly frozen marks.
    padding_value : bool, int, float or None
        What that argument has where there is padding; ``None`` is 0.
    tiers : sequence of Tier
        Stores of your own beneath memory and disk, the nearest first: see ``torchcache.Tier``.
    remote : str or None
        A Redis or Valkey server beneath all of them, shared with all who name it: ``redis://host:6379/0``,
        ``rediss://``, ``unix:///path``, with ``?timeout=`` (seconds, 1), ``&ttl=`` (seconds) and ``&read_only=true``.
        ``None`` is ``$TORCHCACHE_REMOTE`` where ``persistent`` is true. User and password come from the URL, or from
        ``$TORCHCACHE_REMOTE_USER`` and ``$TORCHCACHE_REMOTE_PASSWORD``. Needs the package redis.
    pure : bool
        Your promise that what the original writes beside its output (a counter, a log, a kept attention map) need not
        happen for rows that are served.

    Raises
    ------
    TypeError, ValueError
        For a value of the wrong kind or out of range; the message names the option.
    """

    enabled: bool = True
    persistent: bool = False
    persistent_cache_dir: str | os.PathLike[str] | None = None
    group: bool = False
    persistent_module_hash: str | None = None
    max_persistent_cache_size: int = 10_000_000_000
    max_memory_cache_size: int = 1_000_000_000
    memory_cache_device: str | torch.device | None = "cpu"
    memory_device_share: float = 0.5
    cache_dtype: torch.dtype | Mapping[str, torch.dtype | None] | None = None
    zstd_compression_level: int | None = 1
    digest: str = "xxh3_128"
    audit: float = 0.01
    batch_dim: int = 0
    padding: str | None = None
    padding_value: bool | int | float | None = None
    tiers: Sequence[Any] = ()
    remote: str | None = dataclasses.field(default=None, repr=False)
    pure: bool = False

    def __post_init__(self) -> None:
        for name in ("enabled", "persistent", "group", "pure"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        for name in ("max_persistent_cache_size", "max_memory_cache_size"):
            size = getattr(self, name)
            _require(_is_number(size), name, "a number of bytes", size)
            _require(0 <= size < float("inf"), name, "a finite number of bytes, 0 or more", size, ValueError)
            object.__setattr__(self, name, int(size))
        path, given = self.persistent_cache_dir, self.persistent_module_hash
        _require(path is None or isinstance(path, (str, os.PathLike)), "persistent_cache_dir", "a path or None", path)
        if path:
            object.__setattr__(self, "persistent_cache_dir", absolute(path))
        _require(given is None or isinstance(given, str), "persistent_module_hash", "a string or None", given)
        _require(given != "", "persistent_module_hash", "a name that is not empty, or None", given, ValueError)
        self._check_tiers()
        self._check_device()
        self._check_dtype()
        level = self.zstd_compression_level
        _require(level is None or _is_number(level, int), "zstd_compression_level", "an int or None", level)
        _require(level is None or -100 <= level <= 22, "zstd_compression_level", "from -100 to 22", level, ValueError)
        share, dim = self.audit, self.batch_dim
        _require(_is_number(share), "audit", "a share of time", share)
        _require(0 <= share <= 0.5, "audit", "a share of time from 0 to 0.5", share, ValueError)
        _require(_is_number(dim, int), "batch_dim", "an int", dim)
        _require(dim >= 0, "batch_dim", "0 or a higher dimension", dim, ValueError)
        self._check_padding()
        _require(self.digest in DIGESTS, "digest", f"one of {DIGESTS}", self.digest, ValueError)
        if self.digest == "blake3" and importlib.util.find_spec("blake3") is None:
            raise ValueError("torchcache: digest='blake3' needs the blake3 package: pip install blake3")

    def _check_padding(self) -> None:
        name, value = self.padding, self.padding_value
        _require(name is None or (isinstance(name, str) and bool(name)), "padding", "an argument's name or None", name)
        _require(value is None or isinstance(value, (bool, int, float)), "padding_value", "a number or None", value)
        _require(value is None or name is not None, "padding_value", "None without padding", value, ValueError)
        chosen = self.cache_dtype
        dtypes = [dtype for _, dtype in chosen] if isinstance(chosen, tuple) else [chosen]
        scaled = name is not None and any(dtype in SCALED for dtype in dtypes)
        # What stands in padding would decide the scale.
        _require(not scaled, "cache_dtype", "a dtype that is cast, as torch.bfloat16, with padding", chosen, ValueError)
        rows_first = name is None or self.batch_dim == 0
        _require(rows_first, "batch_dim", "0 with padding", self.batch_dim, ValueError)

    def _check_tiers(self) -> None:
        tiers, remote = self.tiers, self.remote
        _require(isinstance(tiers, Sequence), "tiers", "a list of torchcache.Tier objects", tiers)
        for tier in tiers:
            verbs = all(callable(getattr(tier, verb, None)) for verb in ("read", "write", "remove"))
            _require(verbs, "tiers", "a list of objects of subclasses of torchcache.Tier", tier)
        object.__setattr__(self, "tiers", tuple(tiers))
        _require(remote is None or isinstance(remote, str), "remote", "a URL or None", type(remote))
        if remote is not None:
            try:
                check_remote(remote)
            except ValueError as error:  # its text says no more of the URL than may be seen
                raise ValueError(f"torchcache: remote must be {error}") from None

    def _check_device(self) -> None:
        device = self.memory_cache_device
        kinds = device is None or isinstance(device, (str, torch.device))
        _require(kinds, "memory_cache_device", "'cpu', 'auto', a device, or None", device)
        if device is not None and device != "auto":
            try:
                kind = torch.device(device).type
            except RuntimeError as error:
                raise ValueError(f"torchcache: memory_cache_device={device!r} is no device: {error}") from None
            _require(kind != "meta", "memory_cache_device", "a device with memory", device, ValueError)
        share = self.memory_device_share
        _require(_is_number(share), "memory_device_share", "a share of what is free", share)
        _require(0 <= share <= 0.9, "memory_device_share", "from 0 to 0.9", share, ValueError)

    def _check_dtype(self) -> None:
        chosen: Any = self.cache_dtype
        pairs = isinstance(chosen, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in chosen)
        if pairs or isinstance(chosen, Mapping):  # pairs are what is made of a mapping below
            chosen = dict(chosen)
            named = all(isinstance(name, str) for name in chosen)
            _require(named, "cache_dtype", "a dtype, or a mapping from names of outputs to dtypes", chosen)
        for dtype in chosen.values() if isinstance(chosen, dict) else (chosen,):
            _require(dtype is None or isinstance(dtype, torch.dtype), "cache_dtype", "a torch.dtype or None", dtype)
            known = dtype is None or dtype in (*_CAST, *SCALED)
            wanted = f"one of {', '.join(map(str, (*_CAST, *SCALED)))}, or None"
            _require(known, "cache_dtype", wanted, dtype, ValueError)
        object.__setattr__(self, "cache_dtype", _plainest(chosen) if isinstance(chosen, dict) else chosen)

    @property
    def named_outputs(self) -> list[str]:
        """The names of outputs in ``cache_dtype``."""
        chosen = self.cache_dtype
        return [name for name, _ in chosen if name != OTHERS] if isinstance(chosen, tuple) else []

    @property
    def stored_alike(self) -> bool:
        """Whether equal elements of outputs come back equal: none has a scale, or a dtype by its name."""
        return not isinstance(self.cache_dtype, tuple) and self.cache_dtype not in SCALED

    def dtype_for(self, output: str) -> torch.dtype | None:
        """What ``cache_dtype`` says of an output."""
        if not isinstance(self.cache_dtype, tuple):
            return self.cache_dtype  # type: ignore[return-value]
        chosen = dict(self.cache_dtype)
        return chosen.get(output, chosen.get(OTHERS))

    @property
    def directory(self) -> Path | None:
        """Directory of the disk tier, absolute; ``None`` where nothing is persistent, or no place is known."""
        if not self.persistent:
            return None
        if self.persistent_cache_dir:
            return Path(self.persistent_cache_dir)
        try:
            return default_cache_dir()
        except NoDirectoryError as error:
            warn_once(f"rows stay in memory alone, since {error}")
            return None

    @property
    def server(self) -> str | None:
        """URL of the remote tier; ``None`` where there is none."""
        return default_remote() if self.remote is None and self.persistent else self.remote

    def replace(self, changes: Mapping[str, Any]) -> CacheOptions:
        """These options with ``changes`` made; unknown names are a ``TypeError``."""
        if not changes:
            return self
        check_names(changes)
        return dataclasses.replace(self, **translated(changes, self.zstd_compression_level, _LEVEL))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> CacheOptions:
        """Options from keyword arguments, those of torchcache 0.6.0 too; unknown names are a ``TypeError``."""
        check_names(options)
        return cls(**translated(options, _LEVEL, _LEVEL))


def _plainest(chosen: dict[str, torch.dtype | None]) -> tuple[tuple[str, torch.dtype | None], ...] | torch.dtype | None:
    """A mapping of ``cache_dtype`` as a value that can be hashed, and is the same for all that say the same."""
    others = chosen.get(OTHERS)
    named = {name: dtype for name, dtype in chosen.items() if dtype is not others}
    if not named:
        return others
    return tuple(sorted((named if others is None else {**named, OTHERS: others}).items()))


def cache_dtype_text(chosen: object) -> str:
    """``cache_dtype`` as a text: what keys and directories hold of it."""
    if isinstance(chosen, tuple):
        return ", ".join(f"{name!r}: {cache_dtype_text(dtype)}" for name, dtype in chosen)
    return f"{chosen} scaled" if chosen in SCALED else str(chosen)


NAMES = tuple(field.name for field in dataclasses.fields(CacheOptions))
_LEVEL = CacheOptions.zstd_compression_level


def check_names(options: Mapping[str, Any]) -> None:
    """Raise a ``TypeError`` for a name that is no option, saying what to do instead."""
    for name in options:
        if name in NAMES or name in FORMER:
            continue
        close = difflib.get_close_matches(name, NAMES, n=2)
        advice = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the options are {', '.join(NAMES)}"
        raise TypeError(f"torchcache: {name!r} is not an option: {advice}")


def _is_number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _require(holds: bool, name: str, wanted: str, value: object, error: type[Exception] = TypeError) -> None:
    if not holds:
        raise error(f"torchcache: {name} must be {wanted}, not {value!r}")
