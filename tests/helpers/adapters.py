"""Random adapters, and what an adapter in PEFT's format adds to the weights."""

import dataclasses
import json

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints.lazy_tensors import DenseTensor
from gptoss_jax.checkpoints.readers import Adapter
from gptoss_jax.config import LoraConfig
from gptoss_jax.config.model import LORA_TARGETS
from gptoss_jax.model.lora import adapter_names
from gptoss_jax.model.parameters import shape_of

LORA = LoraConfig(rank=5, expert_rank=3, alpha=7.0, targets=LORA_TARGETS)
FILES = "adapter_model.safetensors", "adapter_config.json"


def random_adapter(config, lora=LORA, seed=0, spread=0.1):
    rng, config = np.random.default_rng(seed), dataclasses.replace(config, lora=lora)
    tensors = {}
    for key in adapter_names(config):
        for layer in [-1] if key.startswith("head.") else range(config.num_hidden_layers):
            values = spread * rng.standard_normal(shape_of(config, key))
            tensors[key, layer] = DenseTensor(key, values.astype(np.float32))
    return Adapter("random", lora, tensors)


def edit_adapter(folder, edit=lambda tensors, config: None):
    """Changes the tensors and the config of an adapter folder."""
    tensors, config = load_file(folder / FILES[0]), json.loads((folder / FILES[1]).read_text())
    tensors = edit(tensors, config) or tensors
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / FILES[0])
    (folder / FILES[1]).write_text(json.dumps(config))
    return folder


def deltas_by_hand(folder, num_experts):
    """Returns what an adapter of PEFT adds to Hugging Face tensors, by name, in explicit loops."""
    tensors, config = load_file(folder / FILES[0]), json.loads((folder / FILES[1]).read_text())
    found = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")]
        weight = {"experts": "experts.down_proj", "experts.base_layer": "experts.gate_up_proj"}
        module = stem.partition(".mlp.")[2]
        if module in weight:
            weight, r = stem.removesuffix(module) + weight[module], len(a) // num_experts
            delta = np.zeros((num_experts, a.shape[1], len(b)))
            for e in range(num_experts):
                for k in range(r):
                    delta[e] += np.outer(a[e * r + k], b[:, k * num_experts + e])
        else:
            weight, r = f"{stem}.weight", len(a)
            delta = np.zeros((len(b), a.shape[1]))
            for k in range(r):
                delta += np.outer(b[:, k], a[k])
        found[weight] = delta * config["lora_alpha"] / (r**0.5 if config["use_rslora"] else r)
    return found


def bfloat16(tensors):
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
