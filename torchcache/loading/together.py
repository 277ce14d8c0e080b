"""A batch of samples that are all remembered, and of one structure, made at once as ``default_collate`` makes it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from torchcache.lazy.rows import Kind, Rows, Source
from torchcache.lazy.use import lazy_rows
from torchcache.loading.by_index import Block
from torchcache.loading.samples import build, kinds_of, small_values


class _Place(int):
    """Stands in a sample where a leaf is: large tensors first, then small values."""


class _Leaf(NamedTuple):
    """Stands in a batch where a leaf is; ``default_collate`` collects it in a container of this class."""

    place: int
    collected: type


def _note(batch: Any, *, collate_fn_map: Any = None) -> _Leaf:
    return _Leaf(batch[0], type(batch))


torch.utils.data._utils.collate.default_collate_fn_map[_Place] = _note


@functools.lru_cache(maxsize=256)
def is_simple(structure: Any) -> bool:
    """Whether a structure consists of tuples, lists and dicts: making a batch of others runs code of their classes."""
    kind = structure[0]
    return isinstance(kind, str) or (kind in (tuple, list, dict) and all(map(is_simple, structure[2:])))


@functools.lru_cache(maxsize=256)
def _form(structure: Any) -> Any:
    """The batch that ``default_collate`` makes, with a place for each leaf."""
    large, small = small_values(structure)
    return default_collate(
        [build(structure, [*map(_Place, range(large, large + small))], [*map(_Place, range(large))])]
    )


@functools.lru_cache(maxsize=256)
def _kinds(structure: Any) -> tuple[Kind, ...]:
    return tuple(kinds_of(structure))


def rows_of(block: Block, leaf: int, source: Source) -> torch.Tensor:
    """The rows of one large tensor, not loaded."""
    kind = _kinds(block.structure)[leaf]
    return lazy_rows(Rows(source, block.indices, leaf, kind, block.digests[leaf]))


def together(block: Block, source: Source) -> Any:
    """The batch; its large tensors are not loaded."""
    large = [rows_of(block, leaf, source) for leaf in range(len(block.digests))]
    return _filled(_form(block.structure), large, block.columns)


def _filled(form: Any, large: list[torch.Tensor], columns: list[list[Any]]) -> Any:
    if type(form) is _Leaf:
        if form.place < len(large):
            return large[form.place]
        return default_collate(form.collected(columns[form.place - len(large)]))
    if isinstance(form, dict):
        return {name: _filled(part, large, columns) for name, part in form.items()}
    return [_filled(part, large, columns) for part in form]
