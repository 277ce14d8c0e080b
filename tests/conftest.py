"""What every test starts from: no warnings remembered, nothing waiting to be written, a cache directory of its own."""

import logging

import pytest
import torch
import torchvision_operators  # noqa: F401  # before anything imports torchvision

import torchcache
from torchcache.logging import logger, warn_once


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path / "default-cache"))
    warn_once.cache_clear()
    torch._dynamo.reset()
    yield
    torchcache.flush()


class _Collect(logging.Handler):
    def __init__(self, texts):
        super().__init__(logging.WARNING)
        self.texts = texts

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def warnings():
    """The texts of the warnings that were logged so far."""
    texts = []
    handler = _Collect(texts)
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)
