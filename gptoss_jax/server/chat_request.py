"""Request fields of `/v1/chat/completions`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import anyio.to_thread

from gptoss_jax.data.harmony import Reasoning
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.server.answer_grammar import answer_grammar
from gptoss_jax.server.fields import Fields
from gptoss_jax.server.messages import read_messages
from gptoss_jax.server.response_format import read_response_format
from gptoss_jax.server.sampling_fields import (
    choice_params,
    read_effort,
    read_n,
    read_sampling,
    read_stop,
    read_top_logprobs,
)
from gptoss_jax.server.service import Service
from gptoss_jax.server.tools import Tools, read_tools

# Known but unsupported fields, with the values that are accepted because they have no effect.
UNSUPPORTED: dict[str, Sequence[Any]] = {
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "store": (False,),
    "verbosity": ("medium",),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "use_beam_search": (False,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "documents": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
KNOWN = (
    "model", "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort",
    "reasoning", "include_reasoning", "chat_template_kwargs", "max_completion_tokens", "max_tokens", "n",
    "stream", "stream_options", "stop", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "logprobs", "top_logprobs", "stop_token_ids", "ignore_eos",
    "return_token_ids", "cache_salt", "user", "metadata", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "service_tier", *UNSUPPORTED,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A validated request. `params` are for the first choice."""

    prompt: list[int]
    params: SamplingParams
    n: int
    tools: Tools
    stop: tuple[str, ...]
    has_reasoning: bool  # include reasoning in the response
    return_token_ids: bool
    cache_salt: str

    def requests(self) -> list[tuple[list[int], SamplingParams]]:
        """Returns the engine requests, one per choice."""
        return [(self.prompt, choice_params(self.params, i)) for i in range(self.n)]


async def read_request(fields: Fields, service: Service) -> ChatRequest:
    """Validates the fields of a request and tokenizes its prompt.

    Raises ApiError with the path of the field that is invalid or not supported.
    """
    harmony = service.need_harmony()
    fields.refuse(UNSUPPORTED)
    conversation, tools = read_messages(fields), read_tools(fields)
    wanted = read_response_format(fields.object("response_format"))
    effort, has_reasoning = _reasoning(fields, service)
    n, stop = read_n(fields), read_stop(fields)
    logprobs, top_logprobs = fields.boolean("logprobs"), read_top_logprobs(fields)
    fields.require(logprobs or not top_logprobs, "top_logprobs", "needs logprobs: true")
    # Checked but ignored: gpt-oss makes one call per turn.
    fields.boolean("parallel_tool_calls")

    def prepare() -> tuple[list[int], str | None]:
        section = None if wanted is None else wanted.section
        messages = conversation.with_system(effort, service.system_date(), tools, section)
        grammar = answer_grammar(service.tokenizer, service.vocab_size, tools, wanted)
        return harmony.render(messages), grammar

    prompt, grammar = await anyio.to_thread.run_sync(prepare)
    is_bound = grammar is not None and fields.boolean("ignore_eos")
    fields.require(not is_bound, "ignore_eos", "must be false with a response format or enforced calls")
    params = read_sampling(fields, service, harmony.stop_tokens, len(prompt))
    return ChatRequest(
        prompt=prompt,
        params=dataclasses.replace(params, grammar=grammar, logprobs=logprobs, top_logprobs=top_logprobs),
        n=n,
        tools=tools,
        stop=stop,
        has_reasoning=has_reasoning,
        return_token_ids=fields.boolean("return_token_ids"),
        cache_salt=fields.text("cache_salt", ""),
    )


def _reasoning(fields: Fields, service: Service) -> tuple[Reasoning, bool]:
    """Returns the reasoning effort, and whether to include reasoning in the response."""
    effort = service.reasoning
    for options in (fields.object("chat_template_kwargs"), fields):
        if options is not None:
            effort = read_effort(options, "reasoning_effort", effort)
    is_shown = fields.boolean("include_reasoning", True)
    if (reasoning := fields.object("reasoning")) is not None:
        effort = read_effort(reasoning, "effort", effort)
        is_shown = is_shown and not reasoning.boolean("exclude")
    return effort, is_shown
