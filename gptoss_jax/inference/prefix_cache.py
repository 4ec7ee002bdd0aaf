"""Prefix cache for models with sliding-window layers.

The KV cache of a full-attention layer contains that of every prefix. The ring buffer of a sliding layer does
not: later tokens have overwritten earlier ones. The cache is therefore a tree of token blocks that stores,
for each block, the keys and values of the full layers and a snapshot of the ring buffers at the block's end,
where prefill can resume. The end of a prompt or of its reasoning is stored as a shorter block, a tail.

Letters: L layers, B rows of a cache, K key/value heads, S slots, H head size.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptoss_jax.config import SLIDING, ModelConfig
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.parameters import tree_bytes

# Tokens per block. Prefill chunks end at multiples of it, so resuming there does not change rounding.
BLOCK = 512

Reuse = Literal["any", "exact", "off"]
Arrays = list[dict[str, jax.Array]]


@dataclasses.dataclass(eq=False)
class _Node:
    """The tokens from `start` to `end` of a prefix; `parent` holds the preceding ones."""

    key: bytes  # the tokens, int32
    parent: "_Node | None"
    start: int
    full: Arrays  # keys and values of the full-attention layers, [L, K, S, H], in layer order
    rings: Arrays | None  # ring buffers of the sliding layers at `end`; None if not stored
    children: dict[bytes, "_Node"] = dataclasses.field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + len(self.key) // 4

    @property
    def path(self) -> "list[_Node]":
        """The nodes from the first block down to this one."""
        return ([] if self.parent is None else self.parent.path) + ([self] if self.key else [])


class PrefixCache:
    """A tree of blocks with least-recently-used eviction above `max_bytes`."""

    def __init__(self, config: ModelConfig, reuse: Reuse, max_bytes: int) -> None:
        """With `reuse="any"`, prefill resumes from any stored prefix; with "exact", only from full blocks and
        identical prompts, which give the same bits as a prefill from the start."""
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._config, self._reuse = config, reuse
        self._roots: dict[str, _Node] = {}
        # From least to most recently used. Using a node also touches its ancestors, after itself, so the
        # first one is always a leaf.
        self._nodes: collections.OrderedDict[_Node, str] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def restore(self, tokens: np.ndarray, salt: str, row: KVCache) -> tuple[KVCache, int]:
        """Copies the longest stored prefix of `tokens` into `row` (a batch-1 cache).

        Returns the row and the length of the prefix. Only prefixes stored with the same salt are used.
        """
        node = self._find(tokens, salt)
        if node is None:
            return row, 0
        self._touch(node)
        for one in node.path:
            row = _write_block(row, one.full, np.int32(one.start), kinds=self._config.period)
        return _write_rings(row, node.rings, np.int32(node.end), kinds=self._config.period), node.end

    def store(self, tokens: np.ndarray, salt: str, cache: KVCache, b: int = 0) -> None:
        """Stores row `b` of a cache that holds exactly `tokens`.

        Missing blocks before the last one are stored without ring buffers.
        """
        node = self._roots.get(salt) or _Node(b"", None, 0, [], None)
        self._roots[salt] = node
        for start in range(0, len(tokens), BLOCK):
            key, is_last = _key(tokens[start : start + BLOCK]), start + BLOCK >= len(tokens)
            child = node.children.get(key)
            if child is None:
                full = _read_block(cache, np.int32(b), np.int32(start), kinds=self._config.period)
                child = _Node(key, node, start, full, None)
                # In this order, as in `_remove_oldest`, so that Ctrl-C in between is harmless.
                self._nodes[child] = salt
                node.children[key] = child
                self.num_bytes += tree_bytes(full)
            if is_last and child.rings is None:
                child.rings = _read_rings(cache, np.int32(b), kinds=self._config.period)
                self.num_bytes += tree_bytes(child.rings)
            node = child
        self._touch(node)
        while self.num_bytes > self.max_bytes:
            self._remove_oldest()

    def clear(self) -> None:
        """Removes all prefixes."""
        self._roots.clear()
        self._nodes.clear()
        self.num_bytes = 0

    def _find(self, tokens: np.ndarray, salt: str) -> _Node | None:
        """Returns the last node of the longest stored prefix of `tokens` that prefill can resume from."""
        found, node = None, self._roots.get(salt)
        while node is not None:
            found = node if node.key and node.rings is not None else found
            rest = tokens[node.end :]
            tails = [child for child in self._tails(node, rest) if child.rings is not None]
            found = max((found, *tails), key=lambda one: 0 if one is None else one.end)
            node = node.children.get(_key(rest[:BLOCK])) if len(rest) >= BLOCK else None
        return found

    def _tails(self, node: _Node, rest: np.ndarray) -> Iterator[_Node]:
        """Yields the tails below `node` that are a prefix of `rest` or, for exact reuse, equal to it."""
        key = _key(rest)
        for child in node.children.values():
            is_prefix = key.startswith(child.key) if self._reuse == "any" else key == child.key
            if is_prefix and len(child.key) < 4 * BLOCK:
                yield child

    def _touch(self, node: _Node) -> None:
        for one in reversed(node.path):
            self._nodes.move_to_end(one)

    def _remove_oldest(self) -> None:
        node, salt = self._nodes.popitem(last=False)
        parent = node.parent
        assert parent is not None  # roots are not in `_nodes`
        parent.children.pop(node.key, None)
        self.num_bytes -= tree_bytes((node.full, node.rings))
        if parent.parent is None and not parent.children:
            self._roots.pop(salt, None)


def _key(tokens: np.ndarray) -> bytes:
    return np.ascontiguousarray(tokens, np.int32).tobytes()


def _split(kinds: tuple[str, ...], layers: Arrays) -> tuple[Arrays, Arrays]:
    """Splits the layers into full-attention and sliding ones."""
    pairs = list(zip(kinds, layers, strict=True))
    return [one for kind, one in pairs if kind != SLIDING], [one for kind, one in pairs if kind == SLIDING]


def _join(kinds: tuple[str, ...], full: Arrays, sliding: Arrays) -> Arrays:
    """The inverse of `_split`."""
    rest = {True: iter(sliding), False: iter(full)}
    return [next(rest[kind == SLIDING]) for kind in kinds]


@functools.partial(jax.jit, static_argnames="kinds")
def _read_block(cache: KVCache, b: jax.Array, start: jax.Array, *, kinds: tuple[str, ...]) -> Arrays:
    """Returns the full-attention layers' keys and values of the block at `start`."""

    def read(leaf_LBKSH):
        row_LKSH = lax.dynamic_index_in_dim(leaf_LBKSH, b, axis=1, keepdims=False)
        slots = min(BLOCK, row_LKSH.shape[2])
        # Slots past the end of the cache are never attended to, so clipping is safe.
        index_S = start + jnp.arange(slots, dtype=jnp.int32)
        return jnp.take(row_LKSH, index_S, axis=2, mode="clip")

    return jax.tree.map(read, _split(kinds, cache.layers)[0])


