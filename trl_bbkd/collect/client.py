"""One attempt at a request, over HTTP. What goes wrong comes back as a value without anything that was sent."""

import contextlib
import errno
import json
import os
from typing import Any

import aiohttp
from aiohttp.helpers import get_env_proxy_for_url
from yarl import URL

from ..host.version import __version__
from .replies import UNREACHABLE, NoReply, Reply
from .requests import chat_url
from .settings import CollectConfig


CONNECT_SECONDS = 30.0


class Client:
    """
    Connections to an endpoint; a context manager.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            The recipe.
        key (`str`, *optional*):
            The key, which is kept nowhere else.
    """

    def __init__(self, settings: CollectConfig, key: str | None):
        self.url = chat_url(settings.base_url)
        headers = {"Content-Type": "application/json", "User-Agent": f"trl-bbkd/{__version__}"}
        if key is not None:
            name = settings.api_key_header
            headers[name] = f"Bearer {key}" if name.lower() == "authorization" else key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.concurrency),
            timeout=aiohttp.ClientTimeout(total=settings.request_timeout, sock_connect=CONNECT_SECONDS),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        # Not `trust_env`, which looks for another key in ~/.netrc before each request
        self._proxy: dict[str, Any] = {}
        with contextlib.suppress(LookupError):
            self._proxy = dict(zip(("proxy", "proxy_auth"), get_env_proxy_for_url(URL(self.url)), strict=True))

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, body: dict[str, Any]) -> Reply | NoReply:
        """Ask once. A redirection is not followed: the key is for this endpoint alone."""
        data = json.dumps(body, ensure_ascii=False).encode(errors="replace")
        # Of aiohttp's errors nothing is shown but their names: their texts may hold the headers that were sent
        try:
            async with self._session.post(self.url, data=data, allow_redirects=False, **self._proxy) as response:
                return Reply(response.status, response.headers, await response.read())
        except aiohttp.ClientConnectorError as error:
            return NoReply(UNREACHABLE, _why(error), was_sent=False)
        except aiohttp.ConnectionTimeoutError:
            return NoReply(UNREACHABLE, f"no connection within {CONNECT_SECONDS:g} s", was_sent=False)
        except TimeoutError:
            return NoReply("time-out")
        except aiohttp.ClientPayloadError:
            return NoReply("cut answer")
        except (aiohttp.ClientError, OSError) as error:
            return NoReply("connection lost", type(error).__name__)


def _why(error: aiohttp.ClientConnectorError) -> str:
    """What the system says of a connection that was not made."""
    cause = error.os_error
    if cause.errno is not None and cause.errno in errno.errorcode:
        return os.strerror(cause.errno)
    return cause.strerror or type(cause).__name__
