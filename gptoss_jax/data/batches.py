"""From the token cache to global batches: packed rows, shuffled epochs, arrays on the mesh.

A row has T = `data.seq_len` positions, each with an input token and the next token as its target. A document
of n stored tokens (bos, text, eos) has n - 1 such pairs. Documents longer than a row are split; examples of
conversations never are. A chosen and a rejected answer are in one row, as two segments in this order.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import grain
import jax
import numpy as np

from gptoss_jax.config import DataConfig, require
from gptoss_jax.data.packing import PackPlan, pack
from gptoss_jax.data.token_cache import TokenCache

# The arrays of a batch, each [B, T]; `loss_weights` weights each target in the loss.
BATCH_FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_weights": np.float32,
}
# Also an array of a batch, if the objective compares with a reference model: log p of each target.
REFERENCE_FIELD = "reference_log_probs"
# Those of a batch of sampled answers: log p with which each target was sampled, and its advantage.
SAMPLED_LOG_PROBS, ADVANTAGES = "sampled_log_probs", "advantages"

Batch = dict[str, np.ndarray]


def abstract_batch(
    batch_size: int,
    seq_len: int,
    sharding: jax.sharding.Sharding | None = None,
    more_fields: Iterable[str] = (),
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes [batch_size, seq_len] and dtypes of a global batch; `more_fields` are float32."""
    shape, fields = (batch_size, seq_len), _fields(more_fields)
    return {name: jax.ShapeDtypeStruct(shape, t, sharding=sharding) for name, t in fields.items()}


def _fields(more_fields: Iterable[str]) -> Mapping[str, type]:
    return BATCH_FIELDS | dict.fromkeys(more_fields, np.float32)


def zeros(shape: int | tuple[int, ...], more_fields: Iterable[str] = ()) -> Batch:
    """Returns rows of padding; `more_fields` are float32."""
    return {name: np.zeros(shape, dtype) for name, dtype in _fields(more_fields).items()}


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def packed_lengths(cache: TokenCache, seq_len: int, overlong: Literal["skip", "cut"]) -> np.ndarray:
    """Returns the number of pairs of each document in packed rows, int64 [documents]; 0 if it is omitted.

    Long texts are split into rows. Examples of conversations are not: one with more than `seq_len` pairs is
    omitted or, if `overlong` is "cut", truncated, and omitted if nothing to train on remains. A pair is
    omitted if both answers together have more than `seq_len` positions.
    """
    lengths = np.diff(cache.offsets) - 1
    if cache.is_pairs:
        both = lengths.reshape(-1, 2)
        return np.where(both.sum(axis=1, keepdims=True) <= seq_len, both, 0).reshape(-1)
    if cache.weights is None:
        return lengths
    for i in np.flatnonzero(lengths > seq_len):
        targets = slice(cache.offsets[i] + 1, cache.offsets[i] + 1 + seq_len)
        lengths[i] = seq_len if overlong == "cut" and cache.weights[targets].any() else 0
    return lengths


def trained_pairs(cache: TokenCache, lengths: np.ndarray) -> np.ndarray:
    """Returns the number of trained targets of each document with `packed_lengths`, int64 [documents]."""
    if cache.weights is None:
        return lengths
    # The first token of an example is no target, and its weight is 0.
    trained = np.add.reduceat(cache.weights, cache.offsets[:-1], dtype=np.int64)
    for i in np.flatnonzero(lengths < np.diff(cache.offsets) - 1):
        start = cache.offsets[i] + 1
        trained[i] = np.sum(cache.weights[start : start + lengths[i]], dtype=np.int64)
    return trained


def usable_prompts(cache: TokenCache, longest: int, held_out: bool) -> np.ndarray:
    """Returns the prompts of at most `longest` tokens, int64 [n]; see `TokenCache.is_prompts`.

    Raises ValueError if there are none.
    """
    lengths, is_kind = np.diff(cache.offsets), cache.held_out == held_out
    documents = np.flatnonzero(is_kind & (lengths <= longest))
    kind, shortest = "held-out" if held_out else "training", int(lengths[is_kind].min())
    if not len(documents):
        raise ValueError(
            f"data.seq_len minus grpo.max_new_tokens is {longest}: no {kind} prompt fits; the shortest has "
            f"{shortest} tokens"
        )
    return documents


