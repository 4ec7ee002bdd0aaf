"""Request fields of `/v1/responses`."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import anyio.to_thread

from gptoss_jax.data.harmony import (
    ASSISTANT,
    DEVELOPER,
    SYSTEM,
    Harmony,
    Message,
    Reasoning,
    without_old_analysis,
)
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.server.answer_grammar import answer_grammar
from gptoss_jax.server.fields import Fields
from gptoss_jax.server.response_events import make_response_id
from gptoss_jax.server.response_format import ResponseFormat, read_response_format
from gptoss_jax.server.response_input import read_input
from gptoss_jax.server.response_store import num_json_bytes
from gptoss_jax.server.sampling_fields import read_effort, read_sampling, read_top_logprobs
from gptoss_jax.server.service import Service
from gptoss_jax.server.tools import Tools, read_tools

LOGPROBS, ENCODED_REASONING = "message.output_text.logprobs", "reasoning.encrypted_content"
INCLUDABLE = (
    LOGPROBS, ENCODED_REASONING, "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
)  # fmt: skip
SERVICE_TIERS = ("auto", "default", "flex", "scale", "priority")
MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512
# Tokens that truncation reserves for output if max_output_tokens is not set; at most half of the context.
ROOM = 4096
# Roles of leading messages that truncation keeps.
FIXED = (SYSTEM, DEVELOPER)
# Known but unsupported fields, with the values that are accepted because they have no effect.
UNSUPPORTED: dict[str, Sequence[Any]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
}
# Fields that are copied to the response and otherwise ignored.
ECHOED = ("max_tool_calls", "prompt_cache_key", "safety_identifier", "user")
KNOWN = (
    "model", "input", "instructions", "previous_response_id", "tools", "tool_choice", "parallel_tool_calls",
    "text", "reasoning", "max_output_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop_token_ids", "ignore_eos", "top_logprobs", "include",
    "metadata", "store", "stream", "stream_options", "truncation", "service_tier", "cache_salt",
    "prompt_cache_retention", *ECHOED, *UNSUPPORTED,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ResponseRequest:
    """A validated request. `response` is the JSON of the response without output."""

    prompt: list[int]
    params: SamplingParams
    tools: Tools
    # Input items of the conversation, for the store.
    items: Sequence[Mapping[str, Any]]
    items_bytes: int  # size as JSON
    response: dict[str, Any]
    is_stored: bool
    has_encoded_reasoning: bool
    cache_salt: str


async def read_request(fields: Fields, service: Service) -> ResponseRequest:
    """Validates the fields of a request and tokenizes its prompt.

    Raises ApiError with the path of the field that is invalid or not supported.
    """
    fields.refuse(UNSUPPORTED)
    harmony = service.need_harmony()
    tools, effort = read_tools(fields), _effort(fields, service)
    include = _include(fields)
    top_logprobs = read_top_logprobs(fields)
    given = read_input(fields, service.responses)
    text = fields.object("text") or Fields({}, "text")
    wanted = read_response_format(text.object("format"))
    is_cut = fields.choice("truncation", ("auto", "disabled"), "disabled") == "auto"
    room = fields.integer("max_output_tokens", min(ROOM, service.max_context // 2), 1)

    def prepare() -> tuple[list[int], str | None, int]:
        section = None if wanted is None else wanted.section
        messages = given.conversation.with_system(effort, service.system_date(), tools, section)
        prompt = harmony.render(messages)
        if is_cut and len(prompt) + room > service.max_context:
            prompt = truncated(harmony, messages, service.max_context - room)
        grammar = answer_grammar(service.tokenizer, service.vocab_size, tools, wanted)
        return prompt, grammar, num_json_bytes(given.items)

    prompt, grammar, items_bytes = await anyio.to_thread.run_sync(prepare)
    is_bound = grammar is not None and fields.boolean("ignore_eos")
    fields.require(not is_bound, "ignore_eos", "must be false with a response format or enforced calls")
    stop_tokens = harmony.stop_tokens
    params = read_sampling(
        fields, service, stop_tokens, len(prompt), ("max_output_tokens",), prompt_name="input"
    )
    params = dataclasses.replace(
        params,
        grammar=grammar,
        logprobs=LOGPROBS in include or top_logprobs > 0,
        top_logprobs=top_logprobs,
    )
    return ResponseRequest(
        prompt=prompt,
        params=params,
        tools=tools,
        items=given.items,
        items_bytes=items_bytes,
        response=_response(fields, service, params) | {"text": _text(text, wanted)},
        is_stored=fields.boolean("store", True),
        has_encoded_reasoning=ENCODED_REASONING in include,
        cache_salt=fields.text("cache_salt", ""),
    )


def truncated(harmony: Harmony, messages: Sequence[Message], limit: int) -> list[int]:
    """Returns the prompt without the oldest messages, so that it has at most `limit` tokens.

    Keeps leading system and developer messages and the last message. A result is dropped with its call.
    """
    messages = without_old_analysis(messages)
    first = next((i for i, message in enumerate(messages) if message.role not in FIXED), len(messages))
    start_of_answer = len(harmony.render([]))
    sizes = [len(harmony.render([message])) - start_of_answer for message in messages]
    excess, end = sum(sizes) + start_of_answer - limit, first
    while end < len(messages) - 1 and (excess > 0 or messages[end].recipient == ASSISTANT):
        excess -= sizes[end]
        end += 1
    return harmony.render(messages[:first] + messages[end:])


def _effort(fields: Fields, service: Service) -> Reasoning:
    reasoning = fields.object("reasoning")
    if reasoning is None:
        return service.reasoning
    reasoning.choice("summary", ("auto", "concise", "detailed"))
    return read_effort(reasoning, "effort", service.reasoning)


def _include(fields: Fields) -> tuple[str, ...]:
    include = fields.texts("include")
    for name in include:
        fields.require(name in INCLUDABLE, "include", f"must be a list of {', '.join(INCLUDABLE)}")
    return include


def _metadata(fields: Fields) -> dict[str, str]:
    metadata = fields.object("metadata")
    if metadata is None:
        return {}
    values = metadata.values
    fits = len(values) <= MAX_METADATA and all(
        isinstance(value, str) and len(value) <= MAX_VALUE and len(key) <= MAX_KEY
        for key, value in values.items()
    )
    allowed = f"must have at most {MAX_METADATA} strings of {MAX_VALUE} characters, keys of {MAX_KEY}"
    fields.require(fits, "metadata", allowed)
    return dict(values)


def _response(fields: Fields, service: Service, params: SamplingParams) -> dict[str, Any]:
    """Returns the JSON of the response without output."""
    reasoning = fields.object("reasoning") or Fields({})
    fields.choice("service_tier", SERVICE_TIERS)
    return {
        "id": make_response_id(),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.text("instructions"),
        "max_output_tokens": fields.integer("max_output_tokens"),
        "model": service.model_id,
        "output": [],
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
        "previous_response_id": fields.text("previous_response_id"),
        "reasoning": {"effort": reasoning.get("effort") or service.reasoning, "summary": None},
        "service_tier": "default",
        "store": fields.boolean("store", True),
        "temperature": params.temperature,
        "tool_choice": _tool_choice(fields),
        "tools": [_tool(tool) for tool in fields.objects("tools") or []],
        "top_logprobs": params.top_logprobs,
        "top_p": 1.0 if params.top_p is None else params.top_p,
        "truncation": fields.choice("truncation", ("auto", "disabled"), "disabled"),
        "usage": None,
        "metadata": _metadata(fields),
        **_echoed(fields),
        "seed": params.seed,
    }


def _echoed(fields: Fields) -> dict[str, Any]:
    texts = {name: fields.text(name) for name in ("prompt_cache_key", "safety_identifier", "user")}
    return {"max_tool_calls": fields.integer("max_tool_calls", low=1), **texts}


def _text(text: Fields, wanted: ResponseFormat | None) -> dict[str, Any]:
    """Returns `text` for the response."""
    given: dict[str, Any] = {"type": "text"}
    if wanted is not None:
        given["type"] = text.needed_object("format").get("type")
    if wanted is not None and given["type"] == "json_schema":
        given |= {"name": wanted.name, "schema": wanted.schema, "strict": wanted.strict}
        given["description"] = wanted.description
    verbosity = text.choice("verbosity", ("low", "medium", "high"), "medium")
    return {"format": given, "verbosity": verbosity}


def _tool(tool: Fields) -> dict[str, Any]:
    """Returns a function for the response; `read_tools` has validated it."""
    given = tool.object("function") or tool
    names = ("name", "description", "parameters")
    strict = given.boolean("strict") or tool.boolean("strict")
    return {"type": "function", **{name: given.get(name) for name in names}, "strict": strict}


def _tool_choice(fields: Fields) -> Any:
    """Returns `tool_choice` for the response; `read_tools` has validated it."""
    choice = fields.get("tool_choice")
    if not isinstance(choice, dict):
        return choice or "auto"

    def named(one: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "function", "name": (one.get("function") or one).get("name")}

    if choice.get("type", "function") == "function":
        return named(choice)
    given = choice.get("allowed_tools") or choice
    tools = [named(tool) for tool in given.get("tools") or []]
    return {"type": "allowed_tools", "mode": given.get("mode") or "auto", "tools": tools}
