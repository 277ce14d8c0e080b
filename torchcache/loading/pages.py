"""Remembered samples on disk: pages of some hundred each, kept among a cache directory's rows.

A page is one row, a tensor of bytes: JSON of ``{"structures": [text, ...], "samples": [[index, place of its structure,
digests in hexadecimal, [value, ...]], ...]}``. Pages of a data set are numbered from 0 and never rewritten. A value is
itself where JSON has it, or a list that begins with a tag: ``f`` and ``c`` floats in hexadecimal, ``b`` bytes, ``t`` a
tensor, ``a`` and ``g`` an array and a number of NumPy, with dtype, shape and base64. What is read is not trusted: it is
parsed with bounds, and of what a sample was the data set itself tells the classes.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from torchcache.digest.cpu import digest_bytes
from torchcache.loading.samples import Sample, describe
from torchcache.logging import logger
from torchcache.options import CacheOptions
from torchcache.store.beneath import Beneath
from torchcache.store.catalogue import Region
from torchcache.store.note import note_bytes, note_entries
from torchcache.store.select import row_bytes

# Samples of a page, and its bytes at most; a sample that alone has more is not kept.
SAMPLES = 1024
LONGEST = 1024 * 1024
# Pages that are asked for at once.
TOGETHER = 64
_DTYPES = {name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}
# What reading pages may take, in processor time and in bytes once they are decoded: so much, and so much more for each
# byte that is there. Ours take less than half.
SECONDS, SECONDS_PER_BYTE = 0.5, 0.5e-6
DECODED, DECODED_PER_BYTE = 8_000_000, 20


class Pages:
    """The pages of one data set.

    Parameters
    ----------
    identity : bytes
        16 bytes: which data set.
    name : str
        The data set's, for people.
    options : CacheOptions
        Where they are kept.
    """

    def __init__(self, identity: bytes, name: str, options: CacheOptions) -> None:
        self._identity = identity
        self._beneath = Beneath(options, name)
        self._region = Region.of(identity.hex(), name, options)
        self._level = options.zstd_compression_level
        self._next = 0

    def read(self) -> Iterator[tuple[Any, Sample]]:
        """All samples that are kept; in place of their structures stands a text, as of ``describe``."""
        if not self._beneath or not self._beneath.knows(self._region):
            return
        self._beneath.tell(self._region)
        allowance = _Allowance()
        while True:
            keys = [self._key(self._next + number) for number in range(TOGETHER)]
            found: dict[bytes, Any] = {}
            for _, blobs in self._beneath.read(keys, self._region, LONGEST):
                found.update(blobs)
            for key in keys:
                if key not in found:
                    return
                self._next += 1
                try:
                    yield from _decoded(key, found[key], allowance)
                except _SpentError:
                    logger.info("%s take too long for their size, and the rest of them is not read", self._region.name)
                    return
                except Exception:  # whatever lies there
                    logger.debug("a page of remembered samples is damaged", exc_info=True)

    def write(self, samples: Sequence[tuple[Any, Sample]]) -> None:
        """Keep samples, behind the step."""
        plain = [(index, sample) for index, sample in samples if type(index) in (int, str)]
        for start in range(0, len(plain), SAMPLES):
            for page in _encoded(plain[start : start + SAMPLES]):
                key = self._key(self._next)
                self._next += 1
                self._beneath.write(len(page), functools.partial(note_entries, key, page, self._level), self._region)

    def remove(self) -> None:
        """Remove all pages."""
        self._beneath.leave(self._region)

    def _key(self, number: int) -> bytes:
        return self._identity + digest_bytes(b"page %d" % number)


class _SpentError(Exception):
    """Pages take more than what is there of them allows."""


class _Allowance:
    """What reading the pages of a data set may take on this thread, those who take its samples included."""

    def __init__(self) -> None:
        self._began = time.thread_time()
        self._there = self._decoded = 0

    def take(self, there: int, decoded: int) -> None:
        """Take for one more page; raises ``_SpentError`` where that is too much."""
        self._there += there
        self._decoded += decoded
        late = time.thread_time() - self._began > SECONDS + SECONDS_PER_BYTE * self._there
        if late or self._decoded > DECODED + DECODED_PER_BYTE * self._there:
            raise _SpentError


def _encoded(samples: Sequence[tuple[Any, Sample]]) -> Iterator[bytes]:
    structures = {sample.structure: describe(sample.structure) for _, sample in samples}
    numbers = {structure: number for number, structure in enumerate(structures)}
    rows = [
        [index, numbers[sample.structure], sample.digests.hex(), [*map(_written, sample.values)]]
        for index, sample in samples
    ]
    page = json.dumps({"structures": list(structures.values()), "samples": rows}, separators=(",", ":")).encode()
    if len(page) <= LONGEST // 2:
        yield page
    elif len(samples) > 1:
        half = len(samples) // 2
        yield from itertools.chain(_encoded(samples[:half]), _encoded(samples[half:]))


def _decoded(key: bytes, blob: Any, allowance: _Allowance) -> Iterator[tuple[Any, Sample]]:
    page = json.loads(note_bytes(key, blob, LONGEST, allowance.take))
    structures = page["structures"]
    if not all(type(text) is str for text in structures):
        raise ValueError("no text")
    for index, number, digests, values in page["samples"]:
        if type(index) not in (int, str) or type(number) is not int or number < 0:
            raise ValueError("no sample")
        yield index, Sample(structures[number], tuple(map(_read, values)), bytes.fromhex(digests))


def _written(value: Any) -> Any:
    kind = type(value)
    if kind is float:
        return ["f", value.hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind is bytes:
        return ["b", _text(value)]
    if kind is torch.Tensor:
        held = value.contiguous()
        return ["t", str(held.dtype).removeprefix("torch."), [*held.shape], _text(row_bytes(held[None]).tobytes())]
    if kind is np.ndarray:
        return ["a", value.dtype.str, [*value.shape], _text(value.tobytes())]
    if isinstance(value, np.generic):
        return ["g", value.dtype.str, _text(value.tobytes())]
    return value


def _read(value: Any) -> Any:
    if not isinstance(value, list):
        if type(value) not in (type(None), bool, int, str):
            raise ValueError("no value")
        return value
    tag, *parts = value
    if tag == "f":
        return float.fromhex(parts[0])
    if tag == "c":
        return complex(float.fromhex(parts[0]), float.fromhex(parts[1]))
    if tag == "b":
        return _bytes(parts[0])
    data = bytearray(_bytes(parts[-1]))
    if tag == "t" and parts[0] in _DTYPES:
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")
        return flat.view(_DTYPES[parts[0]]).reshape(parts[1]).clone()
    dtype = np.dtype(parts[0])
    if dtype.kind not in "biufc" or tag not in ("a", "g"):
        raise ValueError("no value")
    elements = np.frombuffer(data, dtype)
    return elements.reshape(parts[1]).copy() if tag == "a" else elements[0]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
