"""A server that dies, hangs, fills up or lies costs rows: never a wrong one, never the run, never much time."""

import random
import resource
import threading
import time

import pytest
import servers
import torch
from torch import nn

import torchcache
from torchcache.store import writer
from torchcache.store.remote import PIECE_ROWS

TIMEOUT = 0.5
WIDTH = 64


def net():
    torch.manual_seed(0)
    return nn.Linear(8, WIDTH).eval().requires_grad_(False)


def data(rows=40):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))


def marked(url):
    """A marked module with a memory that holds nothing, so that each call asks the server."""
    return torchcache.mark(net(), remote=url, max_memory_cache_size=0)


def region(module):
    return torchcache.stats(module).regions[0]


class Training:
    """Steps whose answers are compared, and what the longest took."""

    def __init__(self, url):
        self.module, self.twin, self.x = marked(url), net(), data()
        self.step()

    def step(self):
        start = time.monotonic()
        torch.testing.assert_close(self.module(self.x), self.twin(self.x))
        self.seconds = time.monotonic() - start
        return region(self.module)


@pytest.fixture
def training(server):
    training = Training(f"{server.url}?timeout={TIMEOUT}")
    torchcache.flush()
    assert training.step().remote_hits == len(training.x)
    return training


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_server_that_is_gone_costs_rows_and_one_time_limit(server, training, how, warnings):
    getattr(server, how)()
    assert training.step().remote_hits == len(training.x)
    # Two limits are promised; the rest is the machine's.
    assert training.seconds < 10 * TIMEOUT
    for _ in range(20):
        found = training.step()
    torchcache.flush()
    assert found.remote_errors <= 2  # it is left alone for a while, not tried in each step
    assert len(warnings) == 1
    assert "cannot be" in warnings[0]
    assert server.url in warnings[0]


def test_a_server_that_comes_back_is_used_again(server, monkeypatch):
    monkeypatch.setattr("torchcache.store.pause.FIRST_SECONDS", 0.0)
    training = Training(server.url)
    server.kill()
    errors = training.step().remote_errors
    torchcache.flush()
    server.start()
    training.step()
    torchcache.flush()
    found = training.step()
    assert errors
    assert found.remote_hits == len(training.x)


def test_a_connection_that_the_server_closed_meanwhile_is_no_failure(server, training):
    server.client().client_kill_filter(_type="normal", skipme=True)
    before = region(training.module).remote_hits
    found = training.step()
    assert (found.remote_hits, found.remote_errors) == (before + len(training.x), 0)


def test_rows_that_the_server_dropped_are_computed_and_sent_again(server, training):
    server.client().flushall()
    misses = training.step().misses
    torchcache.flush()
    found = training.step()
    assert (found.misses, found.remote_errors) == (misses, 0)


