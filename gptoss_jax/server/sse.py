"""Server-sent events: streams with pings, errors, and an end to clients that leave or do not read."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptoss_jax.server.errors import ApiError, internal_error
from gptoss_jax.server.transport import disconnected

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """A response of server-sent events.

    Args:
      events: yields what is sent: `data` alone, or (event, `data`); `data` is written as JSON.
      close: cancels the requests behind it; called once, however the stream ends.
      done: send `data: [DONE]` at the end, unless there was an error.
      error_event: makes the event for an error in the stream; default: `data: {"error": …}`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any] | tuple[str, Mapping[str, Any]]],
        close: Callable[[], None],
        *,
        done: bool = True,
        error_event: Callable[[ApiError], Any] | None = None,
    ) -> None:
        self.status_code, self.background = 200, None  # no body, or it would get a Content-Length
        self.init_headers(HEADERS)
        self._events, self._close, self._done = events, close, done
        self._error_event = error_event or ApiError.body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = scope["app"].state.service.settings
        sender = asyncio.ensure_future(self._send_all(send, settings.ping_interval, settings.send_timeout))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            gone.cancel()
            sender.cancel()
            self._close()
            await asyncio.gather(sender, gone, return_exceptions=True)
            await self._events.aclose()

    async def _send_all(self, send: Send, ping_interval: float, send_timeout: float) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)

        async def write(data: bytes) -> None:
            # Blocks while the client does not read: then nothing more is made for it.
            async with asyncio.timeout(send_timeout):
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            async for data in self._with_pings(ping_interval):
                await write(data)
            if self._done:
                await write(DONE)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.info("a client left its stream unread for %g s", send_timeout)

    async def _with_pings(self, interval: float) -> AsyncIterator[bytes]:
        upcoming = asyncio.ensure_future(anext(self._events, None))
        try:
            while True:
                await asyncio.wait((upcoming,), timeout=interval)
                if not upcoming.done():
                    yield PING
                    continue
                try:
                    event = upcoming.result()
                except Exception as error:
                    if not isinstance(error, ApiError):
                        log.exception("a stream failed")
                        error = internal_error()
                    self._done = False
                    yield encode(self._error_event(error))
                    return
                if event is None:
                    return
                yield encode(event)
                upcoming = asyncio.ensure_future(anext(self._events, None))
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)


def encode(event: Mapping[str, Any] | tuple[str, Mapping[str, Any]]) -> bytes:
    """Returns an event as bytes."""
    name, data = event if isinstance(event, tuple) else (None, event)
    head = "" if name is None else f"event: {name}\n"
    # JSON has no line breaks, so one `data:` line holds it.
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
