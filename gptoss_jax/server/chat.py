"""`/v1/chat/completions`: Harmony chats with reasoning, tool calls and structured output."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptoss_jax.data.harmony import Harmony
from gptoss_jax.inference.sampling_params import Completion
from gptoss_jax.server.answers import AnswerReader, Delta, TokenLogprob, logprob_json
from gptoss_jax.server.chat_request import KNOWN, ChatRequest, read_request
from gptoss_jax.server.engine_thread import Stream, merge
from gptoss_jax.server.service import Service, make_id, make_usage
from gptoss_jax.server.sse import respond

# Joins messages of the same kind in a response, such as a preamble and the final message.
SEPARATOR = "\n\n"


def routes() -> list[Route]:
    """Returns the routes of this module."""
    return [Route("/v1/chat/completions", create, methods=["POST"])]


async def create(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    return await respond(request, KNOWN, read_request, Answer)


class Choice:
    """Converts the output of one choice to OpenAI's format as it arrives."""

    def __init__(self, harmony: Harmony, asked: ChatRequest, reasoning_names: Sequence[str]) -> None:
        self.reader = AnswerReader(harmony, asked.tools.names, asked.stop)
        self.tokens: list[int] = []
        self._harmony, self._asked = harmony, asked
        self._reasoning_names = reasoning_names  # empty if the client does not want it
        self._begun: set[str] = set()  # kinds of messages that have text

    def feed(self, part: Completion) -> list[dict[str, Any]]:
        """Returns the `delta` and `logprobs` of each chunk for the next part of a completion."""
        before = self.reader.num_tokens
        deltas = self.reader.feed(part)
        self.tokens += part.tokens[: self.reader.num_tokens - before]
        found = ((self._delta(one), one.logprobs) for one in deltas)
        return [{"delta": delta, "logprobs": self.logprobs(tokens)} for delta, tokens in found if delta]

    def _delta(self, delta: Delta) -> dict[str, Any]:
        if (call := delta.call) is not None:
            function = {"arguments": delta.text}
            if not delta.is_first:
                return {"tool_calls": [{"index": call.index, "function": function}]}
            function = {"name": call.name, **function}
            return {
                "tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]
            }
        is_next = delta.is_first and delta.kind in self._begun
        self._begun.add(delta.kind)
        text = SEPARATOR + delta.text if is_next else delta.text
        names = ("content",) if delta.kind == "content" else self._reasoning_names
        return dict.fromkeys(names, text)

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Returns the `logprobs` object for content tokens; None if the request does not ask for it."""
        if not self._asked.params.logprobs:
            return None
        return {"content": [logprob_json(self._harmony, token) for token in tokens], "refusal": None}


class Answer:
    """Builds the response to one request, complete or streamed."""

    def __init__(self, service: Service, asked: ChatRequest, streams: Sequence[Stream]) -> None:
        names: tuple[str, ...] = ()
        if asked.has_reasoning and service.settings.reasoning_content:
            names = ("reasoning", "reasoning_content")
        elif asked.has_reasoning:
            names = ("reasoning",)
        self._asked, self._streams, self._reasoning_names = asked, streams, names
        self._choices = [Choice(service.need_harmony(), asked, names) for _ in streams]
        self._head = {
            "id": make_id("chatcmpl"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.model_id,
            "system_fingerprint": service.system_fingerprint,
            "seed": asked.params.seed,
        }

    def close(self) -> None:
        """Cancels all unfinished choices."""
        for stream in self._streams:
            stream.close()

    async def _parts(self) -> AsyncIterator[tuple[int, Completion, list[dict[str, Any]]]]:
        """Yields (choice, part, deltas) as they arrive; a stop string ends a choice."""
        async for i, part in merge(self._streams):
            added = self._choices[i].feed(part)
            if self._choices[i].reader.finish_reason is not None:
                self._streams[i].close()
            yield i, part, added

    async def whole(self) -> dict[str, Any]:
        """Returns the complete response."""
        added: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for i, _, more in self._parts():
            added[i] += more
        choices = [self._choice(i, parts) for i, parts in enumerate(added)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _choice(self, i: int, added: Sequence[dict[str, Any]]) -> dict[str, Any]:
        choice = self._choices[i]
        texts: dict[str, list[str]] = {}
        calls: list[dict[str, Any]] = []
        for delta in (one["delta"] for one in added):
            for call in delta.get("tool_calls", ()):
                index = call.pop("index")
                if index == len(calls):
                    calls.append(call)
                else:
                    calls[index]["function"]["arguments"] += call["function"]["arguments"]
            for name in delta.keys() - {"tool_calls"}:
                texts.setdefault(name, []).append(delta[name])
        content = texts.pop("content", [])
        message = {
            "role": "assistant",
            "content": None if calls and not content else "".join(content),
            "refusal": None,
            # Null rather than absent: clients would raise AttributeError.
            **dict.fromkeys(self._reasoning_names),
            **{name: "".join(parts) for name, parts in sorted(texts.items())},
            **({"tool_calls": calls} if calls else {}),
        }
        logprobs = choice.logprobs(())
        if logprobs is not None:
            logprobs["content"] = [entry for one in added for entry in one["logprobs"]["content"]]
        found = {
            "index": i,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": choice.reader.finish_reason,
        }
        if self._asked.return_token_ids:
            found |= {"token_ids": choice.tokens, "prompt_token_ids": self._asked.prompt}
        return found

    async def chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the chunks of a streamed response."""
        head = {**self._head, "object": "chat.completion.chunk"}
        usage = {"usage": None} if include_usage else {}
        started: set[int] = set()

        def chunk(i: int, **fields: Any) -> dict[str, Any]:
            choice = {"index": i, "delta": {}, "logprobs": None, "finish_reason": None, **fields}
            return {**head, "choices": [choice], **usage}

        async for i, part, added in self._parts():
            choice = self._choices[i]
            if i not in started:
                started.add(i)
                ids = {"prompt_token_ids": self._asked.prompt} if self._asked.return_token_ids else {}
                yield chunk(i, delta={"role": "assistant", "content": ""}, **ids)
            for one in added:
                yield chunk(i, **one)
            reason = choice.reader.finish_reason
            if self._asked.return_token_ids and part.tokens:
                yield chunk(i, token_ids=choice.tokens, finish_reason=reason)
                choice.tokens = []
            elif reason is not None:
                yield chunk(i, finish_reason=reason)
        if include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        readers = [choice.reader for choice in self._choices]
        sampled = sum(reader.num_tokens for reader in readers)
        reasoning = sum(reader.num_reasoning_tokens for reader in readers)
        return make_usage(len(self._asked.prompt), sampled, self._streams[0].cached_tokens, reasoning)
