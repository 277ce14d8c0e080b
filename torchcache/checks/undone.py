"""Runs that are not the caller's: what they write is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torchcache.batch import Batch, Subject, lacks
from torchcache.checks.plan import CHANGED
from torchcache.checks.roles import Roles, rows_of, select
from torchcache.errors import Bypass
from torchcache.identity.written import Written
from torchcache.options import CacheOptions
from torchcache.store.select import select_rows

# Numbers of rows that the probe tries.
_TRIED = (2, 3)


@contextlib.contextmanager
def undone(subject: Subject, options: CacheOptions) -> Iterator[None]:
    """Put back what a run on some rows of a call writes: the caller's run on all of them may write something else.

    Raises
    ------
    Bypass
        When it wrote, and not only kept something for another number of rows.
    """
    if options.pure or lacks(subject):
        yield
        return
    written = Written(subject.module, subject.identity.outside())
    try:
        yield
    finally:
        found = written.differences()
        if found:
            written.restore()
    if not all(one.grew for one in found):
        raise Bypass(CHANGED, lasting=False, quiet=True)


def is_set_up(written: Written, batch: Batch, roles: Roles) -> bool:
    """Whether other rows, as many as the probe tried, find what it added: that is kept for numbers of rows."""
    rows, again = rows_of(batch.taken.tensors, roles), written.again()
    if len(rows[0]) <= max(_TRIED):
        return False
    for count in _TRIED:
        others = [select_rows(leaf, range(1, 1 + count)) for leaf in rows]
        batch.original(select(batch.taken.tensors, roles, others))
    return not again.differences()
