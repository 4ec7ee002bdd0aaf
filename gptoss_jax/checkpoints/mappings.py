"""Table that maps each parameter to checkpoint tensors and their axes to the model's.

File axes are written with the letters of `model.parameters`. (N H) is one merged axis; files interleave P,
the pair of gate and up, with F. Q counts the heads of q, k and v together.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping

import jax
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.parameters import LETTERS, adapted_target, parameter_name, path_names, sizes
from gptoss_jax.model.transformer import abstract_params


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """The checkpoint tensors that one layer's parameter is read from, and their axes.

    Args:
      key: the parameter's key in `LETTERS`.
      axes: the file's axes, such as "(N H) D".
      names: usually one name, with a placeholder `{layer}`. With `{expert}`, there is one tensor per expert,
        without axis E. Two names are gate and up, without axis P.
    """

    key: str
    axes: str
    names: tuple[str, ...]

    @functools.cached_property
    def file_axes(self) -> list[str]:
        """Letters of each axis in the file: "(N H) D" gives NH, D."""
        return [re.sub(r"\W", "", axis) for axis in re.findall(r"\([^)]*\)|\w", self.axes)]

    @functools.cached_property
    def _permutation(self) -> list[int]:
        """Position of each model axis among the file's letters."""
        letters, ours = "".join(self.file_axes), LETTERS[self.key]
        ours = re.sub("[NK]", "Q", ours) if "Q" in letters else ours
        return [letters.index(letter) for letter in ours if letter in letters]

    @property
    def is_per_expert(self) -> bool:
        return "{expert}" in self.names[0]

    @property
    def keeps_first_axis(self) -> bool:
        """True if file and model have the same first axis, so that slices along it convert separately."""
        return len(self.file_axes[0]) == 1 and self._permutation[0] == 0

    def name(self, layer: int) -> str:
        """Returns the name of a layer's tensor, for mappings with a single name."""
        return self.names[0].format(layer=layer)

    def file_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of one tensor in the file."""
        size = axis_sizes(config, self.key)
        return tuple(math.prod(size[letter] for letter in axis) for axis in self.file_axes)

    def file_shapes(self, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of all tensors that a layer's parameter is read from."""
        experts = range(config.num_local_experts if self.is_per_expert else 1)
        names = [name.format(layer=layer, expert=expert) for expert in experts for name in self.names]
        return dict.fromkeys(names, self.file_shape(config))

    def to_model(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns a view of the file's tensor with the model's axes."""
        size = axis_sizes(config, self.key)
        tensor = tensor.reshape([size[letter] for letter in "".join(self.file_axes)])
        if "Q" in self.axes:
            N, K = size["N"], size["K"]
            heads = {"q": slice(0, N), "k": slice(N, N + K), "v": slice(N + K, N + 2 * K)}
            tensor = tensor[heads[self.key.removeprefix("attention.")[0]]]
        return tensor.transpose(self._permutation)

    def to_file(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of `to_model`, also for a slice along the first axis if `keeps_first_axis`."""
        apart = parameter.transpose(np.argsort(self._permutation))
        shape, axis = [], 0
        for letters in self.file_axes:
            shape.append(math.prod(apart.shape[axis : axis + len(letters)]))
            axis += len(letters)
        return apart.reshape(shape)


def axis_sizes(config: ModelConfig, key: str = "") -> dict[str, int]:
    """Returns letter -> size for `TensorMapping.axes`; r is the rank of the adapter `key`."""
    size = sizes(config) | {"Q": config.num_attention_heads + 2 * config.num_key_value_heads}
    target = adapted_target(key)
    return size if target is None else size | {"r": config.lora_rank(target)}


# Parameter -> axes and name of the Hugging Face tensor, then of the tensor in `original/`, which fuses q, k
# and v and stores dense expert matrices as [out, in]. Empty axes: same as the model's; @: the layer's prefix.
_TENSORS = {
    "embedding.weight": ("", "model.embed_tokens.weight", "", "embedding.weight"),
    "attention_norm.scale": ("", "@input_layernorm.weight", "", "@attn.norm.scale"),
    "attention.q": ("(N H) D", "@self_attn.q_proj.weight", "(Q H) D", "@attn.qkv.weight"),
    "attention.q_bias": ("(N H)", "@self_attn.q_proj.bias", "(Q H)", "@attn.qkv.bias"),
    "attention.k": ("(K H) D", "@self_attn.k_proj.weight", "(Q H) D", "@attn.qkv.weight"),
    "attention.k_bias": ("(K H)", "@self_attn.k_proj.bias", "(Q H)", "@attn.qkv.bias"),
    "attention.v": ("(K H) D", "@self_attn.v_proj.weight", "(Q H) D", "@attn.qkv.weight"),
    "attention.v_bias": ("(K H)", "@self_attn.v_proj.bias", "(Q H)", "@attn.qkv.bias"),
    "attention.out": ("D (N H)", "@self_attn.o_proj.weight", "D (N H)", "@attn.out.weight"),
    "attention.out_bias": ("", "@self_attn.o_proj.bias", "", "@attn.out.bias"),
    "attention.sinks": ("", "@self_attn.sinks", "", "@attn.sinks"),
    "moe_norm.scale": ("", "@post_attention_layernorm.weight", "", "@mlp.norm.scale"),
    "moe.router": ("e D", "@mlp.router.weight", "e D", "@mlp.gate.weight"),
    "moe.router_bias": ("", "@mlp.router.bias", "", "@mlp.gate.bias"),
    "moe.gate_up": ("E D (F P)", "@mlp.experts.gate_up_proj", "E (F P) D", "@mlp.mlp1_weight"),
    "moe.gate_up_blocks": ("", "@mlp.experts.gate_up_proj_blocks", "", "@mlp.mlp1_weight.blocks"),
    "moe.gate_up_scales": ("", "@mlp.experts.gate_up_proj_scales", "", "@mlp.mlp1_weight.scales"),
    "moe.gate_up_bias": ("E (F P)", "@mlp.experts.gate_up_proj_bias", "E (F P)", "@mlp.mlp1_bias"),
    "moe.down": ("", "@mlp.experts.down_proj", "E D F", "@mlp.mlp2_weight"),
    "moe.down_blocks": ("", "@mlp.experts.down_proj_blocks", "", "@mlp.mlp2_weight.blocks"),
    "moe.down_scales": ("", "@mlp.experts.down_proj_scales", "", "@mlp.mlp2_weight.scales"),
    "moe.down_bias": ("", "@mlp.experts.down_proj_bias", "", "@mlp.mlp2_bias"),
    "final_norm.scale": ("", "model.norm.weight", "", "norm.scale"),
    "head.weight": ("", "lm_head.weight", "", "unembedding.weight"),
}
# The same for adapters in PEFT's layout, where names begin with ADAPTER_PREFIX. PEFT wraps `experts` twice:
# the inner wrapper adapts gate_up, the outer one down. Rows of A are ordered by expert, then rank; columns of
# B by rank, then expert.
ADAPTER_PREFIX = "base_model.model."
_ADAPTER_TENSORS = {
    "attention.q_lora_a": ("r D", "@self_attn.q_proj.lora_A.weight"),
    "attention.q_lora_b": ("(N H) r", "@self_attn.q_proj.lora_B.weight"),
    "attention.k_lora_a": ("r D", "@self_attn.k_proj.lora_A.weight"),
    "attention.k_lora_b": ("(K H) r", "@self_attn.k_proj.lora_B.weight"),
    "attention.v_lora_a": ("r D", "@self_attn.v_proj.lora_A.weight"),
    "attention.v_lora_b": ("(K H) r", "@self_attn.v_proj.lora_B.weight"),
    "attention.out_lora_a": ("r (N H)", "@self_attn.o_proj.lora_A.weight"),
    "attention.out_lora_b": ("D r", "@self_attn.o_proj.lora_B.weight"),
    "moe.router_lora_a": ("r D", "@mlp.router.lora_A.weight"),
    "moe.router_lora_b": ("e r", "@mlp.router.lora_B.weight"),
    "moe.gate_up_lora_a": ("(E r) D", "@mlp.experts.base_layer.lora_A.weight"),
    "moe.gate_up_lora_b": ("(F P) (r E)", "@mlp.experts.base_layer.lora_B.weight"),
    "moe.down_lora_a": ("(E r) F", "@mlp.experts.lora_A.weight"),
    "moe.down_lora_b": ("D (r E)", "@mlp.experts.lora_B.weight"),
    "head.lora_a": ("r D", "lm_head.lora_A.weight"),
    "head.lora_b": ("V r", "lm_head.lora_B.weight"),
}


def _table(prefix: str, rows: Mapping[str, tuple[str, ...]]) -> dict[str, TensorMapping]:
    """Builds the mappings from rows of axes and names."""
    return {
        key: TensorMapping(key, axes or LETTERS[key], tuple(name.replace("@", prefix) for name in names))
        for key, (axes, *names) in rows.items()
    }


_LAYER = "model.layers.{layer}."
HUGGINGFACE = _table(_LAYER, {**{key: row[:2] for key, row in _TENSORS.items()}, **_ADAPTER_TENSORS})
ORIGINAL = _table("block.{layer}.", {key: row[2:] for key, row in _TENSORS.items()})
# The experts' matrices, which may be stored in MXFP4.
EXPERT_MATRICES = tuple(key.removesuffix("_blocks") for key in LETTERS if key.endswith("_blocks"))
# Layouts with one tensor per expert, keyed by a pattern that identifies them: separate gate and up
# (llm-compressor), or one matrix with alternating rows, as in the published layout (Unsloth).
PER_EXPERT = {
    r"\.mlp\.experts\.\d+\.gate_proj\.weight$": _table("model.layers.{layer}.mlp.experts.", {
        "moe.gate_up": ("F D", "@{expert}.gate_proj.weight", "@{expert}.up_proj.weight"),
        "moe.gate_up_bias": ("F", "@{expert}.gate_proj.bias", "@{expert}.up_proj.bias"),
        "moe.down": ("D F", "@{expert}.down_proj.weight"),
        "moe.down_bias": ("d", "@{expert}.down_proj.bias"),
    }),
    r"\.mlp\.experts\.gate_up_projs\.\d+\.weight$": _table("model.layers.{layer}.mlp.experts.", {
        "moe.gate_up": ("(F P) D", "@gate_up_projs.{expert}.weight"),
        "moe.gate_up_bias": ("(F P)", "@gate_up_projs.{expert}.bias"),
        "moe.down": ("D F", "@down_projs.{expert}.weight"),
        "moe.down_bias": ("d", "@down_projs.{expert}.bias"),
    }),
}  # fmt: skip
Table = dict[str, TensorMapping]
# Other layouts of expert adapters: PEFT with transformers 4, where A is on the output side, and one pair per
# expert (Unsloth with 4-bit bitsandbytes experts).
SWAPPED_ADAPTERS = _table(f"{_LAYER}mlp.experts.", {
    "moe.gate_up_lora_a": ("D (r E)", "@base_layer.lora_B.weight"),
    "moe.gate_up_lora_b": ("(E r) (F P)", "@base_layer.lora_A.weight"),
    "moe.down_lora_a": ("F (r E)", "@lora_B.weight"),
    "moe.down_lora_b": ("(E r) D", "@lora_A.weight"),
})  # fmt: skip
PER_EXPERT_ADAPTERS = _table(f"{_LAYER}mlp.experts.", {
    "moe.gate_up_lora_a": ("r D", "@gate_up_projs.{expert}.lora_A.weight"),
    "moe.gate_up_lora_b": ("(F P) r", "@gate_up_projs.{expert}.lora_B.weight"),
    "moe.down_lora_a": ("r F", "@down_projs.{expert}.lora_A.weight"),
    "moe.down_lora_b": ("D r", "@down_projs.{expert}.lora_B.weight"),
})  # fmt: skip


def table_for(names: Collection[str]) -> Table:
    """Returns the table of the layout that these tensor names belong to."""
    if "embedding.weight" in names:
        return ORIGINAL
    per_expert = next((t for key, t in PER_EXPERT.items() if any(re.search(key, n) for n in names)), {})
    return HUGGINGFACE | per_expert


def parameter_layers(config: ModelConfig) -> dict[tuple[str, ...], list[int]]:
    """Returns path -> layers of each array in the parameter tree, in tree order.

    An array stacked over the repetitions of the layer pattern holds every period-th layer. Embedding, final
    norm and head count as layer -1.
    """
    period, count = len(config.period), config.num_hidden_layers
    paths = [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(config))]
    return {path: list(range(int(path[1]), count, period)) if path[0] == "blocks" else [-1] for path in paths}