class PackedRows:
    """Packed rows, read from the cache on access.

    A row is a dict of arrays [T]: `tokens`, `targets` (the next token), `segment_ids` (documents count from
    1), `positions` (from 0 in each document) and `loss_weights` (1 for each target, 0 for targets of a
    conversation that are not trained on). Padding is 0 in all of them.
    """

    def __init__(
        self, cache: TokenCache, held_out: bool, seq_len: int, overlong: Literal["skip", "cut"] = "skip"
    ):
        """Raises ValueError if no example of a conversation fits."""
        lengths = packed_lengths(cache, seq_len, overlong)
        documents = np.flatnonzero((cache.held_out == held_out) & (lengths > 0))
        if not len(documents):
            kind, those = "held-out" if held_out else "training", np.flatnonzero(cache.held_out == held_out)
            needs = np.diff(cache.offsets)[those] - 1
            needs = needs.reshape(-1, 2).sum(axis=1) if cache.is_pairs else needs
            example = "pair" if cache.is_pairs else "example"
            allowed = f"no {kind} {example} fits; the shortest needs {needs.min()}"
            if overlong == "cut" and cache.weights is not None:
                pairs = zip(cache.offsets[those], cache.offsets[those + 1], strict=True)
                needed = min(int(np.argmax(cache.weights[start:end])) for start, end in pairs)
                allowed = f"cut at that, no {kind} example has a trained token; must be at least {needed}"
            require(False, "data.seq_len", seq_len, allowed)
        self.plan = (_pack_pairs if cache.is_pairs else pack)(lengths[documents], seq_len)
        self._start = cache.offsets[documents][self.plan.document] + self.plan.start
        self._tokens, self._weights, self._reference = cache.tokens, cache.weights, cache.reference
        self._seq_len = seq_len

    def __len__(self) -> int:
        return len(self.plan.row_offsets) - 1

    @property
    def padding(self) -> Batch:
        """A row of padding."""
        return zeros(self._seq_len, () if self._reference is None else (REFERENCE_FIELD,))

    def __getitem__(self, index: int) -> Batch:
        segments, positions, target = self.places(index)
        used = len(target)
        row = self.padding
        row["segment_ids"][:used], row["positions"][:used] = segments, positions
        row["tokens"][:used], row["targets"][:used] = self._tokens[target - 1], self._tokens[target]
        row["loss_weights"][:used] = 1 if self._weights is None else self._weights[target]
        if self._reference is not None:
            row[REFERENCE_FIELD][:used] = self._reference[target]
        return row

    def places(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the segment, the position in it, and the index in the cache of each target of a row."""
        pieces = slice(self.plan.row_offsets[index], self.plan.row_offsets[index + 1])
        length = self.plan.length[pieces]
        segments = np.repeat(np.arange(1, len(length) + 1), length)
        positions = np.arange(len(segments)) - np.repeat(np.cumsum(length) - length, length)
        return segments, positions, np.repeat(self._start[pieces], length) + positions + 1


def _pack_pairs(lengths: np.ndarray, seq_len: int) -> PackPlan:
    """Packs documents 2i and 2i + 1 together: `pack` for pairs, then with two pieces for each."""
    plan = pack(lengths.reshape(-1, 2).sum(axis=1), seq_len)
    document = (2 * plan.document[:, None] + np.arange(2)).reshape(-1)
    return PackPlan(
        2 * plan.row_offsets, document, np.zeros_like(document), lengths[document].astype(np.int32)
    )


class _GlobalBatches:
    """Grain source of the rows in each global batch. Batch k is items k * B … k * B + B - 1 of the epochs."""

    def __init__(self, epochs: grain.MapDataset, batch_size: int, rows: np.ndarray):
        self._epochs, self._batch_size, self._rows = epochs, batch_size, rows.tolist()

    def __len__(self) -> int:
        return len(self._epochs) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        return _stack([self._epochs[index * self._batch_size + row] for row in self._rows])


def train_batches(
    cache: TokenCache, config: DataConfig, seed: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator:
    """Yields batches of training rows indefinitely, reshuffled each epoch and prefetched by one thread.

    Global batch k does not depend on how its rows are distributed over processes. The iterator's
    `get_state()` is a JSON-serializable position that `set_state` restores, even in another process or for
    other rows.

    Args:
      cache: the tokenized corpus.
      config: `seq_len`, `batch_size` and `overlong` are used.
      seed: seed of the shuffle.
      rows: indices of the rows to read in each batch, see `local_rows`; None reads all of them.

    Yields:
      batches of BATCH_FIELDS, each array [len(rows), T].

    Raises ValueError if the text does not fill a row, or if no example of a conversation fits in one.
    """
    packed = PackedRows(cache, held_out=False, seq_len=config.seq_len, overlong=config.overlong)
    pairs = int(packed.plan.length.sum())
    allowed = f"the training text has only {pairs} tokens"
    is_enough = pairs >= config.seq_len or cache.weights is not None
    require(is_enough, "data.seq_len", config.seq_len, allowed)
    rows = np.arange(config.batch_size) if rows is None else rows
    epochs = grain.MapDataset.source(packed).seed(seed).shuffle().repeat()
    batches = grain.MapDataset.source(_GlobalBatches(epochs, config.batch_size, rows))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def held_out_batches(
    cache: TokenCache, config: DataConfig, limit: int | None = None, rows: np.ndarray | None = None
) -> list[Batch]:
    """Returns the same batches of held-out rows on every call, in the shape that `train_batches` yields.

    Covers all rows, with padding rows at the end of the last batch; if there are more than `limit` batches,
    only `limit`, with rows spread evenly over the held-out text.
    """
    packed = PackedRows(cache, held_out=True, seq_len=config.seq_len, overlong=config.overlong)
    count = -(-len(packed) // config.batch_size)
    count = count if limit is None else min(count, limit)
    size = count * config.batch_size
    chosen = np.arange(size) * max(len(packed), size) // max(size, 1)
    return list(padded_batches(packed, chosen.reshape(count, config.batch_size), rows))


def padded_batches(
    packed: PackedRows, indices: np.ndarray, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields batches of packed rows; an index past the last row gives a row of padding.

    Args:
      indices: the rows of each global batch, int [batches, batch_size].
      rows: which of them to read, see `local_rows`; None reads all.
    """
    for batch in indices if rows is None else indices[:, rows]:
        yield _stack([packed[index] if index < len(packed) else packed.padding for index in batch])


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Returns the indices of a global batch's rows on this process's devices, in ascending order.

    Processes with devices that share rows, as along the tensor axis, each read all shared rows.
    """
    indices = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in indices if index]))


def make_global_batch(batch: Batch, sharding: jax.sharding.Sharding, batch_size: int) -> dict[str, jax.Array]:
    """Builds global arrays [batch_size, T] from the rows that each process has read (`local_rows`)."""
    rows = local_rows(sharding, batch_size)

    def globalize(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size) if index else (0, batch_size, 1)
            return values[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]

        return jax.make_array_from_callback((batch_size, values.shape[1]), sharding, shard)

    return {name: globalize(values) for name, values in batch.items()}
