"""Reading prompts: which chunks of which prompts a call of `slots.prefill` reads together."""

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
from gptoss_jax.parallel.mesh import batch_shards, current_axes

# Tokens of each prompt that one call reads; the longest is a block of the prefix cache.
CHUNKS = (BLOCK, 128, 32)
# Prompts that one call reads.
GROUPS = (16, 4, 1)
# Bounds the memory of a call: tokens of all its prompts, and tokens that their rows have room for.
MAX_TOKENS, MAX_ROOM = 4096, 1 << 16
# On CPU an answer has the same bits whatever is read beside its prompt, in engines of at most 8 slots; with
# more, decoding rounds differently. In calls of more tokens, or of models with fewer hidden units, XLA adds
# up norms in another order.
MAX_EXACT_SLOTS, MAX_EXACT_TOKENS, MIN_EXACT_HIDDEN = 8, 512, 128
# Slots of the smallest cache; each larger size doubles.
MIN_CACHE_LEN = 256


@dataclasses.dataclass(eq=False)
class PromptRow:
    """A prompt that is read, in a row of its own, for one or more requests."""

    requests: list[Request]
    row: KVCache
    position: int  # tokens that the row has
    cached_tokens: int
    # For each chunk, how many of its tokens are the prompt's, and the log-probabilities of `slots.prefill`.
    logprobs: list[tuple[int, tuple[jax.Array, ...]]] = dataclasses.field(default_factory=list)

    @property
    def prompt(self) -> np.ndarray:
        return self.requests[0].prompt

    @property
    def end(self) -> int:
        """Tokens to read: the first decode step reads the last one."""
        return len(self.prompt) - 1

    @property
    def has_logprobs(self) -> bool:
        return self.requests[0].params.prompt_logprobs

    @property
    def cache_len(self) -> int:
        return max(layer["keys"].shape[3] for layer in self.row.layers)

    def prompt_logprobs(self, request: Request) -> Completion:
        """Returns the fields of a completion that describe the prompt."""
        chunks = [[np.asarray(x)[0, :count] for x in chunk] for count, chunk in self.logprobs]
        of_tokens: list[float | None] = [None]
        top: list[list[tuple[int, float]] | None] | None = [None] if request.params.top_logprobs else None
        if chunks:
            logprobs, tokens, best = (np.concatenate([c[i] for c in chunks]) for i in range(3))
            of_tokens += logprobs.tolist()
            if top is not None:
                top += top_pairs(tokens, best, request.params.top_logprobs)
        return Completion([], None, None, prompt_logprobs=of_tokens, prompt_top_logprobs=top)


class Prefills:
    """The prompts that are being read, in the order in which they came."""

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
        """Starts to read a request's prompt, unless an equal one is being read."""
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
        """Drops a request, and its prompt if no other needs it."""
        for one in self._rows:
            if request in one.requests and len(one.requests) > 1:
                one.requests.remove(request)
        self._rows = [one for one in self._rows if one.requests != [request]]

    def clear(self) -> None:
        """Drops all prompts."""
        self._rows = []

    def step(self) -> bool:
        """Sends one call, for the next chunk of a prompt and of others that fit; returns False if none is
        left.

        It is that of the first prompt and, every other time, of the one with the fewest tokens left: short
        prompts pass a long one, which still gets half of the calls.
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
        shards = batch_shards(current_axes())
        rows, logprobs = slots.prefill(
            self._config, self._params, [one.row for one in group], tokens_BT, targets_BT, count_B,
            batch=-(-len(group) // shards) * shards, has_logprobs=group[0].has_logprobs,
        )  # fmt: skip
        for b, (one, row) in enumerate(zip(group, rows, strict=True)):
            one.row, one.position = row, one.position + int(count_B[b])
            if logprobs is not None:
                one.logprobs.append((int(count_B[b]), logprobs))
            if self._prefix_cache is not None and (one.position % BLOCK == 0 or one.position == one.end):
                read = one.prompt[: one.position]
                self._prefix_cache.store(read, one.requests[0].cache_salt, row)
        return True

    def take_finished(self) -> list[PromptRow]:
        """Removes and returns the prompts that have been read."""
        done = [one for one in self._rows if one.position == one.end]
        self._rows = [one for one in self._rows if one.position < one.end]
        return done

    def rows_in_flight(self) -> list[KVCache]:
        """Returns the rows of prompts that are being read, to wait for."""
        return [one.row for one in self._rows]

    def _next_group(self) -> list[PromptRow]:
        unread = [one for one in self._rows if one.position < one.end]
        if not unread:
            return []
        first = min(unread, key=lambda one: one.end - one.position) if self._is_shortest_next else unread[0]
        self._is_shortest_next = not self._is_shortest_next
        size = next_chunk(first.position, first.end)[1]

        def fits(one: PromptRow) -> bool:
            is_equal = next_chunk(one.position, one.end)[1] == size and one.cache_len == first.cache_len
            return is_equal and not one.has_logprobs

        others = () if first.has_logprobs else (one for one in unread if one is not first and fits(one))
        group = [first, *others]
        most = max_group(self._config, size, first.cache_len, self._num_slots)
        return group[: next(count for count in GROUPS if count <= min(most, len(group)))]


def max_group(config: ModelConfig, chunk: int, cache_len: int, num_slots: int) -> int:
    """Returns how many prompts one call may read, in chunks of that size and rows of that length."""
    shards = batch_shards(current_axes())
    is_exact = backend.platform() == "cpu" and not backend.is_multi_device() and num_slots <= MAX_EXACT_SLOTS
    tokens = MAX_TOKENS
    if is_exact:
        tokens = MAX_EXACT_TOKENS if config.hidden_size >= MIN_EXACT_HIDDEN else 0
    return max(min(tokens // chunk, MAX_ROOM // cache_len) * shards, 1)


def next_chunk(position: int, end: int) -> tuple[int, int]:
    """Returns the tokens of a prompt's next chunk and the size that it is padded to, after `position` tokens.

    At most half of the last chunk is padding, unless it has the smallest size: every call reads all weights,
    so fewer calls are worth some padding. While more than a block is left, chunks end at multiples of BLOCK.
    """
    left = end - position
    if left > BLOCK:
        left = BLOCK - position % BLOCK
    size = next((size for size in CHUNKS if size <= left), CHUNKS[-1])
    size = min((wider for wider in CHUNKS if left <= wider <= 2 * left), default=size)
    return min(size, left), size


def chunks(position: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields `next_chunk` until all is read."""
    while position < end:
        count, size = next_chunk(position, end)
        yield count, size
        position += count


def cache_length(config: ModelConfig, tokens: int) -> int:
    """Returns the slots of the smallest cache that holds `tokens` tokens."""
    length = MIN_CACHE_LEN * next_power_of_two(-(-tokens // MIN_CACHE_LEN))
    return min(length, config.max_position_embeddings)


def next_power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def max_compilations(config: ModelConfig, num_slots: int = 8) -> int:
    """Returns the most programs that an engine with `num_slots` compiles.

    For each length of a cache: an empty row and slots, growing, decoding, a prefill for each size of a chunk
    and of a group (once more with log-probabilities, alone), and five to store and restore prefixes; and an
    insertion for each pair of lengths.
    """
    lengths = len({cache_length(config, tokens) for tokens in range(1, config.max_position_embeddings + 1)})
    most = (max_group(config, chunk, MIN_CACHE_LEN, num_slots) for chunk in CHUNKS)
    prefills = sum(1 + sum(count <= one for count in GROUPS) for one in most)
    return lengths * (4 + prefills + 6) + lengths * (lengths + 1) // 2
