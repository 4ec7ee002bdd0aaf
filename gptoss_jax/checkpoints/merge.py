"""Merges adapters into weights, W + scaling A B, slice by slice during export."""

import collections
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints import export
from gptoss_jax.checkpoints.adapters import open_adapted
from gptoss_jax.checkpoints.lazy_tensors import (
    Index,
    LazyTensor,
    copy_cast,
    is_finite,
    on_cpu,
    release_pages,
)
from gptoss_jax.checkpoints.mappings import EXPERT_MATRICES
from gptoss_jax.checkpoints.readers import ExpertFormat, StoredFormat, WeightReader
from gptoss_jax.config.base import listed
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.model.lora import adapter_names, add_delta
from gptoss_jax.model.parameters import LETTERS, adapted_target


@dataclasses.dataclass(frozen=True)
class Survival:
    """How much of the delta D = scaling A B survives rounding in the merged weights of one target.

    W is the base and E the effective change; sums run over all weights of the target. If a dense base is
    written in MXFP4, E is the difference from the quantized base, Q(W), without an adapter.
    """

    base: float = 0.0  # |W|^2
    delta: float = 0.0  # |D|^2
    product: float = 0.0  # E D
    error: float = 0.0  # |E - D|^2
    rounding: float = 0.0  # |Q(W) - W|^2

    @property
    def size(self) -> float:
        """|D| / |W|."""
        return math.sqrt(self.delta / self.base) if self.base else 0.0

    @property
    def share(self) -> float:
        """Fraction of D in E, E D / |D|^2: 1 if the delta survived, 0 if it was rounded away."""
        return self.product / self.delta if self.delta else 1.0

    @property
    def noise(self) -> float:
        """|E - D| / |W|."""
        return math.sqrt(self.error / self.base) if self.base else 0.0

    @property
    def base_noise(self) -> float:
        """|Q(W) - W| / |W|: the error of quantizing the base without an adapter."""
        return math.sqrt(self.rounding / self.base) if self.base else 0.0

    def __add__(self, sums: Iterable[float]) -> "Survival":
        pairs = zip(dataclasses.astuple(self), sums, strict=True)
        return Survival(*(total + float(value) for total, value in pairs))


def merge(
    source: str | os.PathLike,
    target: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    experts: ExpertFormat | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Survival]:
    """Writes a model with its adapter merged as a Hugging Face folder; see `export.write_folder`.

    When a packed base is written in MXFP4, `codec.add_delta` chooses the scales.

    Args:
      source: a run that trained adapters, or the folder of a base model.
      adapter: see `adapters.read_adapter`; None: the run's own.

    Returns the `Survival` of each target, such as "gate_up", in the model's order.

    Raises ValueError like `adapters.open_adapted`, for a source without an adapter, and for an adapter with
    NaN or infinite values.
    """
    export.check_target(target)
    reader = open_adapted(source, adapter)
    if reader.config.lora is None:
        raise ValueError(f"{source}: has no adapter to merge; name one (--adapter)")
    damaged = [
        tensor.name
        for name in adapter_names(reader.config)
        for layer in ([-1] if name.startswith("head.") else range(reader.config.num_hidden_layers))
        if not is_finite((tensor := reader.stored_whole(name, layer)).array)
    ]
    if damaged:
        raise ValueError(f"{adapter or source}: not merged: NaN or infinite values in {listed(damaged)}")
    merged = MergedReader(reader)
    export.write_folder(merged, target, experts, on_progress=on_progress)
    targets = filter(None, map(adapted_target, adapter_names(reader.config)))
    return {target: merged.survival[target] for target in targets}