def test_a_full_server_is_read_and_not_written_to(tmp_path, warnings):
    servers.needs_server()
    server = servers.Server(tmp_path, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
    try:
        training = Training(server.url)
        for _ in range(10):
            found = training.step()
            torchcache.flush()
        assert found.remote_errors == 1
        (warning,) = warnings
        assert "OOM" in warning or "OutOfMemory" in warning
    finally:
        server.stop()


def corrupt(kind, blobs, chance):
    """What stands in the place of each blob, all sound ones."""
    if kind == "misfiled":
        return blobs[1:] + blobs[:1]
    changed = []
    for blob in blobs:
        if kind == "flipped":
            place = chance.randrange(len(blob))
            changed.append(blob[:place] + bytes([blob[place] ^ (1 << chance.randrange(8))]) + blob[place + 1 :])
        elif kind == "cut":
            changed.append(blob[: chance.randrange(len(blob))])
        elif kind == "longer":
            changed.append(blob + bytes(chance.randrange(1, 3_000_000)))
        else:
            changed.append(chance.randbytes(len(blob)))
    return changed


@pytest.mark.parametrize("kind", ["flipped", "cut", "longer", "noise", "misfiled"])
def test_damaged_values_are_dropped_and_computed(server, training, kind):
    client, chance = server.client(), random.Random(kind)
    rows = [name for name in client.scan_iter() if client.strlen(name) > WIDTH and len(name) > 60]
    assert len(rows) == len(training.x)
    for name, blob in zip(rows, corrupt(kind, [client.get(name) for name in rows], chance), strict=True):
        client.set(name, blob)
    before = region(training.module)
    found = training.step()
    assert found.misses == before.misses + len(training.x)
    torchcache.flush()
    assert training.step().remote_hits == before.remote_hits + len(training.x)


def test_one_value_that_is_too_long_spoils_no_other(server, training):
    client = server.client()
    name = next(name for name in client.scan_iter() if len(name) > 60)
    client.set(name, bytes(50_000_000))
    before = region(training.module)
    found = training.step()
    assert (found.misses, found.remote_hits) == (before.misses + 1, before.remote_hits + len(training.x) - 1)


def test_values_of_other_types_are_absent(server, training):
    client = server.client()
    for name in list(client.scan_iter()):
        client.delete(name)
        client.rpush(name, b"1", b"2")
    misses = region(training.module).misses
    assert training.step().misses == misses + len(training.x)
    torchcache.flush()
    assert training.step().misses == misses + len(training.x)


def test_a_hundred_thousand_values_are_right_or_refused(server):
    """Fuzzed values, some hundred in a batch; which of them were left alone is known."""
    module, twin, chance, client = marked(server.url), net(), random.Random(0), server.client()
    x = data(PIECE_ROWS + 100)
    expected = twin(x)
    module(x)
    torchcache.flush()
    names = [name for name in client.scan_iter(count=1000) if len(name) > 60]
    sound = dict(zip(names, client.mget(names), strict=True))
    fuzzed = 0
    while fuzzed < 100_000:
        before = region(module)
        values = {name: _fuzz(blob, chance) for name, blob in sound.items()}
        client.mset(values)
        torch.testing.assert_close(module(x), expected)
        after = region(module)
        intact = sum(values[name] == blob for name, blob in sound.items())
        assert after.remote_hits - before.remote_hits == intact
        fuzzed += len(values)
        torchcache.flush()


def _fuzz(blob, chance):
    how = chance.randrange(6)
    if how == 0:
        return blob
    if how == 1:
        return chance.randbytes(chance.randrange(2 * len(blob)))
    if how == 2:
        return blob[: chance.randrange(len(blob))]
    place = chance.randrange(len(blob) - 8)
    return blob[:place] + chance.randbytes(how) + blob[place + how :]


def endless():
    while True:
        yield b"$3\r\nabc\r\n"


LIES = {
    "nothing at all": lambda data: iter(()),
    "a length beyond all": lambda data: iter([b"*40\r\n$9000000000000000000\r\n" + bytes(1000)]),
    "a list beyond all": lambda data: iter([b"*9000000000000000000\r\n"]),
    "lists within lists": lambda data: iter([b"*1\r\n" * 100_000]),
    "values without end": lambda data: iter_of(b"*9000000\r\n", b"$100000\r\n" + bytes(100_000) + b"\r\n"),
    "a line without end": lambda data: iter_of(b"+", b"x" * 100_000),
    "drop by drop": lambda data: slowly(b"*40\r\n" + b"$-1\r\n" * 40),
    "no protocol": lambda data: iter([b"HTTP/1.1 400 Bad Request\r\n\r\n"]),
    "an error": lambda data: iter([b"-LOADING " + b"x" * 50_000 + b"\r\n"]),
    "another kind": lambda data: iter([b":1\r\n"]),
    "too few": lambda data: iter([b"*1\r\n$-1\r\n"]),
    "numbers": lambda data: iter([b"*40\r\n" + b":7\r\n" * 40]),
    "escapes": lambda data: iter([b"-\x1b[2Jhello\r\n"]),
    "it hangs up": lambda data: (_ for _ in ()).throw(OSError),
}


def iter_of(first, rest):
    yield first
    while True:
        yield rest


def slowly(text):
    for place in range(len(text)):
        yield text[place : place + 1]
        time.sleep(0.05)


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_gets_neither_time_nor_memory(lie, warnings):
    liar = servers.Liar(LIES[lie])
    try:
        module, twin, x = marked(f"{liar.url}?timeout={TIMEOUT}"), net(), data()
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        for _ in range(3):
            torch.testing.assert_close(module(x), twin(x))
            torchcache.flush()
        # One limit each for a question, a read and a write; the rest is the machine's.
        assert time.monotonic() - start < 20 * TIMEOUT
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 100_000
        assert (region(module).misses, region(module).remote_hits) == (3 * len(x), 0)
        assert len(warnings) <= 2
        assert not any("\x1b" in text or len(text) > 1000 for text in warnings)
    finally:
        liar.stop()


def test_a_name_that_is_looked_up_without_end_takes_one_time_limit(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: released.wait(60))
    try:
        module, twin, x = marked(f"redis://nowhere.invalid?timeout={TIMEOUT}"), net(), data()
        start = time.monotonic()
        torch.testing.assert_close(module(x), twin(x))
        assert time.monotonic() - start < 10 * TIMEOUT
    finally:
        released.set()


def test_rows_are_left_out_where_earlier_ones_still_wait(server):
    """Training does not wait for a server that is slower than it."""
    module, twin, x, ready = marked(server.url), net(), data(), threading.Event()
    writer.sender().submit(writer.QUEUE_BYTES, ready.wait)
    torch.testing.assert_close(module(x), twin(x))
    writer.writer().flush()
    ready.set()
    torchcache.flush()
    assert server.client().dbsize() == 0
    torch.testing.assert_close(module(x), twin(x))
    torchcache.flush()
    assert server.client().dbsize() == len(x) + 1
