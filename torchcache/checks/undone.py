"""Runs that are not the caller's: what they write is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torchcache.batch import Subject, lacks
from torchcache.checks.plan import CHANGED
from torchcache.errors import Bypass
from torchcache.identity.written import Written
from torchcache.options import CacheOptions


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
