"""The address of a server of rows: a URL, checked, with what it says of how the server is used."""

from __future__ import annotations

import importlib.util
import math
import os
import urllib.parse

from torchcache.logging import warn_once

_SCHEMES = ("redis", "rediss", "unix")


class Address:
    """Where a server is, and how it is used.

    Parameters
    ----------
    url : str
        ``redis://[[user]:password@]host[:port][/db]``, ``rediss://`` (TLS) or ``unix://[[user]:password@]/path``. In
        its query ``timeout`` (seconds, 1), ``ttl`` (seconds that a row is kept, for ever), ``read_only`` and
        ``cluster`` (``true`` or ``false``); whatever else is in the query goes to the client,
        ``redis.Redis.from_url``. Of a cluster it names any one node.

    Attributes
    ----------
    name : str
        The URL for people, without user, password and query.

    Raises
    ------
    ValueError
        It is no such URL.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            parts.port  # noqa: B018 - raises for one that is no number
        except ValueError:
            raise ValueError("a URL whose host and port can be read") from None
        if parts.scheme not in _SCHEMES:
            raise ValueError(f"a URL that begins with {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
        place = parts.netloc.rpartition("@")[2]
        if not (parts.path.strip("/") if parts.scheme == "unix" else place):
            raise ValueError("a URL with a host" if parts.scheme != "unix" else "a URL with the path of a socket")
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        self.scheme = parts.scheme
        self.name = f"{parts.scheme}://{place}{parts.path}"
        self.timeout = _number(query.pop("timeout", "1"), "timeout")
        ttl = query.pop("ttl", None)
        self.ttl = None if ttl is None else max(1, round(_number(ttl, "ttl")))
        self.read_only = _flag(query.pop("read_only", "false"), "read_only")
        self.cluster = _flag(query.pop("cluster", "false"), "cluster")
        if self.cluster and (parts.scheme == "unix" or parts.path not in ("", "/", "/0")):
            raise ValueError("a URL with a host and no database but 0, since it names a cluster")
        self.url = url.partition("?")[0] + (f"?{urllib.parse.urlencode(query)}" if query else "")
        self.secrets = {
            name: os.environ[variable]
            for name, variable in (("username", "TORCHCACHE_REMOTE_USER"), ("password", "TORCHCACHE_REMOTE_PASSWORD"))
            if os.environ.get(variable)
        }


def is_address(text: str) -> bool:
    """Whether ``text`` is meant as a URL of a server, not as a path."""
    return text.partition("://")[0] in _SCHEMES and "://" in text


def default_remote() -> str | None:
    """``$TORCHCACHE_REMOTE`` where that can be used, else ``None``."""
    url = os.environ.get("TORCHCACHE_REMOTE")
    if not url:
        return None
    try:
        check_remote(url)
    except ValueError as error:
        warn_once(f"TORCHCACHE_REMOTE cannot be used: it must be {error}")
        return None
    return url


def check_remote(url: str) -> None:
    """Raise ``ValueError``, whose text says what is wanted, where ``url`` cannot be used."""
    Address(url)
    if importlib.util.find_spec("redis") is None:
        raise ValueError("left out, or its client installed: pip install redis")


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"a URL whose {name} is a number of seconds, not {text!r}")
    return number


def _flag(text: str, name: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"a URL whose {name} is true or false, not {text!r}")
    return text == "true"
