"""Rows that depend on their neighbours for some contents alone, and modules that write for some batches alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchcache
from torchcache.checks.extremes import Extremes

LENGTH = 12


class Recurrent(nn.Module):
    """Pads its output to the longest row of the batch only."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(30, 4, padding_idx=0), nn.LSTM(4, 4, batch_first=True)

    def forward(self, ids):
        packed = pack_padded_sequence(self.embed(ids), (ids != 0).sum(1), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


class MeanOfPadded(Recurrent):
    def forward(self, ids):
        return super().forward(ids).mean(1)


def texts(*lengths):
    return torch.stack([torch.randint(1, 30, (LENGTH,)) * (torch.arange(LENGTH) < length) for length in lengths])


def texts_mostly_full():
    full = [LENGTH] * 6
    mixed = [texts(*full), texts(*full), texts(*full[:4], 5, LENGTH)]
    return [*mixed, *mixed, mixed[2][:1], mixed[2][4:5], mixed[2][3:5]]


class Scaled(nn.Module):
    """Gives rows that have no value of their own the mean scale of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, observed):
        sums, counts = (x.abs() * observed).sum(1), observed.sum(1)
        scale = torch.where(counts > 0, sums / counts.clamp(min=1), sums.sum() / counts.sum().clamp(min=1))
        return self.layer(x / scale[:, None]), scale


def series_mostly_observed():
    x, observed = torch.randn(12, 6) * torch.arange(1, 13)[:, None], torch.ones(12, 6)
    observed[9] = 0
    orders = [range(4), range(4, 8), range(8, 12), [9, 1, 2], [3, 9], [9, 11, 5]]
    return [(x[[*order]], observed[[*order]]) for order in orders]


class Bytes(nn.Module):
    """Guesses for a whole batch whether it holds bytes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x / 255 if x.max() > 1.5 else x)


def dark_and_light():
    light, dark = torch.randint(0, 256, (8, 6)).float(), torch.randint(0, 2, (8, 6)).float()
    return [light, dark, light[:4], dark[:4], *(torch.cat([light[i : i + 2], dark[i : i + 3]]) for i in range(4))]


class Peaks(Bytes):
    """Divides a batch by its largest value where that is large."""

    def forward(self, x):
        largest = x.abs().max()
        return self.layer(torch.where(largest > 4, x / largest, x))


def one_peak():
    calm = torch.randn(12, 6).clamp(-3, 3)
    peak = calm[:1] * 40
    return [calm[:6], calm[6:], calm[:6], torch.cat([peak, calm[:4]]), calm[2:8], torch.cat([calm[5:9], peak])]


class Decoder(nn.Module):
    """Stops where all rows have ended."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        ended = x.abs().sum(1) < 1
        made = [self.layer(x)]
        for _ in range(3):
            if ended.all():
                break
            made.append(torch.where(ended[:, None], 0.0, self.layer(made[-1])))
        return torch.stack(made, 1)


def rows_that_end_early():
    long, short = torch.randn(12, 6) + 3, torch.randn(8, 6) / 100
    mixed = torch.cat([long[8:], short[:3]])
    return [long[:4], long[4:8], mixed, long[:1], short[:1], short[1:3]]


CASES = [
    (Recurrent, texts_mostly_full),
    (MeanOfPadded, texts_mostly_full),
    (Scaled, series_mostly_observed),
    (Bytes, dark_and_light),
    (Peaks, one_peak),
    (Decoder, rows_that_end_early),
]


def wrong_calls(kind, batches, audit):
    torch.manual_seed(0)
    plain = kind().requires_grad_(False).eval()
    cached = torchcache.mark(copy.deepcopy(plain), audit=audit)
    wrong = 0
    for batch in batches():
        given = batch if isinstance(batch, tuple) else (batch,)
        found, expected = cached(*given), plain(*given)
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        wrong += not all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    return wrong, torchcache.stats(cached)


@pytest.mark.parametrize(("kind", "batches"), CASES)
def test_rows_that_mix_for_some_contents_alone_are_computed(kind, batches):
    wrong, stats = wrong_calls(kind, batches, audit=0.01)
    assert wrong == 0
    assert stats.regions[0].alarms == 0
    assert any("the other rows" in reason for reason in stats.regions[0].reasons), stats.regions[0].reasons


@pytest.mark.parametrize(("kind", "batches"), CASES)
def test_without_a_look_at_what_is_unlike_the_rest_they_are_wrong(kind, batches, monkeypatch):
    monkeypatch.setattr(Extremes, "beyond", lambda self, rows: [])
    assert wrong_calls(kind, batches, audit=0.0)[0] > 0


@pytest.mark.parametrize("total", [LENGTH, None])
def test_what_only_looks_as_if_rows_mixed_is_cached(total):
    class Masked(Recurrent):
        def forward(self, ids):
            held = (ids != 0).sum(1)
            packed = pack_padded_sequence(self.embed(ids), held, batch_first=True, enforce_sorted=False)
            made = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=total)[0]
            return made.sum(1) / held[:, None]  # padding is zero

    wrong, stats = wrong_calls(Masked, texts_mostly_full, audit=0.01)
    assert (wrong, stats.bypasses) == (0, 0)
    assert stats.hits >= 18


class Growing(nn.Module):
    """Keeps a scale for the longest sample, until a batch has none: it writes for some batches alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.register_buffer("scale", torch.ones(()))
        self.longest = 0

    def forward(self, x, lengths):
        longest = int(lengths.max())
        if 16 < longest > self.longest:
            self.longest = longest
            self.write(longest / 16)
        if longest <= 16 and self.longest:
            self.longest = 0
            self.write(1.0)
        return self.layer(x) * self.scale

    def write(self, scale):
        self.scale = torch.tensor(scale)


class GrowingInPlace(Growing):
    def write(self, scale):
        self.scale.fill_(scale)


@pytest.mark.parametrize("kind", [Growing, GrowingInPlace])
def test_what_checks_write_is_put_back(kind):
    torch.manual_seed(0)
    plain = kind().eval().requires_grad_(False)
    cached = torchcache.mark(copy.deepcopy(plain), audit=0.5)
    seen = []
    for lengths in [(5, 9, 7), (24, 9, 7), (24, 8, 6), (18, 8, 7), (22, 9, 5), (20, 9, 5), (5, 9, 12), (9, 24, 3)] * 2:
        x = torch.randn(3, 6)
        for rows in ([0, 1, 2], [0, 1, 2], [0, 2]):
            given = x[rows], torch.tensor(lengths)[rows]
            torch.testing.assert_close(cached(*given), plain(*given))
            seen.append((cached.longest, float(cached.scale)) == (plain.longest, float(plain.scale)))
    assert all(seen)
