"""The digest of rows on a device: what it is, in operators of torch, which any device has; 128 bits over every byte.

A row's bytes, padded with zeros, are words of 64 bits. Word ``i`` belongs to lane ``i % LANES`` of chunk
``i // (LANES * STEPS)``. Each lane of each chunk chains its words through a permutation of 64 bits, from a start that
is its own. The ends of all lanes, permuted once more, are summed; the sum with the row's length is permuted twice. All
of this is done twice, with constants of their own: a digest is one half, then the other, little-endian.

The permutation is ``x *= a; x ^= x >> 32; x *= b; x ^= x >> 29``, modulo 2**64: multiplications by odd numbers between
shifts, as in the finalizers of MurmurHash3 (Austin Appleby) and SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014). Within a lane nothing is lost, since the chain is one to one in each
word. A sum over functions that differ by place is tabulation hashing (Carter and Wegman, "Universal classes of hash
functions", 1979; Patrascu and Thorup, "The power of simple tabulation hashing", 2012): lanes that change places do not
cancel, and a device may add in any order. Rows that were not made to collide do so with a probability of about 2**-128.
Where somebody may have made them so there is BLAKE3, on the host.
"""

from __future__ import annotations

import torch
from torch.nn import functional

LANES, STEPS = 128, 32
# Of each half: the two factors, what is added where lanes start, what their ends are changed by. The digits of pi after
# the point, in words of 64 bits of which the first and the last bit are set.
CONSTANTS = (
    (0xA43F6A8885A308D3, 0x93198A2E03707345, 0xA4093822299F31D1, 0x882EFA98EC4E6C89),
    (0xC52821E638D01377, 0xBE5466CF34E90C6D, 0xC0AC29B7C97C50DD, 0xBF84D5B5B5470917),
)


def in_operators(rows: torch.Tensor, size: int) -> torch.Tensor:
    """The digests of rows of 32-bit words, by operators of torch: a loop over the steps of a chunk."""
    count, width = rows.shape
    words = -(-width // 2)
    chunks = max(1, -(-words // (LANES * STEPS)))
    steps = max(1, -(-words // LANES)) if chunks == 1 else STEPS
    lanes = max(1, min(LANES, words))
    padded = functional.pad(rows, (0, chunks * steps * LANES * 2 - width))
    given = padded.view(torch.int64).view(count, chunks, steps, LANES)[..., :lanes]
    places = torch.arange(chunks * LANES, device=rows.device).view(chunks, LANES)
    busy, idle = places[:, :lanes], places[:, lanes:]
    first = busy % LANES + busy // LANES * (LANES * STEPS)
    halves = []
    for a, b, start, end in [[*map(_signed, half)] for half in CONSTANTS]:
        state = _mixed(busy + start, a, b).expand(count, chunks, lanes)
        for step in range(steps):
            # Past the end of the row a lane stays as it is.
            state = torch.where(first + step * LANES < words, _mixed(state ^ given[:, :, step], a, b), state)
        total = _mixed(state ^ end, a, b).sum((1, 2)) + _mixed(_mixed(idle + start, a, b) ^ end, a, b).sum() + size
        halves.append(_mixed(_mixed(total, a, b), a, b))
    return torch.stack(halves, 1)


def _mixed(x: torch.Tensor, a: int, b: int) -> torch.Tensor:
    """The permutation; shifts of int64 bring the sign along, which is masked."""
    x = x * a
    x = x ^ ((x >> 32) & 0xFFFFFFFF)
    x = x * b
    return x ^ ((x >> 29) & 0x7FFFFFFFF)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
