"""Server-sent events: streams with pings and errors, closed when the client disconnects or stops reading."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptoss_jax.server.engine_thread import Stream
from gptoss_jax.server.errors import ApiError, internal_error
from gptoss_jax.server.fields import Fields
from gptoss_jax.server.service import Service
from gptoss_jax.server.transport import disconnected, json_response, read_json, while_connected

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# The JSON of an event, or its name and JSON.
Event = Mapping[str, Any] | tuple[str, Mapping[str, Any]]


class EventStream(Response):
    """A response that streams server-sent events.

    Args:
      events: yields `data`, or (event name, `data`); `data` is sent as JSON.
      close: cancels the underlying requests; always called once, when the stream ends.
      done: send `data: [DONE]` at the end, unless there was an error.
      error_event: makes the event for an error in the stream; default: `data: {"error": …}`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        close: Callable[[], None],
        *,
        done: bool = True,
        error_event: Callable[[ApiError], Any] | None = None,
    ) -> None:
        self.status_code, self.background = 200, None  # no body: it would set Content-Length
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
            # Blocks while the client does not read, which provides backpressure.
            async with asyncio.timeout(send_timeout):
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            async for data in self._with_pings(ping_interval):
                await write(data)
            if self._done:
                await write(DONE)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.info("closed a stream that its client did not read for %g s", send_timeout)

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


def encode(event: Event) -> bytes:
    """Encodes an event as bytes."""
    name, data = event if isinstance(event, tuple) else (None, event)
    head = "" if name is None else f"event: {name}\n"
    # JSON without indentation has no line breaks, so it fits in one `data:` line.
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def respond(
    request: Request,
    known: Collection[str],
    read_request: Callable[[Fields, Service], Awaitable[Any]],
    make_answer: Callable[[Service, Any, Sequence[Stream]], Any],
) -> Response:
    """Handles a request for chat or text completions, streamed or not.

    Args:
      request: its body may have `stream` and `stream_options`.
      known: names of all fields that the endpoint knows.
      read_request: validates the fields; returns an object with engine `requests()` and `cache_salt`.
      make_answer: returns an object with `whole()`, `chunks(include_usage)` and `close()`.
    """
    service: Service = request.app.state.service
    fields = await read_json(request)
    service.check_model(fields)
    service.log_unknown(fields, known)
    is_stream = fields.boolean("stream")
    options = fields.object("stream_options")
    fields.require(options is None or is_stream, "stream_options", "is only allowed with stream: true")
    include_usage = options is not None and options.boolean("include_usage")
    asked = await read_request(fields, service)
    streams = service.engine.streams(asked.requests(), cache_salt=asked.cache_salt)
    answer = make_answer(service, asked, streams)
    if is_stream:
        return EventStream(answer.chunks(include_usage), answer.close)
    return json_response(await while_connected(request, answer.whole(), answer.close))
