"""Small random checkpoints in the published layouts. Needs neither jax nor torch.

All sizes differ, so that swapped axes are noticed. YaRN is that of the released models, with an original
length of 4096.
"""

import hashlib
import json
import math
import os
import pathlib
from typing import Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

SIZES = {
    "vocab_size": 211,
    "hidden_size": 160,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 7,
    "sliding_window": 9,
    "max_position_embeddings": 131072,
}
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
THETA = 150000
GROUP = 32  # weights that share a scale in MXFP4
Form = Literal["bfloat16", "float32", "mxfp4"]


def random_checkpoint(
    folder: str | os.PathLike,
    experts_per_token: int,
    form: Form,
    seed: int = 0,
    dialect: Literal["rope_scaling", "rope_parameters"] = "rope_scaling",
) -> pathlib.Path:
    """Writes config.json and model.safetensors as a Hugging Face folder; returns the folder.

    Norms are around 1; biases and sinks are far from 0; some activations reach SwiGLU's limit. With "mxfp4"
    the experts' matrices are packed and all else is bfloat16. `dialect` is where config.json has YaRN:
    "rope_scaling" as the released models, "rope_parameters" as transformers 5. The same arguments give the
    same weights on every machine.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(experts_per_token, form, dialect), indent=2))
    save_file(_tensors(form, np.random.default_rng(seed)), folder / "model.safetensors")
    return folder


def weights_digest(folder: str | os.PathLike) -> str:
    """Returns a digest that tells whether two machines made the same weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(pathlib.Path(folder) / "model.safetensors").items()):
        digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


def _config(experts_per_token: int, form: Form, dialect: str) -> dict:
    config = {
        **SIZES,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "num_experts_per_tok": experts_per_token,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * (SIZES["num_hidden_layers"] // 2),
    }
    if dialect == "rope_scaling":
        config |= {"rope_scaling": YARN, "rope_theta": THETA}
    else:
        config["rope_parameters"] = {**YARN, "rope_theta": float(THETA)}
    if form == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    return config


def _tensors(form: Form, rng: np.random.Generator) -> dict[str, np.ndarray]:
    V, D, F = SIZES["vocab_size"], SIZES["hidden_size"], SIZES["intermediate_size"]
    N, K, H = SIZES["num_attention_heads"], SIZES["num_key_value_heads"], SIZES["head_dim"]
    E = SIZES["num_local_experts"]
    dtype = np.float32 if form == "float32" else ml_dtypes.bfloat16
    tensors = {}

    def add(name: str, *shape: int, spread: float, mean: float = 0.0) -> None:
        tensors[name] = (mean + spread * _normal(rng, shape)).astype(dtype)

    def add_packed(name: str, *shape: int, exponents: tuple[int, int]) -> None:
        groups = shape[-1] // GROUP
        tensors[f"{name}_blocks"] = _bytes(rng, (*shape[:-1], groups, GROUP // 2))
        low, high = exponents
        offset = _bytes(rng, (*shape[:-1], groups)) % (high - low + 1)
        tensors[f"{name}_scales"] = (127 + low + offset).astype(np.uint8)

    # Small enough that the epsilon of the first norm matters.
    add("model.embed_tokens.weight", V, D, spread=0.1)
    for layer in range(SIZES["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        add(f"model.layers.{layer}.input_layernorm.weight", D, spread=0.2, mean=1.0)
        for name, heads in (("q", N), ("k", K), ("v", K)):
            add(f"{attention}.{name}_proj.weight", heads * H, D, spread=1 / math.sqrt(D))
            add(f"{attention}.{name}_proj.bias", heads * H, spread=0.5)
        add(f"{attention}.o_proj.weight", D, N * H, spread=1.5 / math.sqrt(N * H))
        add(f"{attention}.o_proj.bias", D, spread=0.5)
        add(f"{attention}.sinks", N, spread=3.0)
        add(f"model.layers.{layer}.post_attention_layernorm.weight", D, spread=0.2, mean=1.0)
        add(f"{mlp}.router.weight", E, D, spread=1.5 / math.sqrt(D))
        add(f"{mlp}.router.bias", E, spread=0.5)
        if form == "mxfp4":
            add_packed(f"{mlp}.experts.gate_up_proj", E, 2 * F, D, exponents=(-5, -3))
            add_packed(f"{mlp}.experts.down_proj", E, D, F, exponents=(-8, -6))
        else:
            add(f"{mlp}.experts.gate_up_proj", E, D, 2 * F, spread=2.5 / math.sqrt(D))
            add(f"{mlp}.experts.down_proj", E, F, D, spread=0.25 / math.sqrt(F))
        add(f"{mlp}.experts.gate_up_proj_bias", E, 2 * F, spread=1.0)
        add(f"{mlp}.experts.down_proj_bias", E, D, spread=0.5)
    add("model.norm.weight", D, spread=0.2, mean=1.0)
    add("lm_head.weight", V, D, spread=2 / math.sqrt(D))
    return tensors


def _bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns nearly normal values as sums of four integers, bit-identical on every machine."""
    words = np.frombuffer(rng.bytes(8 * math.prod(shape)), "<u2").reshape(*shape, 4)
    return (words.sum(axis=-1, dtype=np.int64) - 2 * 65535) / math.sqrt(4 * (65536**2 - 1) / 12)


# Hugging Face name within a layer -> name within a block of `original/`.
_ORIGINAL = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "self_attn.sinks": "attn.sinks",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}
_ORIGINAL_TRANSPOSED = {
    "mlp.experts.gate_up_proj": "mlp.mlp1_weight",
    "mlp.experts.down_proj": "mlp.mlp2_weight",
}


def original_layout(folder_hf: str | os.PathLike, folder_out: str | os.PathLike) -> pathlib.Path:
    """Rewrites a folder of `random_checkpoint` in the layout of OpenAI's `original/`; returns the new folder.

    q, k and v are one matrix there, and experts that are not packed are [E, out, in].
    """
    folder_hf, folder_out = pathlib.Path(folder_hf), pathlib.Path(folder_out)
    theirs = load_file(folder_hf / "model.safetensors")
    tensors = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.scale": theirs["model.norm.weight"],
        "unembedding.weight": theirs["lm_head.weight"],
    }
    for layer in range(SIZES["num_hidden_layers"]):
        prefix, block = f"model.layers.{layer}.", f"block.{layer}."
        for name, new in _ORIGINAL.items():
            if prefix + name in theirs:
                tensors[block + new] = theirs[prefix + name]
        for name, new in _ORIGINAL_TRANSPOSED.items():
            if prefix + name in theirs:
                tensors[block + new] = np.ascontiguousarray(theirs[prefix + name].swapaxes(1, 2))
        for kind in ("weight", "bias"):
            rows = [theirs[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{block}attn.qkv.{kind}"] = np.concatenate(rows)
    config = json.loads((folder_hf / "config.json").read_text())
    same = (
        "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit", "head_dim",
        "num_attention_heads", "num_key_value_heads", "sliding_window",
    )  # fmt: skip
    original = {name: config[name] for name in same} | {
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": YARN["original_max_position_embeddings"],
        "rope_theta": THETA,
        "rope_scaling_factor": YARN["factor"],
        "rope_ntk_alpha": YARN["beta_slow"],
        "rope_ntk_beta": YARN["beta_fast"],
    }
    folder_out.mkdir(parents=True, exist_ok=True)
    (folder_out / "config.json").write_text(json.dumps(original, indent=2))
    save_file(tensors, folder_out / "model.safetensors")
    return folder_out
