"""Log-probabilities of a reference model, the initial one, computed once before a run trains on preferences.

They are stored in the run folder, because they depend on the initial weights, which may be gone when the run
is resumed.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from gptoss_jax.config import TrainConfig
from gptoss_jax.data.batches import PackedRows, local_rows, make_global_batch, padded_batches
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.kernels import selection
from gptoss_jax.model.fake_quant import exported_config, exported_params
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.parameters import merge_params
from gptoss_jax.model.transformer import bind
from gptoss_jax.parallel.in_flight import bounded
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.base_weights import find_adapter
from gptoss_jax.training.preferences import token_log_probs
from gptoss_jax.training.state import TrainState

FILE = "reference_log_probs.npy"


def with_reference(
    config: TrainConfig,
    cache: TokenCache,
    state: TrainState,
    frozen: dict,
    metadata: dict[str, Any],
    report: Callable[[str], None],
) -> TokenCache:
    """Returns the cache with the log-probabilities of the reference model, if the run needs them.

    It does not if its reference is the model without adapters, that is, if it trains only new adapters. A new
    run computes them from its initial parameters; a resumed one reads them from its folder.

    `metadata` is that of checkpoints; a new run's gets `has_reference`, because a run must not change its
    reference when it is resumed with other settings.

    Raises ValueError if the file of a resumed run is missing or of other text.
    """
    if config.objective != "dpo" or not config.dpo.needs_reference:
        return cache
    is_new = metadata["data"] is None
    if is_new:
        metadata["has_reference"] = (
            config.model.expert_fake_quant
            or not all(map(is_adapter, flatten_dict(state.params)))
            or find_adapter(config) is not None
        )
    if not metadata["has_reference"]:
        return cache
    path = pathlib.Path(config.run_dir) / FILE
    if is_new:
        report("Computing the log-probabilities of the reference model")
        values = _compute(config, cache, merge_params(state.params, frozen))
        if jax.process_index() == 0:
            partial = path.with_suffix(".tmp.npy")
            np.save(partial, values)
            os.replace(partial, path)
        return dataclasses.replace(cache, reference=values)
    if not path.exists():
        raise ValueError(
            f"{path} is gone: the run needs the log-probabilities of its reference model; start another "
            "--run-dir"
        )
    values = np.load(path, mmap_mode="r")
    if values.shape != cache.tokens.shape:
        raise ValueError(f"{path} has {values.size} values, and the text {cache.tokens.size} tokens")
    return dataclasses.replace(cache, reference=values)


def _compute(config: TrainConfig, cache: TokenCache, params: dict) -> np.ndarray:
    """Returns log p of each token of the cache that is trained on, float32, and 0 for the others."""
    sharding = batch_sharding(jax.tree.leaves(params)[0].sharding.mesh)
    size, values = config.data.batch_size, np.zeros(cache.tokens.shape, np.float32)
    model, params = exported_config(config.model), exported_params(config.model, params)

    def compute(params, batch):
        with selection.using(model.kernels):
            return token_log_probs(bind(model, params), batch)[0]

    compute = jax.jit(compute)
    for held_out in (False, True):
        packed = PackedRows(cache, held_out, config.data.seq_len, config.data.overlong)
        indices = np.arange(-(-len(packed) // size) * size).reshape(-1, size)

        def results(packed: PackedRows = packed, indices: np.ndarray = indices) -> Iterator[jax.Array]:
            for batch in padded_batches(packed, indices, local_rows(sharding, size)):
                yield compute(params, make_global_batch(batch, sharding, size))

        for number, result in enumerate(bounded(results())):
            log_probs_BT = multihost_utils.process_allgather(result, tiled=True)
            for row, index in enumerate(range(number * size, min((number + 1) * size, len(packed)))):
                _, _, target = packed.places(index)
                values[target] = log_probs_BT[row, : len(target)]
    return values
