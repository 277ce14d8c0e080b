"""A few bytes of any length, kept among rows as one of them: a row of one tensor of bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

from torchcache.store.blob import Codec, RowSpec
from torchcache.store.header import read_header
from torchcache.store.select import row_bytes


def note_entries(key: bytes, note: bytes, level: int | None) -> list[tuple[bytes, bytes]]:
    """What is written for ``note``, which is not empty: its key, and its blob."""
    row = torch.frombuffer(bytearray(note), dtype=torch.uint8)[None]
    return [(key, Codec(RowSpec.of([row]), level).encode([key], [row])[0])]


def note_bytes(key: bytes, blob: Any, longest: int, take: Callable[[int, int], None] | None = None) -> bytes:
    """The note in a blob of up to ``longest`` bytes, which nobody vouches for.

    Parameters
    ----------
    key : bytes
        Its key.
    blob : bytes or BlobFile
        What lies there.
    longest : int
        Most bytes of a note.
    take : callable or None
        Called before it is decoded, with the bytes that are there and those that are said to come out.

    Raises
    ------
    ValueError, OSError
        When it is no note, is damaged or too long.
    """
    held = blob if isinstance(blob, bytes) else blob.read(longest)
    spec = read_header(io.BytesIO(held)).spec
    if len(spec.leaves) != 1 or spec.leaves[0][0] != torch.uint8 or spec.size > longest:
        raise ValueError("no note")
    if take is not None:
        take(len(held), spec.size)
    sound, rows = Codec(spec).decode([key], [held])
    if not sound:
        raise ValueError("damaged")
    return row_bytes(rows[0]).tobytes()
