"""Request bodies in, JSON answers out: size and time limits, and clients that leave."""

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
# Bodies of more bytes are parsed on another thread: megabytes of JSON take as long as many tokens.
PARSE_INLINE = 1 << 16
# Seconds for which the rest of a body that is too long is read and dropped: a connection that is closed with
# unread bytes is reset, and the client may lose the error. And seconds without any of it, which end this.
DROP_SECONDS, DROP_IDLE = 10.0, 0.25


async def read_json(request: Request) -> Fields:
    """Reads a request's body.

    Raises ApiError: 400 if it is not JSON, 408 if it comes too slowly, 413 if it is too long.
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
        raise bad_request("The client left before the request's end.") from None
    if len(body) <= PARSE_INLINE:
        return parse_json(bytes(body))
    return await anyio.to_thread.run_sync(parse_json, bytes(body))


async def while_connected(request: Request, work: Awaitable[Result], cancel: Callable[[], None]) -> Result:
    """Awaits `work` for an answer without a stream, but calls `cancel` if the client leaves.

    Raises ApiError then, which nobody receives.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise bad_request("The client left.")
    finally:
        gone.cancel()
        task.cancel()
        cancel()


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def json_response(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a JSON response."""
    return JSONResponse(content, status, headers=headers)


class TooLongResponse(JSONResponse):
    """An error that is sent before the end of the request's body, of which the rest is dropped."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DROP_SECONDS):
                while (await asyncio.wait_for(receive(), DROP_IDLE)).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_response(error: ApiError) -> Response:
    """Returns an error's response."""
    if error.status == 413:
        return TooLongResponse(error.body(), error.status, error.headers)
    return json_response(error.body(), error.status, error.headers)


def _too_long(limit: int) -> ApiError:
    message = f"The request's body has more than {limit:,} bytes."
    return _unread(ApiError(413, message, code="request_too_large"))


def _unread(error: ApiError) -> ApiError:
    """Closes the connection, whose next bytes are the rest of the body."""
    error.headers["Connection"] = "close"
    return error