@functools.partial(jax.jit, static_argnames="kinds")
def _read_rings(cache: KVCache, b: jax.Array, *, kinds: tuple[str, ...]) -> Arrays:
    """Returns the sliding layers' ring buffers of a row."""
    sliding = _split(kinds, cache.layers)[1]
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, b, axis=1, keepdims=False), sliding)


@functools.partial(jax.jit, static_argnames="kinds", donate_argnames="row")
def _write_block(row: KVCache, full: Arrays, start: jax.Array, *, kinds: tuple[str, ...]) -> KVCache:
    old, sliding = _split(kinds, row.layers)

    def write(leaf_LBKSH, block_LKSH):
        index_S = start + jnp.arange(block_LKSH.shape[2], dtype=jnp.int32)
        return leaf_LBKSH.at[:, 0, :, index_S].set(jnp.moveaxis(block_LKSH, 2, 0), mode="drop")

    return KVCache(_join(kinds, jax.tree.map(write, old, full), sliding), row.lengths)


@functools.partial(jax.jit, static_argnames="kinds", donate_argnames="row")
def _write_rings(row: KVCache, rings: Arrays, length: jax.Array, *, kinds: tuple[str, ...]) -> KVCache:
    """Writes the sliding layers' ring buffers and the length.

    A ring buffer of another size than the row's has not wrapped around, so its tokens keep their slots.
    """
    full, old = _split(kinds, row.layers)

    def write(leaf_LBKSH, ring_LKSH):
        slots = min(leaf_LBKSH.shape[3], ring_LKSH.shape[2])
        return leaf_LBKSH.at[:, 0, :, :slots].set(ring_LKSH[:, :, :slots])

    return KVCache(_join(kinds, full, jax.tree.map(write, old, rings)), jnp.full(1, length, jnp.int32))
