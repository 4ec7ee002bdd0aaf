"""The engine: continuous batching of prompts in slots that decode together (`inference/slots.py`).

Prompts wait until a slot is free. They are read in chunks, each in a row of its own, between decode calls, so
neither waits long for the other. The next decode call is sent before the tokens of the last are read: the
slots know by themselves when an answer ends, and only stop strings, grammars and cancellations wait for the
host.
"""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from gptoss_jax.checkpoints.readers import find_tokenizer
from gptoss_jax.config import require
from gptoss_jax.data.special_tokens import END_OF_MESSAGE
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference import slots
from gptoss_jax.inference.grammar import GrammarMatcher
from gptoss_jax.inference.prefill import Prefills, cache_length
from gptoss_jax.inference.prefix_cache import PrefixCache, Reuse
from gptoss_jax.inference.request import Request, check_length, check_tokens
from gptoss_jax.inference.sampling import num_words
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.model.transformer import Transformer, get_params
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.mesh import batch_shards, current_axes

# Most steps of a decode call while a prompt is read.
BUSY_STEPS = 8
# Most steps when several processes stream: their clocks differ, so time cannot decide.
MULTI_HOST_STEPS = 8
# Target seconds between parts of a stream, and between searches for stop strings.
STREAM_INTERVAL = 0.05
DEFAULT_PREFIX_BYTES = 1 << 30


@dataclasses.dataclass
class _Call:
    """A decode call whose tokens have not been read."""

    decoded: slots.Decoded
    owners: list[Request | None]  # of the slots
    num_steps: int
    sent: float
    is_paced: bool  # nothing but the call's steps takes its time


