"""Reads PEFT adapters."""

import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np

from gptoss_jax.checkpoints import mappings
from gptoss_jax.checkpoints.lazy_tensors import DenseTensor
from gptoss_jax.checkpoints.mappings import HUGGINGFACE, PER_EXPERT_ADAPTERS, SWAPPED_ADAPTERS, Table
from gptoss_jax.checkpoints.readers import Adapter
from gptoss_jax.checkpoints.safetensors_io import ADAPTER_CONFIG, ADAPTERS, map_file
from gptoss_jax.config import LoraConfig, ModelConfig
from gptoss_jax.config.base import fits, read_json, require, spelled
from gptoss_jax.config.model import EXPERT_TARGETS, LORA_TARGETS
from gptoss_jax.model.lora import adapter_names
from gptoss_jax.model.parameters import adapted_target, shape_of

WEIGHTS = ADAPTERS[0]
# Target -> the module, or for experts and router the parameter, that PEFT adapts.
MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate_up": "mlp.experts.gate_up_proj",
    "down": "mlp.experts.down_proj",
    "router": "mlp.router.weight",
    "head": "lm_head",
}
PARAMETERS = (*EXPERT_TARGETS, "router")
# Target -> keys of A and B.
PAIRS = {target: [key for key in HUGGINGFACE if adapted_target(key) == target] for target in LORA_TARGETS}
# PEFT settings that change the computation, and their values for plain LoRA (also allowed: None and empty).
PLAIN_SETTINGS = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "use_qalora": False, "lora_bias": False,
    "fan_in_fan_out": False, "modules_to_save": None, "layer_replication": None, "arrow_config": None,
    "trainable_token_indices": None, "alora_invocation_tokens": None,
}  # fmt: skip
# Initializations that change the base weights.
CHANGE_BASE = ("pissa", "olora", "corda", "loftq")

# Types of the settings that are used.
NAMES = list[str] | str | None
READ_SETTINGS = {
    "use_rslora": bool | None, "rank_pattern": dict | None, "alpha_pattern": dict | None,
    "target_modules": NAMES, "exclude_modules": NAMES, "target_parameters": list[str] | None,
    "layers_to_transform": list[int] | int | None, "auto_mapping": dict | None,
}  # fmt: skip
BY_PATTERN = r"(.*\.)?({})"  # how PEFT matches a pattern against a module's name
BASE_WEIGHTS = r"(lm_head|embed_tokens)(\.base_layer)?\.weight$"
MAX_NAMED = 4  # maximum number of tensors named in an error message


