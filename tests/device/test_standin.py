"""Models and data on a device that the host cannot read; in a process of its own, which has that device for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import standin

HERE = Path(__file__).parent


@pytest.mark.skipif(standin.compiler() is None or sys.platform != "linux", reason="needs a compiler, and Linux")
def test_all_of_it_works_where_the_host_cannot_read():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "on_device.py")]
    ambient = {**os.environ, "TORCHCACHE_TEST_DEVICE": "standin"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        ambient.pop(name, None)
    done = subprocess.run(command, cwd=HERE.parents[1], env=ambient, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
