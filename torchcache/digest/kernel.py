"""Digests of rows on a device, as ``lanes.py`` says what they are, by two kernels in Triton."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from torchcache.digest.lanes import CONSTANTS, LANES, STEPS

# Of a row with many chunks, as many are added at a time.
PARTS = 64


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mixed(x, a: tl.constexpr, b: tl.constexpr):  # type: ignore[no-untyped-def]
    x = x * a
    x = x ^ (x >> 32)
    x = x * b
    return x ^ (x >> 29)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _chunk(  # type: ignore[no-untyped-def]
    rows, sums, stride, width, chunks,
    a0: tl.constexpr, b0: tl.constexpr, start0: tl.constexpr, end0: tl.constexpr,
    a1: tl.constexpr, b1: tl.constexpr, start1: tl.constexpr, end1: tl.constexpr,
    lanes: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: what its lanes sum up to."""
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    lane = tl.arange(0, lanes)
    place = (chunk * lanes + lane).to(tl.uint64)
    one = _mixed(place + start0, a0, b0)
    two = _mixed(place + start1, a1, b1)
    base = rows + row * stride
    first = (chunk * lanes * steps + lane) * 2
    for step in tl.range(0, steps, loop_unroll_factor=4):  # loads that do not wait for each other
        at = first + step * lanes * 2
        there = at < width
        low = tl.load(base + at, mask=there, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(base + at + 1, mask=at + 1 < width, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        word = low | (high << 32)
        one = tl.where(there, _mixed(one ^ word, a0, b0), one)
        two = tl.where(there, _mixed(two ^ word, a1, b1), two)
    one = tl.sum(_mixed(one ^ end0, a0, b0).to(tl.int64, bitcast=True), 0)
    two = tl.sum(_mixed(two ^ end1, a1, b1).to(tl.int64, bitcast=True), 0)
    tl.store(sums + program * 2, one)
    tl.store(sums + program * 2 + 1, two)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _row(  # type: ignore[no-untyped-def]
    sums, digests, size, chunks,
    a0: tl.constexpr, b0: tl.constexpr, a1: tl.constexpr, b1: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """The digest of one row, from the sums of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.zeros((parts,), tl.int64)
    two = tl.zeros((parts,), tl.int64)
    for start in range(0, chunks, parts):
        part = start + tl.arange(0, parts)
        there = part < chunks
        place = sums + (row * chunks + part) * 2
        one += tl.load(place, mask=there, other=0)
        two += tl.load(place + 1, mask=there, other=0)
    first = (tl.sum(one, 0) + size).to(tl.uint64, bitcast=True)
    second = (tl.sum(two, 0) + size).to(tl.uint64, bitcast=True)
    tl.store(digests + row * 2, _mixed(_mixed(first, a0, b0), a0, b0).to(tl.int64, bitcast=True))
    tl.store(digests + row * 2 + 1, _mixed(_mixed(second, a1, b1), a1, b1).to(tl.int64, bitcast=True))


def in_kernel(rows: torch.Tensor, size: int) -> torch.Tensor:
    """The digests of rows of 32-bit words, of ``size`` bytes: ``(B, 2)`` of int64."""
    count, width = rows.shape
    words = -(-width // 2)
    chunks = max(1, -(-words // (LANES * STEPS)))
    # Where there is one chunk, its steps past the end of the row do nothing.
    steps = STEPS if chunks > 1 else triton.next_power_of_2(max(1, -(-words // LANES)))
    sums = torch.empty(count * chunks, 2, dtype=torch.int64, device=rows.device)
    digests = torch.empty(count, 2, dtype=torch.int64, device=rows.device)
    (a0, b0, *_), (a1, b1, *_) = CONSTANTS
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        _chunk[(count * chunks,)](
            rows, sums, rows.stride(0), width, chunks, *CONSTANTS[0], *CONSTANTS[1], lanes=LANES, steps=steps
        )
        _row[(count,)](sums, digests, size, chunks, a0, b0, a1, b1, parts=PARTS)
    return digests
