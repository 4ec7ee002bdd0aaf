"""Chunked prefill: schedules which chunks of which prompts share a call of `slots.prefill`."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.inference import slots
from gptoss_jax.inference.prefix_cache import BLOCK, PrefixCache
from gptoss_jax.inference.request import Request, top_pairs
from gptoss_jax.inference.sampling_params import Completion
from gptoss_jax.kernels import backend
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.parallel.context import prefill_shards

# Tokens per chunk; the largest is a block of the prefix cache.
CHUNK_SIZES = (BLOCK, 128, 32)
# Prompts per call.
BATCH_SIZES = (16, 4, 1)
# Memory limits of a call: tokens over all its prompts, and cache slots over all its rows.
MAX_BATCHED_TOKENS, MAX_BATCHED_SLOTS = 4096, 1 << 16
# On CPU, completions are bitwise independent of the batch in engines with at most 8 slots; with more,
# decoding rounds differently. With more tokens per call or a smaller hidden size, XLA sums norms in another
# order.
MAX_EXACT_SLOTS, MAX_EXACT_TOKENS, MIN_EXACT_HIDDEN = 8, 512, 128
# Length of the smallest cache; each larger size doubles it.
MIN_CACHE_LEN = 256


@dataclasses.dataclass(eq=False)
class PromptRow:
    """A prompt being prefilled into its own batch-1 cache, for one or more requests with equal prompts."""

    requests: list[Request]
    row: KVCache
    position: int  # number of tokens in the row
    cached_tokens: int
    # For each chunk, its number of tokens without padding, and the log-probabilities from `slots.prefill`.
    logprobs: list[tuple[int, tuple[jax.Array, ...]]] = dataclasses.field(default_factory=list)

    @property
    def prompt(self) -> np.ndarray:
        return self.requests[0].prompt

    @property
    def end(self) -> int:
        """Number of tokens to prefill: the first decode step processes the last one."""
        return len(self.prompt) - 1

    @property
    def has_logprobs(self) -> bool:
        return self.requests[0].params.prompt_logprobs

    @property
    def cache_len(self) -> int:
        return max(layer["keys"].shape[3] for layer in self.row.layers)

    def prompt_logprobs(self, request: Request) -> Completion:
        """Returns a completion with only the prompt's fields set."""
        chunks = [[np.asarray(x)[0, :count] for x in chunk] for count, chunk in self.logprobs]
        of_tokens: list[float | None] = [None]
        top: list[list[tuple[int, float]] | None] | None = [None] if request.params.top_logprobs else None
        if chunks:
            logprobs, tokens, best = (np.concatenate([c[i] for c in chunks]) for i in range(3))
            of_tokens += logprobs.tolist()
            if top is not None:
                top += top_pairs(tokens, best, request.params.top_logprobs)
        return Completion([], None, None, prompt_logprobs=of_tokens, prompt_top_logprobs=top)


