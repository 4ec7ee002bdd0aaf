"""An engine that answers with given tokens, for tests of the server; it has the methods of the real one."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence

from gptoss_jax.data.harmony import Harmony, is_harmony
from gptoss_jax.data.tokenizer import Tokenizer, make_tokenizer
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.server.engine_thread import EngineThread
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.service import Service, Settings


@dataclasses.dataclass(eq=False)
class Request:
    prompt: list[int]
    params: SamplingParams
    cache_salt: str = ""
    cached_tokens: int = 0
    finish_reason: str | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)  # that are still to come
    num_sent: int = 0


Script = Sequence[int] | Callable[[Request], Sequence[int]]


class ScriptedEngine:
    """Answers every request with the tokens of a script.

    An answer ends at its first stop token ("stop"), after `max_new_tokens` ("length"), or at the end of the
    script ("stop"). Token t has the log-probability -(t % 8 + 1) / 8, as a sampled one and in prompts, and
    the most likely tokens are t, t + 1, ….
    """

    def __init__(
        self,
        script: Script = (),
        *,
        chunk: int = 4,
        num_slots: int = 4,
        max_context: int = 4096,
        vocab_size: int = 512,
        step_seconds: float = 0.0,
        cached_tokens: int = 0,
    ) -> None:
        """`chunk` tokens of each request come in a step of `step_seconds`."""
        self.script, self.chunk, self.num_slots = script, chunk, num_slots
        self.max_context, self.vocab_size = max_context, vocab_size
        self.step_seconds, self.cached_tokens = step_seconds, cached_tokens
        self.requests: list[Request] = []  # all that were submitted
        self.cancelled: list[Request] = []
        self.num_steps = 0
        self._waiting: list[Request] = []
        self._running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, prompt: Sequence[int], params: SamplingParams, *, cache_salt: str = "") -> Request:
        if len(prompt) + params.max_new_tokens > self.max_context:
            raise ValueError(f"prompt has {len(prompt)} tokens: must leave room for a completion")
        request = Request(list(prompt), params, cache_salt)
        request.tokens = list(self.script(request) if callable(self.script) else self.script)
        self.requests.append(request)
        self._waiting.append(request)
        return request

    def step(self) -> list[tuple[Request, Completion]]:
        time.sleep(self.step_seconds)
        self.num_steps += 1
        while self._waiting and len(self._running) < self.num_slots:
            self._running.append(self._waiting.pop(0))
        parts = [(request, self._part(request)) for request in self._running]
        self._running = [request for request in self._running if request.finish_reason is None]
        return parts

    def cancel(self, request: Request) -> None:
        self.cancelled.append(request)
        for requests in (self._waiting, self._running):
            if request in requests:
                requests.remove(request)

    def reset(self, *, drop_prefixes: bool = False) -> None:
        self._waiting, self._running = [], []

    def _part(self, request: Request) -> Completion:
        params, is_first = request.params, request.num_sent == 0
        request.cached_tokens = min(self.cached_tokens, len(request.prompt) - 1)
        tokens, stop_token = [], None
        while len(tokens) < self.chunk and request.finish_reason is None:
            token = request.tokens.pop(0) if request.tokens else None
            if token is None or token in params.stop_tokens:
                request.finish_reason, stop_token = "stop", token
                break
            tokens.append(token)
            request.num_sent += 1
            if request.num_sent >= params.max_new_tokens:
                request.finish_reason = "length"
        prompt_logprobs = None
        if params.prompt_logprobs and is_first:
            prompt_logprobs = [None, *map(logprob, request.prompt[1:])]
        has_top = params.top_logprobs > 0
        return Completion(
            tokens,
            list(map(logprob, tokens)) if params.logprobs else None,
            request.finish_reason,
            top_logprobs=[self._top(token, params) for token in tokens] if has_top else None,
            prompt_logprobs=prompt_logprobs,
            prompt_top_logprobs=[None, *(self._top(token, params) for token in request.prompt[1:])]
            if prompt_logprobs and has_top
            else None,
            stop_token=stop_token,
        )

    def _top(self, token: int, params: SamplingParams) -> list[tuple[int, float]]:
        first = logprob(token)
        return [((token + i) % self.vocab_size, first - i) for i in range(params.top_logprobs)]


def logprob(token: int) -> float:
    """The log-probability that a `ScriptedEngine` gives to a token."""
    return -(token % 8 + 1) / 8


WORDS = "the quick brown fox jumps over the lazy dog and says hello world to everyone in the city of Paris "


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of 400 tokens with Harmony's special tokens."""
    return make_tokenizer("bpe:400", lambda: iter([WORDS * 9]))


def scripted_service(
    engine: ScriptedEngine,
    tokenizer: Tokenizer | None = None,
    *,
    settings: Settings = Settings(),  # noqa: B008 (it is frozen)
    max_queue: int = 256,
    **fields,
) -> Service:
    """A service over a scripted engine; its model is `tiny`. `fields` are other fields of `Service`."""
    tokenizer = tokenizer or tiny_tokenizer()
    metrics = Metrics("tiny")
    thread = EngineThread(engine, max_queue)
    metrics.watch(thread)
    service = Service(
        engine=thread,
        tokenizer=tokenizer,
        model_id="tiny",
        harmony=Harmony(tokenizer) if is_harmony(tokenizer) else None,
        max_context=engine.max_context,
        vocab_size=engine.vocab_size,
        system_fingerprint="fp_test",
        metrics=metrics,
        date="2026-01-02",
        settings=settings,
    )
    return dataclasses.replace(service, **fields)


def encode_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of a text, in which names of special tokens stand for them."""
    tokens: list[int] = []
    for piece in re.split(r"(<\|\w+\|>)", text):
        special = tokenizer.special_tokens.get(piece)
        tokens += tokenizer.encode(piece) if special is None else [special]
    return tokens
