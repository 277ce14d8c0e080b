"""A real server a test, gone after it."""

import pytest
import servers


@pytest.fixture
def server(tmp_path):
    servers.needs_server()
    (tmp_path / "server").mkdir()
    server = servers.Server(tmp_path / "server")
    yield server
    server.stop()
