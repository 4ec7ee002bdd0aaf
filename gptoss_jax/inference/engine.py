"""Inference engine: continuous batching over a fixed number of slots (`inference/slots.py`).

Requests queue until a slot is free. Prompts are prefilled in chunks, each into its own batch-1 cache,
interleaved with decode calls so that neither starves the other. The next decode call is dispatched before the
tokens of the previous one reach the host: the device detects stop tokens and length limits itself, and only
stop strings, grammars and cancellations need the host.
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
from gptoss_jax.inference.prefill import PrefillScheduler, cache_length
from gptoss_jax.inference.prefix_cache import PrefixCache, Reuse
from gptoss_jax.inference.request import Request, check_length, check_tokens
from gptoss_jax.inference.sampling import num_mask_words
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.model.transformer import Transformer, get_params
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.mesh import batch_shards, current_axes

# Maximum steps per decode call while a prompt is being prefilled.
MAX_STEPS_DURING_PREFILL = 8
# The same when streaming on several processes, whose clocks differ but which must all choose the same number.
MULTI_HOST_STEPS = 8
# Target seconds between streamed parts, and between checks for stop strings.
STREAM_INTERVAL = 0.05
DEFAULT_PREFIX_BYTES = 1 << 30


@dataclasses.dataclass
class _Call:
    """A decode call in flight: dispatched, its tokens not yet on the host."""

    decoded: slots.DecodeOutput
    owners: list[Request | None]  # the request in each slot
    num_steps: int
    dispatched_at: float
    is_decode_only: bool  # no prefill was dispatched with it, so its duration measures decoding


class Engine:
    """Continuous-batching engine for one model. Not thread-safe: call all methods from one thread."""

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
        """Captures the current mesh. With several processes, prefix reuse is off.

        Args:
          model: under a mesh, its parameters must be sharded as `parallel.rules` specifies.
          tokenizer: needed for stop strings and grammars; default: the one in the model's folder. With
            gpt-oss's special tokens and `prefix_reuse="any"`, ends of messages are cached as prefixes too.
          num_slots: maximum number of sequences decoded together; rounded up to a multiple of the mesh's
            batch shards.
          max_context: maximum tokens of a prompt plus its completion; default: the model's limit.
          prefix_reuse: see `PrefixCache`; "off" prefills every prompt from its start.
          prefix_cache_bytes: memory limit of the prefix cache.
          streaming: False favors throughput: prefills before decoding, and returns large parts.

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
        # On CPU all devices of a mesh share one thread pool, which several programs in flight would exhaust.
        self._is_cpu_mesh = jax.default_backend() == "cpu" and self._mesh is not None and self._mesh.size > 1
        self._lookahead = int(is_one_process and not self._is_cpu_mesh)
        special = {} if tokenizer is None else tokenizer.special_tokens
        self._pause_token = special.get(END_OF_MESSAGE) if keeps_prefixes and prefix_reuse == "any" else None
        self._waiting: collections.deque[Request] = collections.deque()
        self._owners: list[Request | None] = [None] * self.num_slots
        self._prefills = PrefillScheduler(config, self._params, self.prefix_cache, self.num_slots)
        self.reset()
        self._num_steps, self._last_fetch = 1, 0.0
        all_allowed = np.full((self.num_slots, num_mask_words(config.vocab_size)), -1, np.int32)
        with self._on_mesh():
            self._all_allowed_BU = all_allowed if self._mesh is not None else jax.device_put(all_allowed)

    @property
    def num_running(self) -> int:
        """Number of requests in a slot."""
        return sum(owner is not None for owner in self._owners)

    @property
    def num_waiting(self) -> int:
        """Number of requests that are queued or being prefilled."""
        return len(self._waiting) + self._prefills.num_requests

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished or a decode call is in flight."""
        return bool(self.num_waiting or self._calls or self.num_running)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008 (it is frozen)
        *,
        cache_salt: str = "",
    ) -> Request:
        """Queues a request for `step` to process.

        Args:
          prompt: token ids.
          params: sampling parameters.
          cache_salt: prefixes are reused only between requests with the same salt.

        Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt plus `max_new_tokens`
        longer than `max_context`, stop strings or a grammar without a tokenizer, or an invalid grammar.
        """
        tokens = self.check(prompt, params)
        matcher = None
        if params.grammar is not None and self._tokenizer is not None:
            matcher = GrammarMatcher(self._tokenizer, self.vocab_size, params.grammar)
        request = Request(tokens, params, cache_salt, self._tokenizer, matcher)
        self._waiting.append(request)
        return request

    def check(self, prompt: Sequence[int], params: SamplingParams, name: str = "prompt") -> np.ndarray:
        """Validates a request and returns its prompt as int32 [T]; raises ValueError like `submit`."""
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
        """Cancels a request: it yields no further parts, and its slot becomes free."""
        if request.is_done:
            return
        request.is_cancelled = True
        if request in self._waiting:
            self._waiting.remove(request)
        self._prefills.remove(request)
        if request in self._owners:
            self._release(self._owners.index(request), is_running=True)

    def reset(self, *, drop_prefixes: bool = False) -> None:
        """Cancels all requests and frees the memory of the slots; safe after an interrupted step.

        Keeps the prefix cache unless `drop_prefixes`: after a device error it may hold bad values.
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
        """Dispatches at most one prefill and one decode call, and fetches the oldest call's tokens if due.

        Returns the new parts in slot order; possibly none.
        """
        with self._on_mesh():
            self._admit()
            if self._is_cpu_mesh or not self._calls:
                # At most one prefill in flight (see `parallel/in_flight.py`): a long prompt has hundreds.
                jax.block_until_ready(self._prefills.pending_rows())
            has_prefilled = self._prefills.step()
            self._insert()
            can_decode = self._can_decode()
            if can_decode:
                self._decode(is_decode_only=not has_prefilled)
            if self._calls and (not can_decode or len(self._calls) > self._lookahead):
                return list(self._fetch(self._calls.popleft()))
        return []

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        """Sets the mesh captured at construction: `jax.set_mesh` is thread-local."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _admit(self) -> None:
        """Starts the prefill of waiting requests, as many as there are free slots."""
        num_free = self._owners.count(None) - self._prefills.num_requests
        while self._waiting and num_free:
            self._prefills.start(self._waiting.popleft())
            num_free -= 1

    def _insert(self) -> None:
        """Moves fully prefilled prompts into slots."""
        for done in self._prefills.take_finished():
            for request in done.requests:
                slot = self._owners.index(None)
                self._owners[slot] = request
                self._ends_B[slot] = self._continues_B[slot] = False
                request.cached_tokens = done.cached_tokens
                if request.params.prompt_logprobs:
                    request.prompt_part = done.prompt_logprobs(request)
                is_only = self.num_running == 1 and not self._calls
                self._reserve(len(request.prompt) - 1 + self._first_steps(request), may_shrink=is_only)
                row = slots.SlotRequest.of(self._config, request.params, self._pause_token)
                self._slots = slots.insert(
                    self._slots, done.row, np.int32(slot), np.int32(request.prompt[-1]), row
                )

    def _first_steps(self, request: Request) -> int:
        return min(request.params.max_new_tokens, 1 if self._streaming else slots.MAX_STEPS)

    def _reserve(self, tokens: int, may_shrink: bool = False) -> None:
        """Ensures a cache length of at least `tokens`; `may_shrink` only if no other slot is running."""
        length = cache_length(self._config, tokens)
        if self._slots is None or (may_shrink and length < self._cache_len):
            self._slots = slots.init_slots(self._config, self.num_slots, length)
            self._cache_len = length
        elif length > self._cache_len:
            self._slots = slots.grow_slots(self._config, self._slots, length)
            self._cache_len = length

    def _steps_in_flight(self, request: Request) -> int:
        """Returns the number of decode steps in flight for a request."""
        return sum(call.num_steps for call in self._calls if request in call.owners)

    def _can_decode(self) -> bool:
        if not self._streaming and self._prefills.num_requests:
            return False
        running = [owner for owner in self._owners if owner is not None]
        # A grammar's token mask depends on the last sampled token.
        if self._calls and any(owner.matcher is not None for owner in running):
            return False
        return any(self._steps_in_flight(owner) < owner.num_remaining for owner in running)

    def _decode(self, is_decode_only: bool) -> None:
        """Dispatches a decode call."""
        running = [owner for owner in self._owners if owner is not None]
        sent = {owner: self._steps_in_flight(owner) for owner in running}
        num_steps = self._num_steps if self._streaming else slots.MAX_STEPS
        if self._streaming and any(not owner.tokens and not sent[owner] for owner in running):
            num_steps = 1  # minimizes the time to first token
        elif self._streaming and self._prefills.num_requests:
            num_steps = min(num_steps, MAX_STEPS_DURING_PREFILL)
        allowed_BU = self._all_allowed_BU
        if any(owner.matcher is not None for owner in running):
            num_steps, allowed_BU = 1, self._grammar_masks()
        num_steps = min(num_steps, max(owner.num_remaining - sent[owner] for owner in running))
        new = {owner: min(sent[owner] + num_steps, owner.num_remaining) for owner in running}
        self._reserve(max(len(one.prompt) - 1 + len(one.tokens) + new[one] for one in running))
        changes = self._ends_B.copy(), self._continues_B.copy()
        self._ends_B[:] = self._continues_B[:] = False
        self._slots, decoded = slots.decode(
            self._config, self._params, self._slots, np.int32(num_steps), allowed_BU, changes
        )
        self._calls.append(_Call(decoded, list(self._owners), num_steps, time.monotonic(), is_decode_only))

    def _grammar_masks(self) -> np.ndarray:
        allowed_BU = np.full((self.num_slots, num_mask_words(self.vocab_size)), -1, np.int32)
        for owner, row in zip(self._owners, allowed_BU, strict=True):
            if owner is not None and owner.matcher is not None:
                owner.matcher.fill_mask(row)
        return allowed_BU

    def _fetch(self, call: _Call) -> Iterator[tuple[Request, Completion]]:
        """Copies a call's tokens to the host; yields the new parts."""
        needed = [owner for owner in call.owners if owner is not None and not owner.is_done]
        wants = (any(getattr(one.params, name) for one in needed) for name in ("logprobs", "top_logprobs"))
        decoded = slots.to_host(call.decoded, *wants)
        now = time.monotonic()
        if self._streaming and call.is_decode_only:
            seconds = now - max(call.dispatched_at, self._last_fetch)
            self._num_steps = next_num_steps(call.num_steps, self._num_steps, seconds)
        self._last_fetch = now
        for b, request in enumerate(call.owners):
            if request is None or request.is_done:
                continue
            part = request.add(decoded, b, call.num_steps)
            if request.finish_reason is not None:
                # After a stop string or the end of a grammar, the slot on the device is still running.
                self._release(b, is_running=part.stop_token is None and request.num_remaining > 0)
            elif self._pause_token is not None and part.tokens and part.tokens[-1] == self._pause_token:
                self._keep_prefix(request, b)
            if part.tokens or part.finish_reason is not None:
                yield request, part

    def _keep_prefix(self, request: Request, slot: int) -> None:
        """Caches the prefix in a paused slot, for later prompts that start with it, and resumes the slot."""
        if self._owners[slot] is request and self.prefix_cache is not None and self._slots is not None:
            tokens = np.concatenate([request.prompt, np.array(request.tokens[:-1], np.int32)])
            self.prefix_cache.store(tokens, request.cache_salt, self._slots.cache, slot)
            self._continues_B[slot] = True

    def _release(self, slot: int, is_running: bool) -> None:
        self._owners[slot] = None
        self._ends_B[slot] = is_running


def next_num_steps(num_steps: int, limit: int, seconds: float) -> int:
    """Returns the maximum number of steps for the next decode call of a stream.

    Args:
      num_steps: steps of the last call, which may have been fewer than `limit`.
      limit: the maximum for the last call.
      seconds: duration of the last call.
    """
    if jax.process_count() > 1:
        return min(2 * limit, MULTI_HOST_STEPS)
    if seconds < STREAM_INTERVAL / 2 and num_steps == limit:
        return min(2 * limit, slots.MAX_STEPS)
    return max(num_steps // 2, 1) if seconds > STREAM_INTERVAL else limit