class PeftFolder:
    """A folder with a PEFT adapter. See `adapters.read_adapter`."""

    def __init__(self, folder: pathlib.Path, config: ModelConfig):
        self.folder, self.config = folder, config
        where = ": must be a PEFT adapter, or a run that trained adapters"
        self.values = read_json(folder / ADAPTER_CONFIG, where)
        _check_settings(folder / ADAPTER_CONFIG, self.values)
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder}: contains no {WEIGHTS}")
        tensors = map_file(folder / WEIGHTS)
        names = mappings.strip_wrappers(str(folder), tensors)
        self.tensors = {
            re.sub(r"\.default(?=\.weight$)", "", names[name]): array for name, array in tensors.items()
        }
        # PEFT also saves the base's embedding and head if it adapts them.
        self.tensors = {
            name: array
            for name, array in self.tensors.items()
            if array.shape != (config.vocab_size, config.hidden_size) or not re.search(BASE_WEIGHTS, name)
        }
        self.table: dict[str, mappings.TensorMapping | None] = dict(HUGGINGFACE)
        self.table |= dict.fromkeys(PER_EXPERT_ADAPTERS)
        self.table |= _expert_table(folder, self.values, self.tensors, config)

    def read(self) -> Adapter:
        """Reads the adapter, padded and scaled to a single `LoraConfig` for all pairs."""
        pairs = self._pairs()
        ranks: dict[bool, list[int]] = {True: [], False: []}
        for (target, _), pair in pairs.items():
            assert pair.lora is not None, target
            ranks[target in EXPERT_TARGETS].append(pair.lora.rank)
        lora = LoraConfig(
            rank=max(ranks[False] or ranks[True]),
            expert_rank=max(ranks[True], default=None),
            alpha=float(self.values["lora_alpha"]),
            rslora=bool(self.values.get("use_rslora")),
            targets=tuple(target for target in LORA_TARGETS if any(target == name for name, _ in pairs)),
        )
        config, arrays = dataclasses.replace(self.config, lora=lora), {}
        for key in adapter_names(config):
            adapted = adapted_target(key)
            assert adapted is not None, key
            for layer in [-1] if adapted == "head" else range(config.num_hidden_layers):
                array = self._array(key, pairs.get((adapted, layer)), layer, config)
                arrays[key, layer] = DenseTensor(HUGGINGFACE[key].name(layer), array)
        return Adapter(str(self.folder), lora, arrays)

    def _pairs(self) -> dict[tuple[str, int], ModelConfig]:
        """The pairs of A and B in the file, by target and layer, each as a config with its rank and alpha.

        Raises ValueError if tensors are missing, unexpected or of another shape.
        """
        values, wrong, found = self.values, [], {}
        known: set[str] = set()
        for target, keys in PAIRS.items():
            for layer in [-1] if target == "head" else range(self.config.num_hidden_layers):
                module = MODULES[target] if target == "head" else f"model.layers.{layer}.{MODULES[target]}"
                rank = _by_pattern(values.get("rank_pattern"), module, values["r"])
                alpha = float(_by_pattern(values.get("alpha_pattern"), module, values["lora_alpha"]))
                lora = LoraConfig(rank, rank, alpha, rslora=bool(values.get("use_rslora")))
                config = dataclasses.replace(self.config, lora=lora)
                shapes: dict[str, tuple[int, ...]] = {}
                for mapping in filter(None, map(self.table.get, keys)):
                    shapes |= mapping.file_shapes(config, layer)
                is_there = bool(shapes.keys() & self.tensors.keys())
                if is_there or (shapes and _is_named(values, target, module)):
                    wrong += _misfits(shapes, self.tensors)
                    known |= shapes.keys()
                    found[target, layer] = config
        wrong += [
            f"{name} is not part of this model, or not a LoRA tensor"
            for name in sorted(self.tensors.keys() - known)
        ]
        if wrong or not found:
            more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
            problem = f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:MAX_NAMED])}{more}"
            raise ValueError(
                f"{self.folder}: adapter for another model or in an unknown layout: "
                f"{problem if wrong else 'it adapts nothing'}"
            )
        return found

    def _array(self, key: str, pair: ModelConfig | None, layer: int, config: ModelConfig) -> np.ndarray:
        """Returns one A or B with the rank and scaling of `config`; zeros if the file has none."""
        shape, mapping = shape_of(config, key), self.table[key]
        if pair is None or mapping is None:
            return np.zeros(shape, np.float32)
        names = mapping.file_shapes(pair, layer)
        parts = [mapping.to_model(self.tensors[name], pair) for name in names]
        array = np.stack(parts) if mapping.is_per_expert else parts[0]
        if array.shape != shape:
            array = np.pad(array, [(0, size - has) for size, has in zip(shape, array.shape, strict=True)])
        theirs, ours, target = pair.lora, config.lora, adapted_target(key)
        assert theirs is not None and ours is not None and target is not None, key
        factor = theirs.scaling(theirs.rank) / ours.scaling(config.lora_rank(target))
        is_scaled = key.endswith("_b") and factor != 1
        return np.float32(factor) * array.astype(np.float32) if is_scaled else array


