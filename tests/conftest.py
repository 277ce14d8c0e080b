"""What every test starts from: nothing remembered or left to write, a cache directory of its own; no error of ours."""

import gc
import logging

import pytest
import torch
import torchvision_operators  # noqa: F401  # before anything imports torchvision

import torchcache
from torchcache.call import Region
from torchcache.logging import inform_once, logger, warn_once


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """What earlier files and imports left is neither walked through by later collections nor copied by forks."""
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _whole():
    """Libraries look at the end for what they left, and find it where it was put aside."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch, request):
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path / "default-cache"))
    monkeypatch.delenv("TORCHCACHE_REMOTE", raising=False)
    warn_once.cache_clear()
    inform_once.cache_clear()
    torch._dynamo.reset()
    failed = []
    count = Region.count

    def counted(self, given, bypass):
        if "its lookup failed" in bypass.reason:
            failed.append(str(bypass))
        return count(self, given, bypass)

    monkeypatch.setattr(Region, "count", counted)
    yield
    torchcache.flush()
    assert not failed or request.node.get_closest_marker("lookups_fail"), f"computed after an error of ours: {failed}"


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


@pytest.fixture
def server(tmp_path):
    """A Redis or Valkey server of the test's own."""
    import servers

    servers.needs_server()
    (tmp_path / "server").mkdir()
    server = servers.Server(tmp_path / "server")
    yield server
    server.stop()
