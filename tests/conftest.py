"""What every test starts from: no warnings remembered, nothing waiting to be written, a cache directory of its own."""

import pytest
import torch
import torchvision_operators  # noqa: F401  # before anything imports torchvision

import torchcache
from torchcache.logging import warn_once


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path / "default-cache"))
    warn_once.cache_clear()
    torch._dynamo.reset()
    yield
    torchcache.flush()
