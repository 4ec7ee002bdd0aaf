"""`/v1/responses`: OpenAI's Responses API, with reasoning items, functions, streaming and storage."""

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptoss_jax.server.answers import AnswerReader
from gptoss_jax.server.engine_thread import Stream
from gptoss_jax.server.errors import ApiError, internal_error
from gptoss_jax.server.fields import shown
from gptoss_jax.server.response_events import Event, ResponseEvents
from gptoss_jax.server.response_request import KNOWN, ResponseRequest, read_request
from gptoss_jax.server.service import Service
from gptoss_jax.server.sse import EventStream
from gptoss_jax.server.transport import json_response, read_json, while_connected


def routes() -> list[Route]:
    """Returns the routes of this module."""
    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/{id}", retrieve, methods=["GET"]),
        Route("/v1/responses/{id}", delete, methods=["DELETE"]),
    ]


async def create(request: Request) -> Response:
    """`POST /v1/responses`."""
    service: Service = request.app.state.service
    fields = await read_json(request)
    service.check_model(fields)
    service.log_unknown(fields, KNOWN)
    is_stream = fields.boolean("stream")
    asked = await read_request(fields, service)
    stream = service.engine.stream(asked.prompt, asked.params, cache_salt=asked.cache_salt)
    answer = Answer(service, asked, stream)
    if is_stream:
        return EventStream(answer.events(), stream.close, done=False)
    return json_response(await while_connected(request, answer.whole(), stream.close))


async def retrieve(request: Request) -> Response:
    """`GET /v1/responses/ID`."""
    service: Service = request.app.state.service
    stored = service.responses.get(request.path_params["id"])
    if stored is None:
        raise not_found(request)
    if request.query_params.get("stream") == "true":
        message = "A stored response cannot be streamed; retrieve it without stream."
        raise ApiError(400, message, param="stream")
    return json_response(stored.response)


async def delete(request: Request) -> Response:
    """`DELETE /v1/responses/ID`."""
    service: Service = request.app.state.service
    if not service.responses.delete(request.path_params["id"]):
        raise not_found(request)
    return json_response({"id": request.path_params["id"], "object": "response", "deleted": True})


def not_found(request: Request) -> ApiError:
    """Returns the ApiError 404 for a response that is not stored."""
    message = (
        f"Response with id {shown(request.path_params['id'])} not found: it was not stored or was evicted."
    )
    return ApiError(404, message, param="id")


class Answer:
    """Builds the response to one request, complete or streamed."""

    def __init__(self, service: Service, asked: ResponseRequest, stream: Stream) -> None:
        self._service, self._asked, self._stream = service, asked, stream
        self._reader = AnswerReader(service.need_harmony(), asked.tools.names)
        self._events = ResponseEvents(
            asked.response,
            service.need_harmony(),
            has_logprobs=asked.params.logprobs,
            has_encoded_reasoning=asked.has_encoded_reasoning,
        )

    async def whole(self) -> dict[str, Any]:
        """Returns the complete response."""
        async for part in self._stream:
            self._events.add(self._reader.feed(part))
        return self._finish()[-1][1]["response"]

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yields the events of a streamed response; the last one has the complete response."""
        for event in self._events.start():
            yield event
        try:
            async for part in self._stream:
                for event in self._events.add(self._reader.feed(part)):
                    yield event
            last = self._finish()
        except ApiError as error:
            last = self._events.fail(error)
        for event in last:
            yield event

    def _finish(self) -> list[Event]:
        """Finishes and stores the response; returns its last events."""
        reader, asked = self._reader, self._asked
        usage = {
            "input_tokens": len(asked.prompt),
            "input_tokens_details": {"cached_tokens": self._stream.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": reader.num_tokens,
            "output_tokens_details": {"reasoning_tokens": reader.num_reasoning_tokens},
            "total_tokens": len(asked.prompt) + reader.num_tokens,
        }
        if reader.finish_reason is None:
            return self._events.fail(internal_error())
        events = self._events.finish(reader.finish_reason, usage)
        if asked.is_stored:
            self._service.responses.put(self._events.response, asked.items, asked.items_bytes)
        return events
