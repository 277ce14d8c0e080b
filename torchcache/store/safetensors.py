"""The safetensors format, as much as rows need: written and read a piece at a time, which its own package cannot.

A file is 8 bytes (the header's length, little-endian), a JSON object (tensor name to dtype, shape and the two
offsets of its bytes; ``__metadata__`` to texts), and the tensors' row-major bytes without gaps. See
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from torchcache.errors import StoreError, brief
from torchcache.store.file import check_whole
from torchcache.store.gate import open_regular
from torchcache.store.header import LARGEST_ROW
from torchcache.store.select import row_bytes

LARGEST_HEADER = 8_000_000
# More dimensions than NumPy takes on all its versions.
LARGEST_RANK = 30
_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: name for name, dtype in _NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Parameters
    ----------
    dtype : torch.dtype
        Of its elements.
    shape : tuple of int
        Rows first.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_size(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self.row_size

    @classmethod
    def rows(cls, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> Tensor:
        """How ``count`` rows of a leaf are filed; as bytes where the format has no name for ``dtype``."""
        if dtype in _CODES:
            return cls(dtype, (count, *shape))
        return cls(torch.uint8, (count, *shape, dtype.itemsize))


class Writer:
    """A file being written, rows of any tensor in any order; appears under its name when closed without an error.

    Parameters
    ----------
    path : Path
        The file.
    tensors : mapping of str to Tensor
        What it will hold.
    metadata : mapping of str to str
        Texts beside them.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._tensors = dict(tensors)
        self._starts: dict[str, int] = {}
        at = 0
        # Wide elements first, so that all are aligned.
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            header[name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.size],
            }
            self._starts[name] = at
            at += tensor.size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > LARGEST_HEADER:
            raise StoreError(f"{path} would describe too many kinds of calls for one file: export some with --call")
        self._data_at, self._end = 8 + len(text), 8 + len(text) + at
        self._file = open(self._temporary, "xb")  # noqa: SIM115
        self._file.write(struct.pack("<Q", len(text)) + text)

    def put(self, name: str, row: int, rows: torch.Tensor) -> None:
        """Write ``rows``, contiguous on the CPU, from row ``row`` of a tensor on."""
        self._file.seek(self._data_at + self._starts[name] + row * self._tensors[name].row_size)
        self._file.write(row_bytes(rows).tobytes())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.truncate(self._end)
        self._file.close()
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            os.remove(self._temporary)


class Reader:
    """A file to read rows from; everything its header says is checked first.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    StoreError
        Where it is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: BinaryIO = open(open_regular(path, follow=True), "rb")  # noqa: SIM115
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            self.tensors, self.metadata, self._starts = self._header()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
            self._file.close()
            raise StoreError(f"{path} is no safetensors file: {brief(error)}") from None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor, those from ``start`` to ``stop`` that it has."""
        tensor = self.tensors[name]
        stop = min(stop, tensor.shape[0])
        self._file.seek(self._starts[name] + start * tensor.row_size)
        data = bytearray(self._file.read((stop - start) * tensor.row_size))
        if len(data) != (stop - start) * tensor.row_size:
            raise StoreError("the file was cut short while it was read")
        if not data:
            return torch.empty((stop - start, *tensor.shape[1:]), dtype=tensor.dtype, device="cpu")
        return torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype).reshape(stop - start, *tensor.shape[1:])

    def _header(self) -> tuple[dict[str, Tensor], dict[str, str], dict[str, int]]:
        size = os.fstat(self._file.fileno()).st_size
        check_whole(self._file.fileno())
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError("its header is longer than it may be")
        fields = json.loads(self._file.read(length))
        metadata = fields.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata holds more than texts")
        tensors, starts = _layout(fields, 8 + length, size)
        return tensors, metadata, starts


def _layout(fields: Mapping[str, Mapping[str, object]], at: int, size: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What a header says of its tensors, once all of it is known to be true of a file of ``size`` bytes.

    That is: known dtypes, shapes that a tensor can have, rows no larger than any, bytes that no other tensor has.
    """
    tensors, spans = {}, []
    for name, field in fields.items():
        tensor = Tensor(_NAMES[str(field["dtype"])], _counts(field["shape"]))
        start, stop = _counts(field["data_offsets"])
        row = tensor.dtype.itemsize * math.prod(length or 1 for length in tensor.shape[1:])
        if not 1 <= len(tensor.shape) <= LARGEST_RANK or row > LARGEST_ROW:
            raise ValueError(f"the shape of {name!r} is no row's")
        if stop - start != tensor.size or at + stop > size:
            raise ValueError(f"the offsets of {name!r} do not fit its shape or the file")
        tensors[name] = tensor
        spans.append((at + start, at + stop, name))
    end = 0
    for start, stop, name in sorted(span for span in spans if span[0] < span[1]):
        if start < end:
            raise ValueError(f"the bytes of {name!r} are another tensor's too")
        end = stop
    return tensors, {name: start for start, _, name in spans}


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError("a shape is no list")
    if not all(type(count) is int and 0 <= count < 2**63 for count in value):
        raise ValueError("a size is no count")
    return tuple(value)