class MergedReader(WeightReader):
    """Reads the weights of a model with its adapters merged."""

    def __init__(self, reader: WeightReader):
        self._reader, self._config = reader, reader.config
        self.config = dataclasses.replace(reader.config, lora=None)
        self.packed, self.origin = reader.packed, reader.origin
        # Weight -> names of its A and B.
        self._adapters: dict[str, list[str]] = {}
        for name in adapter_names(reader.config):
            weight = name.rpartition("lora_")[0]
            weight = f"{weight}weight" if weight.endswith(".") else weight.removesuffix("_")
            self._adapters.setdefault(weight, []).append(name)
        self.survival: dict[str, Survival] = collections.defaultdict(Survival)
        self._lock = threading.Lock()
        # Scales of each expert, computed together with its blocks and kept until they are written.
        self._scales: dict[tuple[str, int], dict[int, np.ndarray]] = collections.defaultdict(dict)

    def stored(self, key: str, layer: int) -> StoredFormat:
        return self._reader.stored(key, layer)

    def stored_dtypes(self, key: str) -> Iterable[np.dtype]:
        return self._reader.stored_dtypes(key)

    def tensor(self, key: str, layer: int) -> LazyTensor:
        weight, _, part = key.rpartition("_")
        if weight in EXPERT_MATRICES and weight in self._adapters and part in ("blocks", "scales"):
            names = [f"{weight}_{name}" for name in ("blocks", "scales")] if self.packed else []
            packed = [self._reader.stored_whole(name, layer).array for name in names]
            return MergedBlocks(self._merged(weight, layer), part, packed, self._scales[weight, layer])
        return self._merged(key, layer) if key in self._adapters else self._reader.tensor(key, layer)

    def _merged(self, weight: str, layer: int) -> "MergedTensor":
        names, config = self._adapters[weight], self._config
        a, b = (self._reader.stored_whole(name, layer).array.astype(np.float32) for name in names)
        target = adapted_target(names[0])
        assert config.lora is not None and target is not None, weight
        b = config.lora.scaling(config.lora_rank(target)) * b
        letters = LETTERS[names[0]], LETTERS[names[1]], LETTERS[weight]
        count = functools.partial(self._count, target)
        return MergedTensor(self._reader.tensor(weight, layer), a, b, letters, count)

    def _count(self, target: str, sums: Iterable[float]) -> None:
        with self._lock:
            self.survival[target] = self.survival[target] + sums


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """A dense weight plus its delta.

    Args:
      base: the weight.
      a: the adapter's A, float32.
      b: the adapter's B times the scaling, float32.
      letters: axes of A, B and the weight.
      count: called with the sums of `Survival` for each slice that is read.
    """

    base: LazyTensor
    a: np.ndarray
    b: np.ndarray
    letters: tuple[str, str, str]
    count: Callable[[Iterable[float]], None]

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def read_into(self, out: np.ndarray, index: Index) -> bool:
        letters = self.letters[2]
        if letters[0] != "E":
            return self._read(out, index)
        experts = [(slice(e, e + 1), *index[1:]) for e in range(index[0].start, index[0].stop)]
        return all([self._read(out[i : i + 1], place) for i, place in enumerate(experts)])

    def _read(self, out: np.ndarray, index: Index) -> bool:
        *factors, letters = self.letters
        slices = dict(zip(letters, index, strict=True))
        a, b = (
            array[tuple(slices.get(letter, slice(None)) for letter in names)]
            for array, names in zip((self.a, self.b), factors, strict=True)
        )
        base = np.empty(out.shape, np.float32)
        finite = self.base.read_into(base, index)
        merged, sums = on_cpu(merge_plain, f"{','.join(factors)}->{letters}", out.dtype.name)(base, a, b)
        if a.any() and b.any():
            copy_cast(out, merged)
            finite = finite and is_finite(out)
        else:
            finite = self.base.read_into(out, index)
        self.count(sums)
        return finite


