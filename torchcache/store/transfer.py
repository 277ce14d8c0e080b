"""The rows of a region as a file of features, and back.

A file holds, for each kind of call (shapes, arguments and numeric mode of the inputs), one tensor a leaf of shape
``(rows, *)`` and ``digests`` of shape ``(rows, 16)``, uint8: the digest of each row's inputs, or its sample id. The
rows lie in the order of their digests. Leaves are as they are stored: where ``cache_dtype`` is int8 or float8, a leaf
holds numbers, and behind all outputs lies its scale, of shape ``(rows, 1, ..., 1)``: their product are the values.
With several kinds of calls the names begin with ``call0.``, ``call1.``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from torchcache.errors import StoreError, brief
from torchcache.store.blob import FORMAT_VERSION, Codec, RowSpec, dtype_of_code
from torchcache.store.catalogue import Region, is_tag
from torchcache.store.deposit import Deposit
from torchcache.store.file import is_plausible
from torchcache.store.records import TAG, Records
from torchcache.store.safetensors import Reader, Tensor, Writer
from torchcache.store.survey import leaf_texts

DIGESTS = "digests"
PIECE_BYTES = 32 * 1024 * 1024
# A row up to this length may come from any blob.
EXPANDED_BYTES = 128 * 1024 * 1024

# The dtypes of a blob, by their names in ``leaf_texts``.
_DTYPES = {str(dtype).removeprefix("torch."): dtype for code in range(256) if (dtype := dtype_of_code(code))}

Progress = Callable[[int], object]


@dataclasses.dataclass
class Exported:
    """What was written to a file.

    Parameters
    ----------
    path : str
        The file.
    tag : str
        The region's fingerprint.
    rows : int
        Rows of all calls.
    damaged : int
        Rows left out, since they are damaged.
    calls : list of dict
        Per kind of call its fingerprint, the beginning of its tensors' names, its rows and leaves.
    """

    path: str
    tag: str
    rows: int
    damaged: int
    calls: list[dict[str, object]]


def export_region(
    records: Records,
    region: Region,
    path: Path,
    *,
    call: str = "",
    progress: Progress = lambda done: None,
) -> Exported:
    """Write the rows of a region to a safetensors file, a piece at a time.

    Parameters
    ----------
    records : Records
        The directory.
    region : Region
        Which rows.
    path : Path
        The file; one that is there is replaced when the new one is whole.
    call : str
        The beginning of a call's fingerprint, to write the rows of that kind of call alone.
    progress : callable
        Called with the number of rows done since its last call; each row is done twice, checked and written.

    Raises
    ------
    StoreError
        Where there is nothing to write, or rows change meanwhile.
    """
    groups, damaged = _groups(records, region.tag, call, progress)
    if not groups:
        what = f"call {call!r} of region" if call else "region"
        raise StoreError(f"{records.directory} has no sound rows of {what} {region.tag}")
    tensors: dict[str, Tensor] = {}
    calls: list[dict[str, object]] = []
    for number, ((fingerprint, spec), digests) in enumerate(groups.items()):
        prefix = f"call{number}." if len(groups) > 1 else ""
        for index, (dtype, shape) in enumerate(spec.leaves):
            tensors[f"{prefix}leaf{index}"] = Tensor.rows(dtype, shape, len(digests))
        tensors[prefix + DIGESTS] = Tensor(torch.uint8, (len(digests), 16))
        described = {"call": fingerprint.hex(), "prefix": prefix, "rows": len(digests), "leaves": leaf_texts(spec)}
        calls.append(described)
    about = {**dataclasses.asdict(region), "format": FORMAT_VERSION, "calls": calls}
    with Writer(path, tensors, {"torchcache": json.dumps(about)}) as file:
        for ((fingerprint, spec), digests), described in zip(groups.items(), calls, strict=True):
            prefix = str(described["prefix"])
            order = sorted(digests)
            for start, stop in _pieces(len(order), spec):
                piece = order[start:stop]
                file.put(prefix + DIGESTS, start, torch.frombuffer(bytearray(b"".join(piece)), dtype=torch.uint8))
                for index, rows in enumerate(_decode(records, fingerprint, piece, digests, spec)):
                    file.put(f"{prefix}leaf{index}", start, rows)
                progress(len(piece))
    return Exported(str(path), region.tag, sum(map(len, groups.values())), damaged, calls)


def import_region(path: Path, deposit: Deposit) -> Region:
    """Store the rows of an exported file; ``deposit`` counts them.

    Raises
    ------
    StoreError
        Where the file is none that ``export_region`` wrote.
    """
    with Reader(path) as file:
        try:
            about = json.loads(file.metadata["torchcache"])
            if about["format"] != FORMAT_VERSION or not is_tag(about["tag"]):
                raise ValueError("another format")
            region = Region.parse(about["tag"], file.metadata["torchcache"].encode())
            calls = [
                (bytes.fromhex(call["call"]), str(call["prefix"]), list(map(str, call["leaves"])))
                for call in about["calls"]
            ]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise StoreError(f"{path} was not written by torchcache export ({brief(error)})") from None
        if len({prefix for _, prefix, _ in calls}) < len(calls):
            raise StoreError(f"{path} gives the same rows to several calls")
        for call, prefix, leaves in calls:
            _import_call(file, deposit, region, call, prefix, leaves)
        deposit.note(region)
        return region


def _import_call(file: Reader, deposit: Deposit, region: Region, call: bytes, prefix: str, leaves: list[str]) -> None:
    names = [f"{prefix}leaf{index}" for index in range(len(leaves))]
    tensors = [file.tensors.get(name) for name in [*names, prefix + DIGESTS]]
    digests = tensors[-1]
    if len(call) != 16 or digests is None or digests != Tensor(torch.uint8, (digests.shape[0], 16)):
        raise StoreError(f"the digests of {prefix or 'the rows'} are missing or of another shape")
    count = digests.shape[0]
    dtypes = [_DTYPES.get(text.partition(" ")[0]) for text in leaves]
    if not 1 <= len(leaves) <= 255 or not all(map(_is_leaf, tensors, dtypes, [count] * len(leaves))):
        raise StoreError(f"a tensor of {prefix or 'the rows'} is missing, or of another dtype or number of rows")
    for start, stop in _pieces(count, RowSpec(tuple((t.dtype, t.shape[1:]) for t in tensors if t is not None))):
        keys = [call + row.numpy().tobytes() for row in file.rows(prefix + DIGESTS, start, stop)]
        rows = []
        for name, dtype in zip(names, dtypes, strict=True):
            leaf = file.rows(name, start, stop)
            rows.append(leaf if dtype is None or leaf.dtype == dtype else leaf.view(dtype).squeeze(-1))
        level = region.options.get("zstd_compression_level")
        codec = Codec(RowSpec.of(rows), level if isinstance(level, int) and -7 <= level <= 22 else None)
        deposit.add(region.tag, list(zip(keys, codec.encode(keys, rows), strict=True)))


def _is_leaf(tensor: Tensor | None, dtype: torch.dtype | None, count: int) -> bool:
    """Whether ``tensor`` is how ``count`` rows of ``dtype`` are filed."""
    if tensor is None or dtype is None or tensor.shape[0] != count:
        return False
    as_bytes = Tensor(torch.uint8, (*tensor.shape[:-1], dtype.itemsize))
    return tensor.dtype == dtype or (len(tensor.shape) > 1 and tensor == as_bytes)


def _groups(
    records: Records, tag: str, call: str, progress: Progress
) -> tuple[dict[tuple[bytes, RowSpec], dict[bytes, bytes]], int]:
    """The digests of all sound rows by call and spec, each with its entry's key, and the number of damaged ones."""
    groups: dict[tuple[bytes, RowSpec], dict[bytes, bytes]] = {}
    damaged = 0
    for entry in records.entries(f"{TAG} IS ?", (tag,)):
        if entry.key.hex().startswith(call.lower()):
            header, _ = entry.check()
            if header is None or not is_plausible(header.spec.size, header.stored, EXPANDED_BYTES):
                damaged += entry.count
            else:
                keys = entry.rows() if entry.count > 1 else [entry.key]
                groups.setdefault((entry.key[:16], header.spec), {}).update((key[16:], entry.key) for key in keys)
        progress(entry.count)
    return {group: groups[group] for group in sorted(groups, key=lambda group: group[0])}, damaged


def _decode(
    records: Records, call: bytes, piece: list[bytes], digests: dict[bytes, bytes], spec: RowSpec
) -> list[torch.Tensor]:
    """The rows of some of a call's digests, each of which comes with the key of its entry."""
    found: dict[bytes, bytes] = {}
    for entry in records.find(list({digests[digest] for digest in piece})):
        with contextlib.suppress(OSError, ValueError):
            found.update(entry.rows())
    keys = [call + digest for digest in piece]
    sound, rows = Codec(spec).decode(keys, [found.get(key, b"") for key in keys])
    if len(sound) < len(keys):
        raise StoreError(f"rows of {records.directory} were removed or damaged during the export: run it again")
    return rows


def _pieces(count: int, spec: RowSpec) -> Iterator[tuple[int, int]]:
    step = max(1, min(5000, PIECE_BYTES // max(1, spec.size)))
    for start in range(0, count, step):
        yield start, min(start + step, count)
