"""Loads a model folder into a `Service`: engine, tokenizer, names and defaults."""

import bisect
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from typing import Literal

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoints.load import load_model
from gptoss_jax.checkpoints.readers import HUB, local_folder
from gptoss_jax.config import ModelConfig, require
from gptoss_jax.config.base import read_json
from gptoss_jax.data.harmony import Harmony, Reasoning
from gptoss_jax.hardware import Chip
from gptoss_jax.inference.chat import find_model_kind
from gptoss_jax.inference.engine import DEFAULT_PREFIX_BYTES, Engine
from gptoss_jax.model.parameters import parameter_name
from gptoss_jax.model.transformer import Transformer, bind, compute_dtype, get_params
from gptoss_jax.parallel.mesh import AXES, use_mesh
from gptoss_jax.planning.estimate import MEMORY_UTILIZATION
from gptoss_jax.planning.inference import Workload, estimate_inference
from gptoss_jax.server.engine_thread import EngineThread
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.service import Defaults, Service, Settings

# Bytes hashed for the fingerprint at the start, middle and end of each weight file.
SAMPLED_BYTES = 1 << 16
WEIGHTS = ("*.safetensors", "config.json", "adapter_config.json", "checkpoints/**/*", "original/*")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of `gptoss serve`; see its --help."""

    folder: str
    adapter: str | None = None
    mesh: str | None = None  # such as "tensor=2"; None: one device
    model_name: str | None = None  # None: the folder's name
    slots: int | None = None
    context: int | None = None
    prefix_reuse: Literal["any", "exact", "off"] = "any"
    prefix_cache_bytes: int | None = None
    max_queue: int = 256
    plain: bool = False
    date: str | None = None  # None: today if the model was trained with dates
    reasoning: Reasoning = "medium"
    settings: Settings = Settings()


def load_service(config: ServeConfig) -> Service:
    """Loads the model; raises ValueError like `from_pretrained`, and for a bad generation_config.json."""
    with use_mesh(config.mesh) as mesh:
        return _load_service(config, mesh)


def _load_service(config: ServeConfig, mesh: jax.sharding.Mesh | None) -> Service:
    folder = local_folder(config.folder)
    defaults = read_defaults(folder)
    model, tokenizer = load_model(folder, config.adapter, mesh)
    model = widen(model)
    kind = find_model_kind(folder if config.adapter is None else config.adapter, tokenizer)
    limit = model.config.max_position_embeddings
    context = limit if config.context is None else config.context
    allowed = f"must be from 2 to the model's max_position_embeddings, {limit}"
    require(2 <= context <= limit, "context", context, allowed)
    prefixes = DEFAULT_PREFIX_BYTES if config.prefix_cache_bytes is None else config.prefix_cache_bytes
    usual = 8 if jax.default_backend() == "cpu" else 16
    engine = Engine(
        model,
        tokenizer,
        num_slots=config.slots or max_slots(usual, model.config, Workload(1, context, prefixes), mesh),
        max_context=context,
        prefix_reuse=config.prefix_reuse,
        prefix_cache_bytes=prefixes,
    )
    name = config.model_name or default_name(config.folder)
    return Service(
        engine=EngineThread(engine, config.max_queue),
        tokenizer=tokenizer,
        model_id=name,
        harmony=Harmony(tokenizer) if kind.is_chat and not config.plain else None,
        max_context=context,
        vocab_size=model.config.vocab_size,
        defaults=defaults,
        system_fingerprint=fingerprint(folder, config.adapter, compute_dtype(model.config).name),
        metrics=Metrics(name),
        date=config.date or ("today" if kind.has_date else None),
        reasoning=config.reasoning,
        settings=config.settings,
        state="loading",
    )


def widen(model: Transformer) -> Transformer:
    """Casts all parameters except the experts' matrices to the compute dtype.

    The values do not change. On CPU, XLA would otherwise convert bfloat16 in every step.
    """
    dtype = compute_dtype(model.config)

    def one(path, leaf):
        is_expert = parameter_name(path).startswith(("moe.gate_up", "moe.down"))
        is_narrow = leaf.dtype == jnp.bfloat16 and dtype == jnp.float32
        return leaf.astype(dtype) if is_narrow and not is_expert else leaf

    widened = bind(model.config, jax.tree_util.tree_map_with_path(one, get_params(model)))
    widened.origin = model.origin
    return widened


def max_slots(
    most: int, config: ModelConfig, workload: Workload, mesh: jax.sharding.Mesh | None = None
) -> int:
    """Returns how many slots, from 1 to `most`, fit next to the weights in the memory of the devices.

    `workload` has the context of a slot. By the estimate of `gptoss plan --inference`; `most` if JAX does not
    report the memory, as on CPU.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return most
    limit, axes = stats["bytes_limit"], dict.fromkeys(AXES, 1) if mesh is None else dict(mesh.shape)
    free = MEMORY_UTILIZATION * limit - stats.get("bytes_in_use", 0)
    kind, dimensions = device.device_kind, int(device.platform == "tpu")
    chip = Chip(kind, re.escape(kind), peak=0.0, memory=limit, dimensions=dimensions)

    def needed(slots: int) -> int:
        memory = estimate_inference(config, chip, axes, dataclasses.replace(workload, slots=slots)).memory
        return memory.total - memory.weights

    return max(bisect.bisect_right(range(1, most + 1), free, key=needed), 1)


def default_name(folder: str) -> str:
    """Returns the default model name: OWNER/NAME on the Hub, or the folder's name."""
    return folder.removeprefix(HUB) if folder.startswith(HUB) else pathlib.Path(folder).resolve().name


def read_defaults(folder: pathlib.Path) -> Defaults:
    """Returns temperature, top_p and top_k from generation_config.json, or OpenAI's defaults.

    Raises ValueError for values out of range.
    """
    file = folder / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    names = (field.name for field in dataclasses.fields(Defaults))
    given = {name: values[name] for name in names if values.get(name) is not None}
    for name, value in given.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(is_number and value >= 0, f"{file.name}: {name}", value, "must be a number, 0 or more")
    top_p = given.get("top_p", 1.0)
    require(0 < top_p <= 1, f"{file.name}: top_p", top_p, "must be above 0 and at most 1")
    if "top_k" in given:
        given["top_k"] = int(given["top_k"]) or None
    return Defaults(**given)


def fingerprint(folder: pathlib.Path, adapter: str | os.PathLike | None, dtype: str) -> str:
    """Returns `fp_…`: a hash of the weight files (names, sizes, sampled bytes), the compute dtype, and the
    versions of this package and jax."""
    folders = [folder] if adapter is None else [folder, local_folder(adapter)]
    parts: list[object] = [dtype, _version(), jax.__version__]
    for one in folders:
        files = sorted({file for pattern in WEIGHTS for file in one.glob(pattern) if file.is_file()})
        parts += [(file.relative_to(one).as_posix(), _sample(file)) for file in files]
    return "fp_" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _version() -> str:
    try:
        return importlib.metadata.version("gptoss-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def _sample(file: pathlib.Path) -> tuple[int, str]:
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for start in (0, max(size // 2, SAMPLED_BYTES), max(size - SAMPLED_BYTES, 0)):
            opened.seek(start)
            digest.update(opened.read(SAMPLED_BYTES))
    return size, digest.hexdigest()