@dataclasses.dataclass(frozen=True)
class MergedBlocks:
    """The MXFP4 blocks or scales of experts plus their delta.

    Args:
      source: the dense merged weight.
      part: "blocks" or "scales".
      packed: blocks and scales of a packed base, or empty.
      scales: expert -> scales that were computed with the blocks and not read yet.
    """

    source: MergedTensor
    part: str
    packed: list[np.ndarray]
    scales: dict[int, np.ndarray]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        experts, inputs, *outputs = self.source.shape
        shape = (experts, math.prod(outputs), inputs // codec.BLOCK_SIZE)
        return (*shape, codec.BLOCK_BYTES) if self.part == "blocks" else shape

    def read_into(self, out: np.ndarray, index: Index) -> bool:
        """See `LazyTensor`; only experts can be sliced."""
        for row, e in zip(out, range(index[0].start, index[0].stop), strict=True):
            if self.part == "blocks":
                row[...], self.scales[e], sums = self._merge(e)
                self.source.count(sums)
            else:
                known = self.scales.pop(e, None)
                row[...] = self._merge(e)[1] if known is None else known
        return self.part == "blocks" or not np.any(out == codec.NAN_SCALE)

    def _merge(self, e: int) -> tuple[np.ndarray, np.ndarray, Iterable[float]]:
        # [r, P, F] -> [r, U]: packed rows alternate between gate and up.
        a, b = self.source.a[e], np.moveaxis(self.source.b[e], 1, -1).reshape(self.source.b.shape[1], -1)
        if self.packed:
            base = [part[e] for part in self.packed]
            result = on_cpu(merge_packed)(*base, a, b)
            for part in base:
                release_pages(part)
            return result
        dense = np.empty(self.source.shape[1:], np.float32)
        self.source.base.read_into(dense[None], (slice(e, e + 1), *map(slice, [0] * dense.ndim, dense.shape)))
        return on_cpu(merge_dense)(dense.T.reshape(b.shape[1], len(a)), a, b)


def merge_plain(
    base: jax.Array, a: jax.Array, b: jax.Array, equation: str, dtype: str
) -> tuple[jax.Array, list[jax.Array]]:
    """Returns a slice of a weight plus its delta, cast to `dtype`, and the sums of `Survival`.

    Args:
      base: float32.
      a, b: float32; einsum with `equation` gives the delta, in the base's shape. b includes the scaling.
    """
    delta = jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
    merged = add_delta(base, delta).astype(dtype)
    return merged, survival_sums(base, delta, merged.astype(jnp.float32) - base)


def merge_packed(
    blocks: jax.Array, scales: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Returns the blocks and scales of one expert plus its delta (`codec.add_delta`), and the sums of
    `Survival`.

    Args:
      blocks: uint8 [out, G, 16].
      scales: uint8 [out, G].
      a: float32 [in, r].
      b: float32 [r, out], including the scaling.
    """
    base, delta = codec.dequantize(blocks, scales, jnp.float32), _delta(a, b)
    packed = codec.add_delta(blocks, scales, delta)
    return *packed, survival_sums(base, delta, codec.dequantize(*packed, jnp.float32) - base)


def merge_dense(base: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Quantizes one expert plus its delta to MXFP4 with `codec.quantize`; also returns `Survival`'s sums.

    Args:
      base: float32 [out, in].
      a, b: as for `merge_packed`.
    """
    delta = _delta(a, b)
    packed, alone = codec.quantize(base + delta), codec.dequantize(*codec.quantize(base), jnp.float32)
    effect = codec.dequantize(*packed, jnp.float32) - alone
    return *packed, survival_sums(base, delta, effect, alone - base)


def _delta(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("ir,ro->oi", a, b, precision=jax.lax.Precision.HIGHEST)


def survival_sums(
    base: jax.Array, delta: jax.Array, effect: jax.Array, rounding: jax.Array | float = 0.0
) -> list[jax.Array]:
    """Returns the fields of `Survival` for float32 arrays of equal shape; non-finite values count as 0."""
    finite = jnp.isfinite(effect) & jnp.isfinite(delta)
    base, delta, effect, noise = (jnp.where(finite, x, 0) for x in (base, delta, effect, rounding))
    rest = effect - delta
    pairs = (base, base), (delta, delta), (effect, delta), (rest, rest), (noise, noise)
    return [jnp.sum(x * y) for x, y in pairs]