def in_file_order(config: ModelConfig) -> list[tuple[tuple[str, ...], int]]:
    """Returns (path, layer) of all parameters, from the embedding through the layers to the head."""
    place = {"embedding": -1, "final_norm": config.num_hidden_layers, "head": config.num_hidden_layers}
    found = [(path, layer) for path, layers in parameter_layers(config).items() for layer in layers]
    return sorted(found, key=lambda entry: place.get(entry[0][0], entry[1]))


def expected_shapes(config: ModelConfig, table: Table) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of all tensors in a checkpoint, layer by layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in in_file_order(config):
        shapes |= table[parameter_name(path)].file_shapes(config, layer)
    return shapes


def check_tensors(where: str, config: ModelConfig, table: Table, tensors: dict[str, np.ndarray]) -> None:
    """Raises one ValueError for all tensors that are missing, unexpected, or of the wrong shape or dtype.

    The message says which other kind of model they seem to belong to.
    """
    expected, wrong = expected_shapes(config, table), []
    for name, shape in expected.items():
        packed = name.endswith(("blocks", "scales"))
        dtypes = ("uint8",) if packed else ("bfloat16", "float16", "float32")
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif tensors[name].shape != shape:
            wrong.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
        elif tensors[name].dtype.name not in dtypes:
            wrong.append(f"{name} has dtype {tensors[name].dtype.name}, expected {' or '.join(dtypes)}")
    unexpected = sorted(tensors.keys() - expected.keys())
    wrong += [f"{name} is not part of this model" for name in unexpected]
    if wrong:
        found = (what for key, what in FOREIGN.items() if any(re.search(key, name) for name in unexpected))
        what = next(found, None)
        foreign, shown = (f"these tensors belong to {what}: ", 4) if what else ("", 20)
        more = f"; and {len(wrong) - shown} more" if len(wrong) > shown else ""
        raise ValueError(
            f"{where}: {foreign}{len(wrong)} tensors do not fit its config: {'; '.join(wrong[:shown])}{more}"
        )


