"""Servers for tests: a real one, started and stopped, and one that answers what a test wants."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
import redis

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")
REQUIRED = "TORCHCACHE_TEST_SERVER"  # set where a missing server is a failure


def needs_server():
    """Skip the test where there is no server to start, unless one must be there."""
    if PROGRAM is None:
        assert not os.environ.get(REQUIRED), "redis-server or valkey-server is to be installed"
        pytest.skip("neither redis-server nor valkey-server is installed")


class Server:
    """A server of its own on a socket in ``folder``, or on a port of loopback."""

    def __init__(self, folder, *settings, port=0):
        self.folder, self.settings, self.port = folder, settings, port
        self.socket = folder / "s"
        self.url = f"redis://127.0.0.1:{port}/0" if port else f"unix://{self.socket}"
        self.start()

    def start(self):
        command = [PROGRAM, "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket)]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self.folder), *self.settings]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while True:
            try:
                self.client().ping()
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.01)
            else:
                return

    def client(self, **settings):
        return redis.Redis(unix_socket_path=str(self.socket), **settings)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        self.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Liar:
    """A server that sends what ``answer`` yields for each command that it reads."""

    def __init__(self, answer):
        self.answer = answer
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection):
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(2**20):
                if data.count(b"CLIENT") and b"SETINFO" in data:
                    connection.sendall(b"+OK\r\n" * data.count(b"SETINFO"))
                    continue
                for part in self.answer(data):
                    connection.sendall(part)

    def stop(self):
        self.listener.close()
