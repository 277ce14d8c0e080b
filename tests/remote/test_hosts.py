"""Hosts of their own network, on one machine: they share a server, and one is cut off for a while."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import servers

HOSTS = 4
RUN = """
    import sys, time, torch, torchcache
    from torch import nn
    url, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 64)).eval().requires_grad_(False)
    data = torch.randn(2000, 8)
    expected = net(data)
    # Memory holds a tenth, so that the server is asked all the time.
    torchcache.mark(net, remote=url, max_memory_cache_size=200 * 256)
    chance = torch.Generator().manual_seed(seed)
    end, longest = time.monotonic() + seconds, 0.0
    print("ready", flush=True)
    while time.monotonic() < end:
        rows = torch.randint(len(data), (32,), generator=chance)
        start = time.monotonic()
        torch.testing.assert_close(net(data[rows]), expected[rows])
        longest = max(longest, time.monotonic() - start)
        time.sleep(0.01)
    torchcache.flush()
    region = torchcache.stats(net).regions[0]
    print(region.misses, region.remote_hits, region.remote_errors, region.alarms, flush=True)
"""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of network namespaces, joined by a bridge, and the bridge's own address."""
    if os.name != "posix" or os.getuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    mark = f"tc{os.getpid() % 10000}"
    names = [f"{mark}h{number}" for number in range(HOSTS)]
    try:
        ip("link", "add", mark, "type", "bridge")
        ip("addr", "add", "10.213.7.1/24", "dev", mark)
        ip("link", "set", mark, "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", mark, "up")
            ip("-n", name, "addr", "add", f"10.213.7.{number + 2}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    yield names, "10.213.7.1"
    for name in names:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)
    with contextlib.suppress(subprocess.CalledProcessError):
        ip("link", "del", mark)


@pytest.mark.slow
def test_hosts_share_a_server_and_one_is_cut_off_for_a_while(hosts, tmp_path):
    servers.needs_server()
    names, address = hosts
    port = servers.free_port()
    server = servers.Server(tmp_path, "--bind", address, "--protected-mode", "no", port=port)
    try:
        url = f"redis://{address}:{port}?timeout=0.3"
        runs = []
        for number, name in enumerate(names):
            command = ["ip", "netns", "exec", name, sys.executable, "-c", textwrap.dedent(RUN), url, str(number), "20"]
            runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert [run.stdout.readline() for run in runs] == ["ready\n"] * HOSTS
        time.sleep(5)
        ip("link", "set", names[0], "down")
        time.sleep(5)
        ip("link", "set", names[0], "up")
        told = [run.communicate()[0] for run in runs]
        assert [run.returncode for run in runs] == [0] * HOSTS
    finally:
        server.stop()
    counts = [tuple(map(int, text.split())) for text in told]
    assert all(hits > 500 for _, hits, _, _ in counts), counts
    assert [errors > 0 for _, _, errors, _ in counts] == [True, False, False, False], counts
    assert sum(alarms for *_, alarms in counts) == 0