# Pattern of tensor names -> description of models with such tensors. The first match is used.
FOREIGN = {
    r"\.lora_|\.base_layer\.|\.modules_to_save\.|\.original_module\.": "a PEFT model with an unmerged "
    "adapter (merge it with peft's merge_and_unload)",
    r"\.(qweight|qzeros|weight_packed|weight_scale\w*|absmax|quant_map|SCB)$|\.quant_state\.": "a model "
    "quantized with GPTQ, AWQ, bitsandbytes or similar (must be bfloat16, float16, float32 or MXFP4)",
    r"^blk\.\d+\.": "a model with GGUF tensor names",
    r"\.block_sparse_moe\.": "a Mixtral model",
    r"\.mlp\.shared_expert": "a DeepSeek or Qwen model with shared experts",
    r"\.experts\.\d+\.gate_up_proj": "separate experts with gate and up in one matrix, in an unknown "
    "order (must be gate_proj and up_proj, or all experts in one gate_up_proj)",
    r"\.mlp\.gate\.weight$": "another mixture-of-experts model, such as Qwen or DeepSeek",
    r"\.mlp\.experts\.(\d+|gate_up_projs\.\d+)\.": "separate experts",
    r"layers\.\d+\.mlp\.(gate|up)_proj\.weight$": "a model without experts, such as Llama, Qwen or Mistral",
    r"^(transformer\.)?h\.\d+\.": "a GPT-2 model",
    r"(^|\.)(exp_avg|exp_avg_sq|optimizer)(\.|$)": "an optimizer state",
}
# Wrapper modules, anywhere in a name: torch.compile, data parallelism, FSDP, activation checkpointing,
# DeepSpeed.
WRAPPERS = r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."


def strip_wrappers(where: str, names: Iterable[str]) -> dict[str, str]:
    """Maps tensor names to names without the prefixes of wrappers and trainers.

    Raises ValueError if two names become equal.
    """
    stripped = {name: re.sub(WRAPPERS, "", name) for name in names}

    def rename(pattern: str, new: str = "") -> None:
        for name, other in stripped.items():
            stripped[name] = re.sub(pattern, new, other)

    rename(r"^(base_model\.model\.)+")  # PEFT
    short = stripped.values()
    if any(name.startswith("model.model.") for name in short) and all(n.startswith("model.") for n in short):
        # A trainer's module holds the model in its attribute `model`.
        rename(r"^model\.")
    elif any(name.startswith("layers.") for name in short):
        # Only the inner model was saved, without the class that adds the head.
        rename(r"^(?=(layers|embed_tokens|norm)\.)", "model.")
    first: dict[str, str] = {}
    for name, other in stripped.items():
        if first.setdefault(other, name) != name:
            raise ValueError(f"{where}: contains both {first[other]} and {name}, which are the same tensor")
    return stripped