class Engine:
    """Answers prompts with one model. All methods are called from one thread."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        num_slots: int = 8,
        max_context: int | None = None,
        prefix_reuse: Reuse = "any",
        prefix_cache_bytes: int = DEFAULT_PREFIX_BYTES,
        streaming: bool = True,
    ) -> None:
        """Uses the mesh that is current now, of one process or, without prefix reuse, of several.

        Args:
          model: under a mesh its parameters must have the shardings that `parallel.rules` gives them.
          tokenizer: finds stop strings and compiles grammars. Default: the one in the folder that the model
            was loaded from. With gpt-oss's special tokens and any prefix reuse, the ends of reasoning are
            kept for it.
          num_slots: answers that decode together; rounded up to what the mesh splits.
          max_context: most tokens of a prompt and its answer; default: the model's limit.
          prefix_reuse: see `PrefixCache`; "off" reads every prompt whole.
          prefix_cache_bytes: bound of its memory.
          streaming: False reads all prompts that have a slot before decoding, and returns parts seldom.

        Raises ValueError for a value out of range.
        """
        config = self._config = model.config
        limit = config.max_position_embeddings
        require(num_slots >= 1, "num_slots", num_slots, "must be 1 or more")
        max_context = limit if max_context is None else max_context
        allowed = f"must be from 2 to {limit}, model.max_position_embeddings"
        require(2 <= max_context <= limit, "max_context", max_context, allowed)
        require(
            prefix_reuse in ("any", "exact", "off"), "prefix_reuse", prefix_reuse, "must be any, exact or off"
        )
        require(prefix_cache_bytes >= 0, "prefix_cache_bytes", prefix_cache_bytes, "must be 0 or more")
        self.max_context, self.vocab_size = max_context, config.vocab_size
        self._params, self._origin, self._tokenizer = get_params(model), model.origin, tokenizer
        self._streaming = streaming
        mesh = jax.sharding.get_mesh()
        self._mesh = None if mesh.empty else mesh
        shards = batch_shards(current_axes())
        self.num_slots = -(-num_slots // shards) * shards
        distributed.agree_on_kernels(config.kernels)
        is_one_process = jax.process_count() == 1
        keeps_prefixes = prefix_reuse != "off" and is_one_process
        self.prefix_cache = PrefixCache(config, prefix_reuse, prefix_cache_bytes) if keeps_prefixes else None
        # On CPU the devices of a mesh share a thread pool, which programs in flight would fill.
        self._is_cpu_mesh = jax.default_backend() == "cpu" and self._mesh is not None and self._mesh.size > 1
        self._lookahead = int(is_one_process and not self._is_cpu_mesh)
        special = {} if tokenizer is None else tokenizer.special_tokens
        self._pause_token = special.get(END_OF_MESSAGE) if keeps_prefixes and prefix_reuse == "any" else None
        self._waiting: collections.deque[Request] = collections.deque()
        self._owners: list[Request | None] = [None] * self.num_slots
        self._prefills = Prefills(config, self._params, self.prefix_cache, self.num_slots)
        self.reset()
        self._num_steps, self._last_read = 1, 0.0
        all_allowed = np.full((self.num_slots, num_words(config.vocab_size)), -1, np.int32)
        with self._on_mesh():
            self._all_allowed_BU = all_allowed if self._mesh is not None else jax.device_put(all_allowed)

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return sum(owner is not None for owner in self._owners)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot, or whose prompts are being read."""
        return len(self._waiting) + self._prefills.num_requests

    @property
    def has_work(self) -> bool:
        """True until all answers are complete and read."""
        return bool(self.num_waiting or self._calls or self.num_running)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008 (it is frozen)
        *,
        cache_salt: str = "",
    ) -> Request:
        """Adds a request, which `step` then answers.

        Args:
          prompt: token ids.
          params: its settings.
          cache_salt: prefixes are reused only among equal salts.

        Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt and `max_new_tokens`
        that exceed `max_context`, stop strings or a grammar without a tokenizer, and a bad grammar.
        """
        tokens = self.check(prompt, params)
        matcher = None
        if params.grammar is not None and self._tokenizer is not None:
            matcher = GrammarMatcher(self._tokenizer, self.vocab_size, params.grammar)
        request = Request(tokens, params, cache_salt, self._tokenizer, matcher)
        self._waiting.append(request)
        return request

    def check(self, prompt: Sequence[int], params: SamplingParams, name: str = "prompt") -> np.ndarray:
        """Returns a prompt as int32 [T]; raises ValueError if it cannot be submitted with these settings."""
        tokens = check_tokens(prompt, params, name, self.vocab_size)
        is_default = self.max_context == self._config.max_position_embeddings
        limit_name = "model.max_position_embeddings" if is_default else "max_context"
        check_length(tokens, params, name, self.max_context, limit_name)
        if params.stop_strings or params.grammar is not None:
            if self._tokenizer is None and self._origin is not None:
                self._tokenizer = find_tokenizer(pathlib.Path(self._origin))
            field = "stop_strings" if params.stop_strings else "grammar"
            allowed = "must come with a tokenizer: tokenizer=…"
            require(self._tokenizer is not None, field, getattr(params, field), allowed)
        return tokens

    def cancel(self, request: Request) -> None:
        """Drops a request: no part of it comes after, and its slot is free for another."""
        if request.is_done:
            return
        request.is_cancelled = True
        if request in self._waiting:
            self._waiting.remove(request)
        self._prefills.remove(request)
        if request in self._owners:
            self._release(self._owners.index(request), is_running=True)

    def reset(self, *, drop_prefixes: bool = False) -> None:
        """Drops all requests and frees the memory of the slots, also after a step that was interrupted.

        Stored prefixes are kept unless `drop_prefixes`: after a fault they may hold its results.
        """
        if drop_prefixes and self.prefix_cache is not None:
            self.prefix_cache.clear()
        for request in (*self._waiting, *self._prefills.requests, *self._owners):
            if request is not None:
                request.is_cancelled = True
        self._waiting.clear()
        self._prefills.clear()
        self._slots: slots.Slots | None = None
        self._cache_len = 0
        self._owners = [None] * self.num_slots
        self._calls: collections.deque[_Call] = collections.deque()
        self._ends_B, self._continues_B = np.zeros((2, self.num_slots), bool)

    def step(self) -> list[tuple[Request, Completion]]:
        """Sends at most one chunk of prompts and one decode call, and reads the oldest call that is due.

        Returns the new parts, possibly none, in the order of the slots.
        """
        with self._on_mesh():
            self._admit()
            if self._is_cpu_mesh or not self._calls:
                # One chunk in flight (see `parallel/in_flight.py`): a long prompt has hundreds.
                jax.block_until_ready(self._prefills.rows_in_flight())
            has_read = self._prefills.step()
            self._insert()
            is_sent = self._can_decode()
            if is_sent:
                self._decode(is_paced=not has_read)
            if self._calls and (not is_sent or len(self._calls) > self._lookahead):
                return list(self._read(self._calls.popleft()))
        return []

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        """Sets the mesh of the constructor: `jax.set_mesh` holds in one thread only."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _admit(self) -> None:
        """Starts to read the prompts that get a slot; equal ones together."""
        num_free = self._owners.count(None) - self._prefills.num_requests
        while self._waiting and num_free:
            self._prefills.start(self._waiting.popleft())
            num_free -= 1

    def _insert(self) -> None:
        """Moves prompts that have been read into slots."""
        for done in self._prefills.take_finished():
            for request in done.requests:
                slot = self._owners.index(None)
                self._owners[slot] = request
                self._ends_B[slot] = self._continues_B[slot] = False
                request.cached_tokens = done.cached_tokens
                if request.params.prompt_logprobs:
                    request.of_prompt = done.prompt_logprobs(request)
                is_alone = self.num_running == 1 and not self._calls
                self._reserve(len(request.prompt) - 1 + self._first_steps(request), may_shrink=is_alone)
                row = slots.SlotRequest.of(self._config, request.params, self._pause_token)
                self._slots = slots.insert(
                    self._slots, done.row, np.int32(slot), np.int32(request.prompt[-1]), row
                )

    def _first_steps(self, request: Request) -> int:
        return min(request.params.max_new_tokens, 1 if self._streaming else slots.MAX_STEPS)

    def _reserve(self, tokens: int, may_shrink: bool = False) -> None:
        """Makes room for `tokens` tokens in every slot; `may_shrink` if no slot runs."""
        length = cache_length(self._config, tokens)
        if self._slots is None or (may_shrink and length < self._cache_len):
            self._slots = slots.init_slots(self._config, self.num_slots, length)
            self._cache_len = length
        elif length > self._cache_len:
            self._slots = slots.grow_slots(self._config, self._slots, length)
            self._cache_len = length

    def _sent_steps(self, request: Request) -> int:
        """Steps of the calls that have not been read, in which the request's slot takes part."""
        return sum(call.num_steps for call in self._calls if request in call.owners)

    def _can_decode(self) -> bool:
        if not self._streaming and self._prefills.num_requests:
            return False
        running = [owner for owner in self._owners if owner is not None]
        # The mask of a grammar depends on the last token.
        if self._calls and any(owner.matcher is not None for owner in running):
            return False
        return any(self._sent_steps(owner) < owner.num_left for owner in running)

    def _decode(self, is_paced: bool) -> None:
        """Sends a decode call."""
        running = [owner for owner in self._owners if owner is not None]
        sent = {owner: self._sent_steps(owner) for owner in running}
        num_steps = self._num_steps if self._streaming else slots.MAX_STEPS
        if self._streaming and any(not owner.tokens and not sent[owner] for owner in running):
            num_steps = 1  # for a first token as soon as possible
        elif self._streaming and self._prefills.num_requests:
            num_steps = min(num_steps, BUSY_STEPS)
        allowed_BU = self._all_allowed_BU
        if any(owner.matcher is not None for owner in running):
            num_steps, allowed_BU = 1, self._grammar_masks()
        num_steps = min(num_steps, max(owner.num_left - sent[owner] for owner in running))
        new = {owner: min(sent[owner] + num_steps, owner.num_left) for owner in running}
        self._reserve(max(len(one.prompt) - 1 + len(one.tokens) + new[one] for one in running))
        changes = self._ends_B.copy(), self._continues_B.copy()
        self._ends_B[:] = self._continues_B[:] = False
        self._slots, decoded = slots.decode(
            self._config, self._params, self._slots, np.int32(num_steps), allowed_BU, changes
        )
        self._calls.append(_Call(decoded, list(self._owners), num_steps, time.monotonic(), is_paced))

    def _grammar_masks(self) -> np.ndarray:
        allowed_BU = np.full((self.num_slots, num_words(self.vocab_size)), -1, np.int32)
        for owner, row in zip(self._owners, allowed_BU, strict=True):
            if owner is not None and owner.matcher is not None:
                owner.matcher.fill_mask(row)
        return allowed_BU

    def _read(self, call: _Call) -> Iterator[tuple[Request, Completion]]:
        """Reads a call's tokens; yields the new parts."""
        needed = [owner for owner in call.owners if owner is not None and not owner.is_done]
        wants = (any(getattr(one.params, name) for one in needed) for name in ("logprobs", "top_logprobs"))
        decoded = slots.to_host(call.decoded, *wants)
        now = time.monotonic()
        if self._streaming and call.is_paced:
            self._num_steps = next_num_steps(
                call.num_steps, self._num_steps, now - max(call.sent, self._last_read)
            )
        self._last_read = now
        for b, request in enumerate(call.owners):
            if request is None or request.is_done:
                continue
            part = request.add(decoded, b, call.num_steps)
            if request.finish_reason is not None:
                # A stop string or a grammar ends it here; the slot does not know yet.
                self._release(b, is_running=part.stop_token is None and request.num_left > 0)
            elif self._pause_token is not None and part.tokens and part.tokens[-1] == self._pause_token:
                self._keep_prefix(request, b)
            if part.tokens or part.finish_reason is not None:
                yield request, part

    def _keep_prefix(self, request: Request, slot: int) -> None:
        """Stores what a paused slot has read, for a prompt that repeats it, and lets it continue."""
        if self._owners[slot] is request and self.prefix_cache is not None and self._slots is not None:
            tokens = np.concatenate([request.prompt, np.array(request.tokens[:-1], np.int32)])
            self.prefix_cache.store(tokens, request.cache_salt, self._slots.cache, slot)
            self._continues_B[slot] = True

    def _release(self, slot: int, is_running: bool) -> None:
        self._owners[slot] = None
        self._ends_B[slot] = is_running


def next_num_steps(num_steps: int, limit: int, seconds: float) -> int:
    """Returns the steps of a stream's next decode call.

    Args:
      num_steps: of the last call, which may have had fewer than it could.
      limit: steps that it could have had.
      seconds: that the last call took.
    """
    if jax.process_count() > 1:
        return min(2 * limit, MULTI_HOST_STEPS)
    if seconds < STREAM_INTERVAL / 2 and num_steps == limit:
        return min(2 * limit, slots.MAX_STEPS)
    return max(num_steps // 2, 1) if seconds > STREAM_INTERVAL else limit
