"""Rows on a server through the public API: processes, machines and tiers that share them."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import redis
import servers
import torch
from torch import nn

import torchcache
from torchcache.options import CacheOptions

ROWS = 48
RUN = """
    import sys, torch, torchcache
    from torch import nn
    url, directory = sys.argv[1:]
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 40)).eval()
    twin = nn.Sequential(*net)
    options = dict(persistent=True, persistent_cache_dir=directory) if directory else {}
    data = torch.randn(48, 8)
    with torch.no_grad():
        expected = twin(data)
    torchcache.mark(net, freeze=True, remote=url or None, **options)
    for part, wanted in zip(data.split(12), expected.split(12)):
        torch.testing.assert_close(net(part), wanted)
    torchcache.flush()
    region = torchcache.stats(net).regions[0]
    print(region.misses, region.memory_hits, region.disk_hits, region.remote_hits, region.remote_errors)
"""


def run(url, directory="", environment=None):
    """Misses, hits by tier and errors of a process that looks ``ROWS`` rows up once."""
    command = [sys.executable, "-c", textwrap.dedent(RUN), url, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split())), done.stderr


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 20)).eval().requires_grad_(False)


def counts(module):
    region = torchcache.stats(module).regions[0]
    return region.misses, region.memory_hits, region.disk_hits, region.remote_hits


def test_processes_with_empty_disks_share_rows(server, tmp_path):
    assert run(server.url, tmp_path / "a")[0] == (ROWS, 0, 0, 0, 0)
    assert run(server.url, tmp_path / "b")[0] == (0, 0, 0, ROWS, 0)


def test_rows_from_a_server_go_to_disk(server, tmp_path):
    run(server.url)
    run(server.url, tmp_path / "a")
    server.kill()
    assert run("", tmp_path / "a")[0] == (0, 0, ROWS, 0, 0)


def test_only_what_nearer_tiers_lack_is_asked_for(server, tmp_path):
    half, x = net(), torch.randn(16, 6)
    torchcache.mark(half, remote=server.url)
    half(x)
    torchcache.flush()
    before = server.client().info("stats")["keyspace_hits"]
    whole = net()
    torchcache.mark(whole, remote=server.url)
    whole(x[:8])
    whole(x)
    assert counts(whole) == (0, 8, 0, 16)
    assert server.client().info("stats")["keyspace_hits"] - before == 16 + 1  # the region's record


def test_the_environment_names_a_server_for_what_is_persistent(server, tmp_path):
    environment = {"TORCHCACHE_REMOTE": server.url}
    run("", tmp_path / "a", environment)
    assert run("", tmp_path / "b", environment)[0] == (0, 0, 0, ROWS, 0)
    assert run("", "", environment)[0] == (ROWS, 0, 0, 0, 0)


def test_an_environment_that_names_none_is_told_and_left_alone(tmp_path):
    found, said = run("", tmp_path / "a", {"TORCHCACHE_REMOTE": "http://me:secret@host"})
    assert found == (ROWS, 0, 0, 0, 0)
    assert "TORCHCACHE_REMOTE cannot be used" in said
    assert "secret" not in said


def test_rows_expire_when_the_url_says_so(server):
    module = net()
    torchcache.mark(module, remote=server.url + "?ttl=1000")
    module(torch.randn(4, 6))
    torchcache.flush()
    client = server.client()
    assert {900 < client.ttl(key) <= 1000 for key in client.keys()} == {True}  # noqa: SIM118
    assert client.dbsize() == 4 + 1


def test_a_server_that_is_only_read(server):
    x = torch.randn(8, 6)
    first, second = net(), net()
    torchcache.mark(first, remote=server.url)
    first(x[:4])
    torchcache.flush()
    size = server.client().dbsize()
    torchcache.mark(second, remote=server.url + "?read_only=true")
    second(x)
    torchcache.flush()
    assert counts(second) == (4, 0, 0, 4)
    assert server.client().dbsize() == size


def test_a_password_from_the_environment_is_never_shown(tmp_path, monkeypatch, warnings):
    servers.needs_server()
    server = servers.Server(tmp_path, "--requirepass", "open sesame")
    try:
        monkeypatch.setenv("TORCHCACHE_REMOTE_PASSWORD", "open sesame")
        module, x = net(), torch.randn(4, 6)
        torchcache.mark(module, remote=server.url)
        module(x)
        torchcache.flush()
        assert server.client(password="open sesame").dbsize() == 4 + 1
        monkeypatch.setenv("TORCHCACHE_REMOTE_PASSWORD", "wrong sesame")
        module = net()
        torchcache.mark(module, remote=server.url + "?timeout=1.5")
        module(x)
        torchcache.flush()
        (warning,) = warnings
        assert "AuthenticationError" in warning or "WRONGPASS" in warning or "invalid" in warning
        assert torchcache.stats(module).misses == 4
        url = "redis://me:sesame@host:1/0?timeout=3"
        shown = [warning, repr(CacheOptions(remote=url)), repr(torchcache.stats(module))]
        assert not any("sesame" in text for text in shown)
    finally:
        server.stop()


def test_a_server_on_loopback(tmp_path):
    servers.needs_server()
    server = servers.Server(tmp_path, port=servers.free_port())
    try:
        run(server.url)
        assert run(server.url)[0] == (0, 0, 0, ROWS, 0)
    finally:
        server.stop()


def test_a_forked_child_reads_and_writes(server):
    module, x = net(), torch.randn(12, 6)
    expected = module(x)
    torchcache.mark(module, remote=server.url)
    module(x[:4])
    torchcache.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            right = torch.allclose(module(x), expected, atol=1e-6)
            torchcache.flush()
            code = 0 if right else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    again = net()
    torchcache.mark(again, remote=server.url)
    again(x)
    assert counts(again) == (0, 0, 0, 12)


def test_marks_with_a_server_can_be_copied_and_pickled(server):
    module, x = net(), torch.randn(4, 6)
    torchcache.mark(module, remote=server.url)
    expected = module(x)
    torchcache.flush()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        assert counts(other) == (0, 0, 0, 4)


@pytest.fixture
def stale(server):
    """A server with rows of other weights under the name ``same``; the module, its input, what it should return."""
    x, old, new = torch.randn(8, 6), net(), net()
    torchcache.mark(old, remote=server.url, persistent_module_hash="same")
    old(x)
    torchcache.flush()
    with torch.no_grad():
        new[0].weight.add_(1)
    return new, x, new(x)


def test_stale_rows_on_a_server_are_found_at_once_and_removed(server, stale, warnings):
    """Another program under the same name: what a run takes first is compared before it is believed."""
    new, x, expected = stale
    torchcache.mark(new, remote=server.url, persistent_module_hash="same")
    torch.testing.assert_close(new(x), expected)
    assert torchcache.stats(new).regions[0].alarms == 1
    assert any("cached wrongly" in text for text in warnings)
    torchcache.flush()
    assert server.client().dbsize() == 0
    torch.testing.assert_close(new(x), expected)
    torchcache.flush()
    for hits in (0, 8):  # who found it put nothing there
        later = copy.deepcopy(new)
        torch.testing.assert_close(later(x), expected)
        assert counts(later)[3] == hits
        torchcache.flush()


def test_rows_that_cannot_be_removed_are_not_asked_for_again(server, stale):
    new, x, expected = stale
    torchcache.mark(new, remote=server.url + "?read_only=true", persistent_module_hash="same")
    for _ in range(3):
        torch.testing.assert_close(new(x), expected)
    assert torchcache.stats(new).regions[0].alarms == 1


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://host", "begins with"),
        ("redis://", "host"),
        ("redis://host:port", "port"),
        ("redis://[::1/0", "host"),
        ("unix://", "path"),
        ("redis://host?timeout=soon", "timeout"),
        ("redis://host?timeout=0", "timeout"),
        ("redis://host?ttl=-1", "ttl"),
        ("redis://host?read_only=maybe", "read_only"),
        ("redis://me:secret@host?ttl=x", "ttl"),
    ],
)
def test_what_is_no_url_is_told_at_the_mark(url, wanted):
    with pytest.raises(ValueError, match="remote must be") as error:
        torchcache.mark(net(), remote=url)
    assert wanted in str(error.value)
    assert "secret" not in str(error.value)


def test_a_setting_of_the_client_goes_to_the_client(server):
    module = net()
    torchcache.mark(module, remote=f"{server.url}?db=3")
    module(torch.randn(4, 6))
    torchcache.flush()
    assert redis.Redis(unix_socket_path=str(server.socket), db=3).dbsize() == 4 + 1