def _check_settings(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Raises ValueError for an adapter_config.json with invalid settings, or settings beyond plain LoRA."""
    for name, plain in PLAIN_SETTINGS.items():
        value = values.get(name)
        require(
            value == plain or (name != "peft_type" and not value),
            f"{path}: {name}",
            value,
            f"must be {plain!r}",
        )
    start = values.get("init_lora_weights")
    changes_base = isinstance(start, str) and start.startswith(CHANGE_BASE)
    require(not changes_base, f"{path}: init_lora_weights", start, "the adapter is for modified base weights")
    for name, kind in READ_SETTINGS.items():
        require(fits(values.get(name), kind), f"{path}: {name}", values.get(name), f"must be {spelled(kind)}")
    numbers = [("r", int, values.get("r")), ("lora_alpha", float, values.get("lora_alpha"))]
    patterns = [(name, values.get(name), "{}") for name in ("target_modules", "exclude_modules")]
    for name, kind in {"rank_pattern": int, "alpha_pattern": float}.items():
        for pattern, value in (values.get(name) or {}).items():
            numbers.append((f"{name}[{pattern!r}]", kind, value))
            patterns.append((name, pattern, BY_PATTERN))
    for name, kind, value in numbers:
        is_above = value is not None and fits(value, kind) and value > 0
        require(is_above, f"{path}: {name}", value, f"must be {spelled(kind)} above 0")
    for name, pattern, form in patterns:
        try:
            re.compile(form.format(pattern) if isinstance(pattern, str) else "")
        except re.error as error:
            raise ValueError(f"{path}: {name} is {pattern!r}: not a regular expression ({error})") from None


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a module's name."""
    found = (
        value for name, value in (patterns or {}).items() if re.fullmatch(BY_PATTERN.format(name), module)
    )
    return next(found, default)


def _is_named(values: dict[str, Any], target: str, module: str) -> bool:
    """Returns True if the config says that PEFT adapts a module."""
    if target in PARAMETERS:
        return _matches(values.get("target_parameters"), module)
    names, layers = values.get("target_modules") or [], values.get("layers_to_transform")
    if _matches(values.get("exclude_modules"), module):
        return False
    if isinstance(names, str) and names.lower() == "all-linear":
        return target != "head"
    layers = [layers] if isinstance(layers, int) else layers
    # A full module name matches regardless of `layers_to_transform`.
    is_in = not layers or module in names or (target != "head" and int(module.split(".")[2]) in layers)
    return is_in and _matches(names, module)


def _matches(names: str | list[str] | None, module: str) -> bool:
    """Returns True if a module's full name matches a regular expression, or ends with one of the names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _misfits(shapes: dict[str, tuple[int, ...]], tensors: dict[str, np.ndarray]) -> list[str]:
    wrong = []
    for name, shape in shapes.items():
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif tensors[name].shape != shape:
            wrong.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
    return wrong


def _expert_table(
    folder: pathlib.Path, values: dict[str, Any], tensors: dict[str, np.ndarray], config: ModelConfig
) -> Table:
    """Returns the mappings of the experts' adapters for the file's layout.

    Raises ValueError for an unsupported or ambiguous layout.
    """
    names = [name for name in tensors if ".mlp.experts." in name]
    if any(re.search(r"\.experts\.w[123]\.", name) for name in names):
        raise ValueError(
            f"{folder}: Tinker's layout with shared expert matrices (w1, w2, w3) is not supported"
        )
    if any(re.search(r"\.experts\.(gate_up|down)_projs\.", name) for name in names):
        return PER_EXPERT_ADAPTERS
    tables = [{key: table[key] for key in PER_EXPERT_ADAPTERS} for table in (HUGGINGFACE, SWAPPED_ADAPTERS)]
    if not names:
        return tables[0]
    if not any(".base_layer." in name for name in names):
        # PEFT omits the inner wrapper if only one of the two is adapted.
        named = [target for target in EXPERT_TARGETS if any(
            name.endswith(MODULES[target]) for name in values.get("target_parameters") or ()
        )]  # fmt: skip
        tables = [
            {key: _outer(table[key]) for key in PAIRS[target]}
            for target in (named if len(named) == 1 else EXPERT_TARGETS)
            for table in tables
        ]
    fitting = [table for table in tables if _fits(table, tensors, config)]
    if len(fitting) > 1:
        raise ValueError(
            f"{folder}: ambiguous layout: only one of gate_up and down is adapted, and the shapes of A and B "
            "fit either side"
        )
    table = (fitting or tables)[0]
    layout, is_unsloth = values.get("lora_B_layout"), (values.get("auto_mapping") or {}).get("unsloth_fixed")
    allowed = (
        "must be 'rank_major', or 'grouped_by_expert' for an adapter trained by Unsloth before September "
        "2026; the tensors alone are ambiguous"
    )
    known = layout in ("rank_major", "grouped_by_expert") or (layout is None and not is_unsloth)
    require(known, f"{folder / ADAPTER_CONFIG}: lora_B_layout", layout, allowed)
    if layout == "grouped_by_expert":
        table = {
            key: dataclasses.replace(mapping, axes=mapping.axes.replace("(r E)", "(E r)"))
            for key, mapping in table.items()
        }
    return table


def _outer(mapping: mappings.TensorMapping) -> mappings.TensorMapping:
    names = tuple(name.replace(".base_layer.", ".") for name in mapping.names)
    return dataclasses.replace(mapping, names=names)


def _fits(table: Table, tensors: dict[str, np.ndarray], config: ModelConfig) -> bool:
    """Returns True if all axes that do not depend on the rank match the model's sizes."""
    for mapping in table.values():
        size = mappings.axis_sizes(config)
        for layer in range(config.num_hidden_layers):
            array = tensors.get(mapping.name(layer))
            if array is None:
                continue
            for axis, letters in enumerate(mapping.file_axes):
                fixed = math.prod(size[letter] for letter in letters) if "r" not in letters else None
                if array.ndim != len(mapping.file_axes) or fixed not in (None, array.shape[axis]):
                    return False
    return True
