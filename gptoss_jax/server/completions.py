"""`/v1/completions`: raw text completion, without a chat format."""

import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.server.completion_text import (
    ChoiceText,
    LogprobEntry,
    Offsets,
    TextOptions,
    logprobs_object,
)
from gptoss_jax.server.engine_thread import Stream, merge
from gptoss_jax.server.errors import bad_request
from gptoss_jax.server.fields import Fields, shown
from gptoss_jax.server.sampling_fields import (
    check_tokens,
    choice_params,
    read_max_tokens,
    read_n,
    read_sampling,
    read_stop,
    read_top_logprobs,
)
from gptoss_jax.server.service import Service, make_id, make_usage
from gptoss_jax.server.sse import respond
from gptoss_jax.server.tokenization import encode_prompt, prompt_options

# OpenAI's default.
DEFAULT_MAX_TOKENS = 16
# Known but unsupported fields, with the values that are accepted because they have no effect.
UNSUPPORTED: dict[str, Sequence[Any]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
KNOWN = (
    "model", "prompt", "max_tokens", "n", "best_of", "echo", "logprobs", "stream", "stream_options", "stop",
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed",
    "stop_token_ids", "ignore_eos", "skip_special_tokens", "return_tokens_as_token_ids", "return_token_ids",
    "parse_special", "add_special_tokens", "cache_salt", "user", *UNSUPPORTED,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt's tokens and text. For prompts given as token ids, the text is only decoded for `echo`."""

    tokens: list[int]
    text: str
    is_text: bool  # given as text, which contains the names of special tokens
    has_added_bos: bool  # a bos was prepended, which is not in `text`


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A validated request to `/v1/completions`."""

    prompts: list[Prompt]
    params: list[SamplingParams]  # for the first choice of each prompt
    n: int
    text: TextOptions
    is_echo: bool
    is_scored_only: bool  # max_tokens is 0
    return_token_ids: bool
    cache_salt: str

    def requests(self) -> list[tuple[list[int], SamplingParams]]:
        """Returns the engine requests, `n` per prompt."""
        pairs = zip(self.prompts, self.params, strict=True)
        return [(prompt.tokens, choice_params(params, i)) for prompt, params in pairs for i in range(self.n)]


def routes() -> list[Route]:
    """Returns the routes of this module."""
    return [Route("/v1/completions", create, methods=["POST"])]


async def create(request: Request) -> Response:
    """`POST /v1/completions`."""
    return await respond(request, KNOWN, read_request, Answer)


async def read_request(fields: Fields, service: Service) -> CompletionRequest:
    """Validates the fields of a request and tokenizes its prompts."""
    fields.refuse(UNSUPPORTED)
    n = read_n(fields)
    best_of = fields.integer("best_of", n, 1)
    fields.require(best_of == n, "best_of", f"must equal n, {n}: other values are not supported")
    logprobs = read_top_logprobs(fields, "logprobs") if "logprobs" in fields else None
    is_echo, stops = fields.boolean("echo"), read_stop(fields)
    is_scored_only = type(fields.get("max_tokens")) is int and fields.get("max_tokens") == 0
    text = TextOptions(
        service.tokenizer,
        stop_strings=stops,
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids"),
        logprobs=logprobs,
    )
    prompts = await read_prompts(fields, service, text)
    limit = service.settings.max_choices
    fits = len(prompts) * n <= limit
    fields.require(fits, "n" if n > 1 else "prompt", f"prompts times n must be at most {limit:,}")
    if is_scored_only:  # the engine samples at least one token
        fields = Fields({**fields.values, "max_tokens": 1})
    names, longest = ("max_tokens",), max(len(prompt.tokens) for prompt in prompts)
    # Special tokens do not appear in the text, so their names as stop strings become stop tokens.
    special = service.tokenizer.special_tokens
    stop_tokens = [*service.tokenizer.stop_ids, *(special[stop] for stop in stops if stop in special)]
    stop_tokens = [token for token in stop_tokens if token < service.vocab_size]
    settings = read_sampling(
        fields, service, stop_tokens, longest, names, DEFAULT_MAX_TOKENS, prompt_name="prompt"
    )
    settings = dataclasses.replace(
        settings,
        stop_strings=stops,
        logprobs=logprobs is not None,
        top_logprobs=logprobs or 0,
        prompt_logprobs=is_echo and logprobs is not None,
    )
    limits = [
        read_max_tokens(fields, service, len(prompt.tokens), names, DEFAULT_MAX_TOKENS) for prompt in prompts
    ]
    # Validate once per distinct limit: there may be many prompts.
    params = {limit: dataclasses.replace(settings, max_new_tokens=limit) for limit in set(limits)}
    return CompletionRequest(
        prompts=prompts,
        params=[params[limit] for limit in limits],
        n=n,
        text=text,
        is_echo=is_echo,
        is_scored_only=is_scored_only,
        return_token_ids=fields.boolean("return_token_ids"),
        cache_salt=fields.text("cache_salt", ""),
    )


async def read_prompts(fields: Fields, service: Service, options: TextOptions) -> list[Prompt]:
    """Parses `prompt`: a text, texts, token ids, or lists of token ids; if absent, an empty text."""
    value = fields.get("prompt")
    value = "" if value is None else value
    fields.require(isinstance(value, (str, list)), "prompt", "must be a string or a list")
    fields.require(value != [], "prompt", "must not be an empty list")
    is_ids = isinstance(value, list) and not isinstance(value[0], (str, list))
    items = [value] if is_ids or isinstance(value, str) else value
    limit = service.settings.max_choices
    fields.require(len(items) <= limit, "prompt", f"must have at most {limit:,} prompts")
    parse_special, add_bos = prompt_options(fields)
    bos_before_ids = fields.boolean("add_special_tokens", service.settings.prepend_bos)
    bos = service.tokenizer.bos_id
    prompts = []
    for i, item in enumerate(items):
        path = "prompt" if is_ids or isinstance(value, str) else f"prompt[{i}]"
        if isinstance(item, str):
            tokens = await encode_prompt(service.tokenizer, item, parse_special, add_bos)
            fields.require(bool(tokens), "prompt", "must have at least one token")
            is_added = add_bos and not (parse_special and item.startswith(options.spelled.name(bos)))
            prompts.append(Prompt(tokens, item, is_text=True, has_added_bos=is_added))
            continue
        if not isinstance(item, list) or not item:
            raise bad_request(f"{path} is {shown(item)}: must be text or a list of token ids", path)
        check_tokens(item, path, service.vocab_size)
        is_added = bos_before_ids and item[0] != bos
        tokens = [bos] * is_added + item
        text = options.decode(item) if fields.boolean("echo") else ""
        prompts.append(Prompt(tokens, text, is_text=False, has_added_bos=is_added))
    return prompts


class Answer:
    """Builds the response to one request, complete or streamed."""

    def __init__(self, service: Service, asked: CompletionRequest, streams: Sequence[Stream]) -> None:
        self._asked, self._streams = asked, streams
        self._choices = [
            ChoiceText(asked.text, len(self._prompt(i).text) if asked.is_echo else 0)
            for i in range(len(streams))
        ]
        self._head = {
            "id": make_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_id,
            "system_fingerprint": service.system_fingerprint,
            "seed": asked.params[0].seed,
        }

    def close(self) -> None:
        """Cancels all unfinished choices."""
        for stream in self._streams:
            stream.close()

    async def whole(self) -> dict[str, Any]:
        """Returns the complete response."""
        parts = [await stream.completion() for stream in self._streams]
        choices = [self._choice(i, part, is_first=True) for i, part in enumerate(parts)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the chunks of a streamed response."""
        usage = {"usage": None} if include_usage else {}
        started: set[int] = set()
        async for i, part in merge(self._streams):
            choice = self._choice(i, part, is_first=i not in started)
            started.add(i)
            if choice["finish_reason"] is not None:
                self._streams[i].close()
            names = ("text", "finish_reason", "token_ids", "prompt_token_ids")
            if any(choice.get(name) for name in names):
                yield {**self._head, "choices": [choice], **usage}
        if include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _prompt(self, i: int) -> Prompt:
        return self._asked.prompts[i // self._asked.n]

    def _choice(self, i: int, part: Completion, is_first: bool) -> dict[str, Any]:
        """Returns the JSON of choice `i` for the next part of its completion."""
        asked, choice = self._asked, self._choices[i]
        if asked.is_scored_only:
            part = dataclasses.replace(part, tokens=[], logprobs=part.logprobs and [], stop_token=None)
        text, tokens, logprobs = choice.feed(part)
        if asked.is_scored_only and choice.finish_reason is not None:
            choice.finish_reason = "length"
        if asked.is_echo and is_first:
            text = self._prompt(i).text + text
            if logprobs is not None:
                echoed = self._echoed_logprobs(self._prompt(i), part)
                logprobs = {name: echoed[name] + logprobs[name] for name in logprobs}
        answer = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        if asked.return_token_ids:
            answer["token_ids"] = tokens
            if is_first:
                answer["prompt_token_ids"] = self._prompt(i).tokens
        return answer

    def _echoed_logprobs(self, prompt: Prompt, part: Completion) -> dict[str, Any]:
        """Returns the `logprobs` of an echoed prompt, without a bos that was added to token ids."""
        text = self._asked.text
        offsets = Offsets(text.spelled if prompt.is_text else text.text_tokenizer)
        logprobs = part.prompt_logprobs or [None] * len(prompt.tokens)
        tops = part.prompt_top_logprobs or [None] * len(prompt.tokens)
        entries = []
        for i, (token, logprob, top) in enumerate(zip(prompt.tokens, logprobs, tops, strict=True)):
            is_added = i == 0 and prompt.has_added_bos
            if not is_added or prompt.is_text:
                offset = 0 if is_added else offsets.next(token)
                entries.append(LogprobEntry(offset, token, logprob, top or ()))
        return logprobs_object(text, entries)

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(prompt.tokens) for prompt in self._asked.prompts)
        firsts = self._streams[:: self._asked.n]
        cached = sum(stream.cached_tokens for stream in firsts)
        return make_usage(prompt, sum(choice.num_tokens for choice in self._choices), cached)