class PrefillScheduler:
    """The prompts being prefilled, in order of arrival."""

    def __init__(
        self, config: ModelConfig, params: dict, prefix_cache: PrefixCache | None, num_slots: int
    ) -> None:
        self._config, self._params, self._prefix_cache = config, params, prefix_cache
        self._num_slots = num_slots
        self._rows: list[PromptRow] = []
        self._is_shortest_next = False

    @property
    def requests(self) -> list[Request]:
        return [request for one in self._rows for request in one.requests]

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def start(self, request: Request) -> None:
        """Adds a request; shares the prefill of an equal prompt if there is one."""
        for one in self._rows:
            is_equal = np.array_equal(one.prompt, request.prompt) and not one.has_logprobs
            if (
                is_equal
                and one.requests[0].cache_salt == request.cache_salt
                and not request.params.prompt_logprobs
            ):
                one.requests.append(request)
                return
        end, num_cached = len(request.prompt) - 1, 0
        row = slots.init_row(self._config, cache_length(self._config, end))
        if self._prefix_cache is not None and not request.params.prompt_logprobs:
            row, num_cached = self._prefix_cache.restore(request.prompt[:end], request.cache_salt, row)
        self._rows.append(PromptRow([request], row, num_cached, num_cached))

    def remove(self, request: Request) -> None:
        """Removes a request, and its prompt if no other request shares it."""
        for one in self._rows:
            if request in one.requests and len(one.requests) > 1:
                one.requests.remove(request)
        self._rows = [one for one in self._rows if one.requests != [request]]

    def clear(self) -> None:
        """Removes all prompts."""
        self._rows = []

    def step(self) -> bool:
        """Dispatches one call with the next chunk of a prompt and of others that fit beside it.

        Calls alternate between the oldest prompt and the one with the fewest tokens left, so short prompts
        overtake a long one, which still gets half of the calls. Returns False if nothing is left to prefill.
        """
        group = self._next_group()
        if not group:
            return False
        size = next_chunk(group[0].position, group[0].end)[1]
        tokens_BT, targets_BT = np.zeros((2, len(group), size), np.int32)
        count_B = np.zeros(len(group), np.int32)
        for b, one in enumerate(group):
            count_B[b] = next_chunk(one.position, one.end)[0]
            start, end = one.position, one.position + count_B[b]
            tokens_BT[b, : count_B[b]] = one.prompt[start:end]
            targets_BT[b, : count_B[b]] = one.prompt[start + 1 : end + 1]
        shards = prefill_shards(size)
        rows, logprobs = slots.prefill(
            self._config, self._params, [one.row for one in group], tokens_BT, targets_BT, count_B,
            batch=-(-len(group) // shards) * shards, has_logprobs=group[0].has_logprobs,
        )  # fmt: skip
        for b, (one, row) in enumerate(zip(group, rows, strict=True)):
            one.row, one.position = row, one.position + int(count_B[b])
            if logprobs is not None:
                one.logprobs.append((int(count_B[b]), logprobs))
            if self._prefix_cache is not None and (one.position % BLOCK == 0 or one.position == one.end):
                prefix = one.prompt[: one.position]
                self._prefix_cache.store(prefix, one.requests[0].cache_salt, row)
        return True

    def take_finished(self) -> list[PromptRow]:
        """Removes and returns the fully prefilled prompts."""
        done = [one for one in self._rows if one.position == one.end]
        self._rows = [one for one in self._rows if one.position < one.end]
        return done

    def pending_rows(self) -> list[KVCache]:
        """Returns the caches of all prompts being prefilled, for `jax.block_until_ready`."""
        return [one.row for one in self._rows]

    def _next_group(self) -> list[PromptRow]:
        pending = [one for one in self._rows if one.position < one.end]
        if not pending:
            return []
        first = min(pending, key=lambda one: one.end - one.position) if self._is_shortest_next else pending[0]
        self._is_shortest_next = not self._is_shortest_next
        size = next_chunk(first.position, first.end)[1]

        def fits(one: PromptRow) -> bool:
            is_equal = next_chunk(one.position, one.end)[1] == size and one.cache_len == first.cache_len
            return is_equal and not one.has_logprobs

        others = () if first.has_logprobs else (one for one in pending if one is not first and fits(one))
        batch = [first, *others]
        limit = max_prefill_batch(self._config, size, first.cache_len, self._num_slots)
        return batch[: prefill_batch(limit, len(batch))]


def max_prefill_batch(config: ModelConfig, chunk: int, cache_len: int, num_slots: int) -> int:
    """Returns the maximum number of prompts per call on the current mesh, for a chunk size and a cache
    length."""
    is_one_cpu = backend.platform() == "cpu" and not backend.is_multi_device()
    shards = prefill_shards(chunk)
    return prefill_limit(config, chunk, cache_len, num_slots, shards=shards, is_one_cpu=is_one_cpu)


def prefill_limit(
    config: ModelConfig, chunk: int, cache_len: int, num_slots: int, *, shards: int, is_one_cpu: bool
) -> int:
    """Returns the maximum number of prompts per call if a mesh splits the batch into `shards`."""
    tokens = MAX_BATCHED_TOKENS
    if is_one_cpu and num_slots <= MAX_EXACT_SLOTS:
        tokens = MAX_EXACT_TOKENS if config.hidden_size >= MIN_EXACT_HIDDEN else 0
    return max(min(tokens // chunk, MAX_BATCHED_SLOTS // cache_len) * shards, 1)


def prefill_batch(limit: int, pending: int) -> int:
    """Returns the number of prompts in a call, if `pending` prompts have chunks of the same size."""
    return next(count for count in BATCH_SIZES if count <= min(limit, pending))


def next_chunk(position: int, end: int) -> tuple[int, int]:
    """Returns the number of tokens in a prompt's next chunk, and the size that the chunk is padded to.

    At most half of the last chunk is padding, unless it has the smallest size: every call reads all weights,
    so fewer calls are worth some padding. While more than a block is left, chunks end at multiples of BLOCK.

    Args:
      position: number of tokens already prefilled.
      end: number of tokens to prefill in total.
    """
    left = end - position
    if left > BLOCK:
        left = BLOCK - position % BLOCK
    size = next((size for size in CHUNK_SIZES if size <= left), CHUNK_SIZES[-1])
    size = min((wider for wider in CHUNK_SIZES if left <= wider <= 2 * left), default=size)
    return min(size, left), size


def chunks(position: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields `next_chunk` from `position` until `end`."""
    while position < end:
        count, size = next_chunk(position, end)
        yield count, size
        position += count


def cache_length(config: ModelConfig, tokens: int) -> int:
    """Returns the length of the smallest cache that holds `tokens` tokens."""
    length = MIN_CACHE_LEN * next_power_of_two(-(-tokens // MIN_CACHE_LEN))
    return min(length, config.max_position_embeddings)


def next_power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def max_compilations(config: ModelConfig, num_slots: int = 8) -> int:
    """Returns an upper bound on the programs that an engine with `num_slots` slots compiles.

    For each cache length: init_row, init_slots, grow_slots and decode, a prefill for each chunk size and
    batch size (and one per chunk size with log-probabilities, which are never batched), and six to store and
    restore prefixes; plus an insert for each pair of cache lengths.
    """
    lengths = len({cache_length(config, tokens) for tokens in range(1, config.max_position_embeddings + 1)})
    limits = (max_prefill_batch(config, chunk, MIN_CACHE_LEN, num_slots) for chunk in CHUNK_SIZES)
    prefills = sum(1 + sum(count <= limit for count in BATCH_SIZES) for limit in limits)
    return lengths * (4 + prefills + 6) + lengths * (lengths + 1) // 2
