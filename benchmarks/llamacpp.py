"""The peer of serve_vs_llamacpp.py: writes a checkpoint as GGUF, or serves a GGUF file with llama-server.

    python benchmarks/llamacpp.py write FOLDER FILE
    python benchmarks/llamacpp.py serve FILE PORT SLOTS CONTEXT THREADS [exact]

Runs in an environment with numpy, gguf and xllamacpp (llama.cpp's server); jax and this package are not
needed. FOLDER is a checkpoint in Hugging Face's format with experts in MXFP4 or with all weights in float32.
The weights are copied, never rounded or quantized again. The vocabulary is made up: requests hold token ids.
"""

import json
import pathlib
import sys

import gguf
import numpy as np

DTYPES = {"F32": np.float32, "U8": np.uint8, "BF16": np.uint16}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias",
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp.weight": "mlp.router.weight",
    "ffn_gate_inp.bias": "mlp.router.bias",
}


def read_safetensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a folder: bfloat16 as float32, others as views of the mapped files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensor = data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            is_bfloat16 = tensor.dtype == np.uint16
            tensors[name] = (tensor.astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else tensor
    return tensors


def pack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns GGUF's rows of bytes [E, out, in / 32 * 17]: per block its scale, then 16 bytes of nibbles.

    A checkpoint's byte [..., in / 32, 16] holds two neighbors, GGUF's the elements j and j + 16 of a block.
    """
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    packed = nibbles[..., :16] | nibbles[..., 16:] << 4
    return np.concatenate([scales[..., None], packed], axis=-1).reshape(*blocks.shape[:-2], -1)


def expert_tensors(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns a layer's expert tensors by GGUF's names; packed ones as bytes."""
    if f"{prefix}gate_up_proj_blocks" in tensors:
        gate_up, down = (
            pack_mxfp4(tensors[f"{prefix}{name}_blocks"], tensors[f"{prefix}{name}_scales"])
            for name in ("gate_up_proj", "down_proj")
        )
    else:  # stored as [E, in, out]
        gate_up, down = (tensors[prefix + name].swapaxes(1, 2) for name in ("gate_up_proj", "down_proj"))
    bias = tensors[f"{prefix}gate_up_proj_bias"]
    return {
        "ffn_gate_exps.weight": gate_up[:, ::2],
        "ffn_up_exps.weight": gate_up[:, 1::2],
        "ffn_down_exps.weight": down,
        "ffn_gate_exps.bias": bias[:, ::2],
        "ffn_up_exps.bias": bias[:, 1::2],
        "ffn_down_exps.bias": tensors[f"{prefix}down_proj_bias"],
    }


def add_metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    """Adds the architecture, and a vocabulary in which every token is a word."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def write(folder: str, file: str) -> None:
    config = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
    tensors = read_safetensors(pathlib.Path(folder))
    writer = gguf.GGUFWriter(file, "gpt-oss")
    add_metadata(writer, config)

    def add(name, array):
        is_packed = array.dtype == np.uint8
        kind = gguf.GGMLQuantizationType.MXFP4 if is_packed else None
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)

    for name, source in NAMES.items():
        add(name, tensors[source])
    add("output.weight", tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found = {name: tensors[prefix + source] for name, source in LAYER_NAMES.items()}
        for name, array in (found | expert_tensors(tensors, f"{prefix}mlp.experts.")).items():
            add(f"blk.{layer}.{name}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(file: str, port: str, slots: str, context: str, threads: str, exact: str = "") -> None:
    """Serves until standard input ends, with llama.cpp's own defaults.

    Args:
      context: tokens of a slot.
      exact: "exact" keeps keys, values and attention in float32 instead of float16.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.port, params.n_parallel = int(port), int(slots)
    params.n_ctx = int(slots) * int(context)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.verbosity = 1  # errors
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    {"write": write, "serve": serve}[sys.argv[1]](*sys.argv[2:])
