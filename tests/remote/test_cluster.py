"""A cluster of servers: rows lie on each of them, and one that fails costs rows."""

import json
import time

import pytest
import servers
import torch
from torch import nn

import torchcache
from torchcache.cli.main import main

ROWS = 64
SLOTS = ((0, 8191), (8192, 16383))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 300)).eval().requires_grad_(False)


def counts(module):
    region = torchcache.stats(module).regions[0]
    return region.misses, region.remote_hits


def run(capsys, *arguments):
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out or "null")


@pytest.fixture
def nodes(tmp_path):
    servers.needs_server()
    found = []
    try:
        for number, slots in enumerate(SLOTS):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            settings = ("--cluster-enabled", "yes", "--cluster-port", f"{servers.free_port()}")
            found.append(servers.Server(folder, *settings, port=servers.free_port()))
            found[-1].client().execute_command("CLUSTER", "ADDSLOTSRANGE", *slots)
        first, second = found
        first.client().execute_command("CLUSTER", "MEET", "127.0.0.1", second.port, second.settings[-1])
        end = time.monotonic() + 30
        while not all(b"cluster_state:ok" in node.client().execute_command("CLUSTER", "INFO") for node in found):
            assert time.monotonic() < end, "the cluster does not form"
            time.sleep(0.05)
        yield found
    finally:
        for node in found:
            node.stop()


@pytest.fixture
def url(nodes):
    return nodes[0].url.replace("/0", "?cluster=true&timeout=5")


def test_rows_lie_on_all_servers_and_are_found_by_another_process(nodes, url):
    x, first, second = torch.randn(ROWS, 6), net(), net()
    expected = net()(x)
    torchcache.mark(first, remote=url)
    torch.testing.assert_close(first(x), expected)
    torchcache.flush()
    assert all(node.client().dbsize() > ROWS / 4 for node in nodes)
    torchcache.mark(second, remote=url)
    torch.testing.assert_close(second(x), expected)
    assert counts(second) == (0, ROWS)


def test_a_server_that_dies_costs_rows_and_not_the_run(nodes, url):
    x, first = torch.randn(ROWS, 6), net()
    expected = net()(x)
    torchcache.mark(first, remote=url.replace("timeout=5", "timeout=0.5"))
    first(x[:32])
    torchcache.flush()
    nodes[1].kill()
    for _ in range(3):
        torch.testing.assert_close(first(x), expected)
    torchcache.flush()


def test_commands_walk_all_servers(nodes, url, capsys):
    module = torchcache.mark(net(), remote=url)
    module(torch.randn(ROWS, 6))
    torchcache.flush()
    code, info = run(capsys, "info", url)
    assert (code, [held["rows"] for held in info["regions"]]) == (0, [ROWS])
    code, verdict = run(capsys, "verify", url)
    assert (code, verdict["checked"], verdict["sound"]) == (0, ROWS, True)
    assert run(capsys, "clear", url, "--yes")[0] == 0
    assert not any(node.client().dbsize() for node in nodes)


@pytest.mark.parametrize(
    "wrong", ["unix:///run/s?cluster=true", "redis://host/3?cluster=true", "redis://h?cluster=yes"]
)
def test_an_address_that_no_cluster_has_is_told(wrong):
    with pytest.raises(ValueError, match="cluster"):
        torchcache.mark(net(), remote=wrong)
