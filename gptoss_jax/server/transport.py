"""Request bodies (with size and time limits), JSON responses, and client disconnects."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gptoss_jax.server.errors import ApiError, bad_request
from gptoss_jax.server.fields import Fields, parse_json

Result = TypeVar("Result")
# Larger bodies are parsed on another thread, because parsing megabytes of JSON would stall all streams.
PARSE_INLINE = 1 << 16
# Seconds, in total and without receiving data, to read and discard the rest of a body that is too large: if a
# connection is closed with unread bytes, it is reset and the client may not see the error.
DROP_SECONDS, DROP_IDLE = 10.0, 0.25


async def read_json(request: Request) -> Fields:
    """Reads and parses a request's JSON body.

    Raises ApiError: 400 if it is not JSON, 408 if it arrives too slowly, 413 if it is too large.
    """
    settings = request.app.state.service.settings
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > settings.max_body:
        raise _too_long(settings.max_body)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.max_body:
                    raise _too_long(settings.max_body)
    except TimeoutError:
        message = f"The request's body did not arrive within {settings.body_timeout:g} s."
        raise _unread(ApiError(408, message, code="request_timeout")) from None
    except ClientDisconnect:
        raise bad_request("The client disconnected before sending the whole request.") from None
    if len(body) <= PARSE_INLINE:
        return parse_json(bytes(body))
    return await anyio.to_thread.run_sync(parse_json, bytes(body))


async def while_connected(request: Request, work: Awaitable[Result], cancel: Callable[[], None]) -> Result:
    """Awaits `work` for a response that is not streamed; calls `cancel` if the client disconnects.

    In that case it raises ApiError, which no one receives.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise bad_request("The client disconnected.")
    finally:
        gone.cancel()
        task.cancel()
        cancel()


async def disconnected(receive: Receive) -> None:
    """Returns when the client disconnects; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def json_response(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a JSON response."""
    return JSONResponse(content, status, headers=headers)


class TooLongResponse(JSONResponse):
    """An error response sent before the whole request body has arrived; discards the rest of the body."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DROP_SECONDS):
                while (await asyncio.wait_for(receive(), DROP_IDLE)).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_response(error: ApiError) -> Response:
    """Returns the response for an error."""
    if error.status == 413:
        return TooLongResponse(error.body(), error.status, error.headers)
    return json_response(error.body(), error.status, error.headers)


def _too_long(limit: int) -> ApiError:
    message = f"The request's body has more than {limit:,} bytes."
    return _unread(ApiError(413, message, code="request_too_large"))


def _unread(error: ApiError) -> ApiError:
    """Makes the error close the connection: its next bytes would be the rest of the body."""
    error.headers["Connection"] = "close"
    return error
