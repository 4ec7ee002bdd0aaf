"""Two tables: which published tensor each parameter is, and how its axes become ours.

A layout reads `axes in the file -> our axes` in the letters of the code (V vocabulary, D hidden, N query
heads, K key/value heads, H head size, E experts, F expert width). (N H) is one axis that runs over both; P is
the pair of gate and up, which the published layouts interleave and ours keeps apart, but for packed rows, U;
G and J count the groups of 32 along D and F, and Y the 16 bytes of a group; Q counts all heads of q, k and v,
which `original/` holds in one. MATH.md, "Released weights".
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection

import jax
import numpy as np

from gptoss_jax.checkpoints.tensor_names import described
from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.mxfp4.codec import BYTES, GROUP
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.parallel.rules import path_names


@dataclasses.dataclass(frozen=True)
class Layout:
    """The name of a published tensor ({} stands for the layer), and what its axes are."""

    name: str
    axes: str
    # q, k or v: the heads of the Q axis that are this parameter's.
    part: str = ""

    @functools.cached_property
    def _file_axes(self) -> list[list[str]]:
        """The letters of each axis of the file."""
        found = re.findall(r"\(([^)]*)\)|(\w+)", self.axes.partition(" -> ")[0])
        return [(several or one).split() for several, one in found]

    @functools.cached_property
    def _order(self) -> list[int]:
        """Where each of our axes stands among the file's letters."""
        letters = [letter for axis in self._file_axes for letter in axis]
        ours = self.axes.partition(" -> ")[2].split() or letters
        return [letters.index(letter) for letter in ours]

    def file_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of the tensor in the file."""
        size = axis_sizes(config)
        return tuple(math.prod(size[letter] for letter in axis) for axis in self._file_axes)

    def to_ours(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The file's tensor as one layer's parameter: a view of the same memory."""
        size = axis_sizes(config)
        tensor = tensor.reshape([size[letter] for axis in self._file_axes for letter in axis])
        if self.part:
            N, K = size["N"], size["K"]
            tensor = tensor[{"q": slice(0, N), "k": slice(N, N + K), "v": slice(N + K, N + 2 * K)}[self.part]]
        return tensor.transpose(self._order)

    def to_file(self, parameter: np.ndarray) -> np.ndarray:
        """One layer's parameter, or a slice along an axis that comes first in both, as the file's tensor."""
        apart = parameter.transpose(np.argsort(self._order))
        shape, axis = [], 0
        for letters in self._file_axes:
            shape.append(math.prod(apart.shape[axis : axis + len(letters)]))
            axis += len(letters)
        return apart.reshape(shape)

    def files(self, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of each tensor in the file that one layer's parameter is read from."""
        return {self.name.format(layer): self.file_shape(config)}

    @property
    def keeps_first_axis(self) -> bool:
        """Whether the first axis is the same in both, so that slices of it can be worked through one by
        one."""
        return len(self._file_axes[0]) == 1 and self._order[0] == 0


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """The names of the tensors that hold one expert's part of a parameter ({} stands for layer and expert),
    and what their axes are. Two names are those of gate and up, whose axis P the file then lacks."""

    names: tuple[str, ...]
    axes: str

    def parts(self, layer: int, expert: int) -> list[Layout]:
        """Returns the layout of each tensor of one expert."""
        return [Layout(name.format(layer, expert), self.axes) for name in self.names]

    def files(self, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of each tensor in the file that one layer's parameter is read from."""
        experts = range(config.num_local_experts)
        return {p.name: p.file_shape(config) for e in experts for p in self.parts(layer, e)}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every letter of a layout."""
    D, F, N, K = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    return {
        "V": config.vocab_size, "D": D, "N": N, "K": K, "Q": N + 2 * K, "H": config.head_dim, "U": 2 * F,
        "E": config.num_local_experts, "F": F, "P": 2, "G": D // GROUP, "J": F // GROUP, "Y": BYTES,
    }  # fmt: skip


def _table(rows: dict[str, tuple[str, ...]], layer: str) -> dict[str, Layout]:
    return {key: Layout(row[0].replace("@", layer), *row[1:]) for key, row in rows.items()}


# Last two names of a parameter's path -> the tensor it is. With packed experts, `_blocks` and `_scales` stand
# in the place of the matrices.
HUGGINGFACE = _table(
    {
        "embedding.weight": ("model.embed_tokens.weight", "V D"),
        "attention_norm.scale": ("@input_layernorm.weight", "D"),
        "attention.q": ("@self_attn.q_proj.weight", "(N H) D -> D N H"),
        "attention.q_bias": ("@self_attn.q_proj.bias", "(N H) -> N H"),
        "attention.k": ("@self_attn.k_proj.weight", "(K H) D -> D K H"),
        "attention.k_bias": ("@self_attn.k_proj.bias", "(K H) -> K H"),
        "attention.v": ("@self_attn.v_proj.weight", "(K H) D -> D K H"),
        "attention.v_bias": ("@self_attn.v_proj.bias", "(K H) -> K H"),
        "attention.out": ("@self_attn.o_proj.weight", "D (N H) -> N H D"),
        "attention.out_bias": ("@self_attn.o_proj.bias", "D"),
        "attention.sinks": ("@self_attn.sinks", "N"),
        "moe_norm.scale": ("@post_attention_layernorm.weight", "D"),
        "moe.router": ("@mlp.router.weight", "E D -> D E"),
        "moe.router_bias": ("@mlp.router.bias", "E"),
        "moe.gate_up": ("@mlp.experts.gate_up_proj", "E D (F P) -> E D P F"),
        "moe.gate_up_blocks": ("@mlp.experts.gate_up_proj_blocks", "E U G Y"),
        "moe.gate_up_scales": ("@mlp.experts.gate_up_proj_scales", "E U G"),
        "moe.gate_up_bias": ("@mlp.experts.gate_up_proj_bias", "E (F P) -> E P F"),
        "moe.down": ("@mlp.experts.down_proj", "E F D"),
        "moe.down_blocks": ("@mlp.experts.down_proj_blocks", "E D J Y"),
        "moe.down_scales": ("@mlp.experts.down_proj_scales", "E D J"),
        "moe.down_bias": ("@mlp.experts.down_proj_bias", "E D"),
        "final_norm.scale": ("model.norm.weight", "D"),
        "head.weight": ("lm_head.weight", "V D"),
    },
    layer="model.layers.{}.",
)

# The layout of the reference implementation: matrices are [out, in], the experts' too where they are not
# packed.
ORIGINAL = _table(
    {
        "embedding.weight": ("embedding.weight", "V D"),
        "attention_norm.scale": ("@attn.norm.scale", "D"),
        "attention.q": ("@attn.qkv.weight", "(Q H) D -> D Q H", "q"),
        "attention.q_bias": ("@attn.qkv.bias", "(Q H) -> Q H", "q"),
        "attention.k": ("@attn.qkv.weight", "(Q H) D -> D Q H", "k"),
        "attention.k_bias": ("@attn.qkv.bias", "(Q H) -> Q H", "k"),
        "attention.v": ("@attn.qkv.weight", "(Q H) D -> D Q H", "v"),
        "attention.v_bias": ("@attn.qkv.bias", "(Q H) -> Q H", "v"),
        "attention.out": ("@attn.out.weight", "D (N H) -> N H D"),
        "attention.out_bias": ("@attn.out.bias", "D"),
        "attention.sinks": ("@attn.sinks", "N"),
        "moe_norm.scale": ("@mlp.norm.scale", "D"),
        "moe.router": ("@mlp.gate.weight", "E D -> D E"),
        "moe.router_bias": ("@mlp.gate.bias", "E"),
        "moe.gate_up": ("@mlp.mlp1_weight", "E (F P) D -> E D P F"),
        "moe.gate_up_blocks": ("@mlp.mlp1_weight.blocks", "E U G Y"),
        "moe.gate_up_scales": ("@mlp.mlp1_weight.scales", "E U G"),
        "moe.gate_up_bias": ("@mlp.mlp1_bias", "E (F P) -> E P F"),
        "moe.down": ("@mlp.mlp2_weight", "E D F -> E F D"),
        "moe.down_blocks": ("@mlp.mlp2_weight.blocks", "E D J Y"),
        "moe.down_scales": ("@mlp.mlp2_weight.scales", "E D J"),
        "moe.down_bias": ("@mlp.mlp2_bias", "E D"),
        "final_norm.scale": ("norm.scale", "D"),
        "head.weight": ("unembedding.weight", "V D"),
    },
    layer="block.{}.",
)


# Experts one by one, by a name that only this layout has: with gate and up apart (llm-compressor), and with
# both in one matrix whose rows alternate, as they do in the published one (Unsloth).
_EXPERTS = "model.layers.{}.mlp.experts."
BY_EXPERT = {
    r"\.mlp\.experts\.\d+\.gate_proj\.weight$": {
        "moe.gate_up": ExpertLayout(
            (f"{_EXPERTS}{{}}.gate_proj.weight", f"{_EXPERTS}{{}}.up_proj.weight"), "F D -> D F"
        ),
        "moe.gate_up_bias": ExpertLayout(
            (f"{_EXPERTS}{{}}.gate_proj.bias", f"{_EXPERTS}{{}}.up_proj.bias"), "F"
        ),
        "moe.down": ExpertLayout((f"{_EXPERTS}{{}}.down_proj.weight",), "D F -> F D"),
        "moe.down_bias": ExpertLayout((f"{_EXPERTS}{{}}.down_proj.bias",), "D"),
    },
    r"\.mlp\.experts\.gate_up_projs\.\d+\.weight$": {
        "moe.gate_up": ExpertLayout((f"{_EXPERTS}gate_up_projs.{{}}.weight",), "(F P) D -> D P F"),
        "moe.gate_up_bias": ExpertLayout((f"{_EXPERTS}gate_up_projs.{{}}.bias",), "(F P) -> P F"),
        "moe.down": ExpertLayout((f"{_EXPERTS}down_projs.{{}}.weight",), "D F -> F D"),
        "moe.down_bias": ExpertLayout((f"{_EXPERTS}down_projs.{{}}.bias",), "D"),
    },
}
Table = dict[str, Layout | ExpertLayout]


def table_of(names: Collection[str]) -> Table:
    """Returns the table of the layout that tensors with these names are in."""
    if "embedding.weight" in names:
        return ORIGINAL
    by_expert = next((t for key, t in BY_EXPERT.items() if any(re.search(key, n) for n in names)), {})
    return HUGGINGFACE | by_expert


def parameters_by_layer(config: ModelConfig) -> list[tuple[tuple[str, ...], list[int]]]:
    """Path and layers of every array of the parameter tree, in the order a model is read.

    What is stacked over the repetitions of a period holds every period-th layer; the embedding, the final
    norm and the head are of layer -1.
    """
    period, count = len(config.period), config.num_hidden_layers
    made = []
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        names = path_names(path)
        layers = range(int(names[1]), count, period) if names[0] == "blocks" else [-1]
        made.append((names, list(layers)))
    return made


def expected_shapes(config: ModelConfig, table: Table) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a file of this config holds, layer by layer."""
    found = []
    for names, layers in parameters_by_layer(config):
        layout = table[".".join(names[-2:])]
        place = {"embedding": -1, "blocks": 0}.get(names[0], config.num_hidden_layers)
        found += [(place + max(i, 0), *file) for i in layers for file in layout.files(config, i).items()]
    return {name: shape for _, name, shape in sorted(found, key=lambda entry: entry[0])}


def check_tensors(where: str, config: ModelConfig, table: Table, tensors: dict[str, np.ndarray]) -> None:
    """Raises one ValueError for all tensors that are missing, surplus, or of another shape or type, which
    says what they seem to be of where that is known."""
    expected = expected_shapes(config, table)
    wrong = []
    for name, shape in expected.items():
        if name not in tensors:
            wrong.append(f"{name} is missing")
            continue
        packed = name.endswith(("blocks", "scales"))
        kinds = ("uint8",) if packed else ("bfloat16", "float16", "float32")
        if tensors[name].shape != shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}, must be {list(shape)}")
        elif tensors[name].dtype.name not in kinds:
            wrong.append(f"{name} is of type {tensors[name].dtype.name}, must be {' or '.join(kinds)}")
    wrong += [f"{name} is not of this model" for name in sorted(tensors.keys() - expected.keys())]
    if wrong:
        what = described(tensors.keys() - expected.keys())
        foreign, shown = (f"these tensors belong to {what}: ", 4) if what else ("", 20)
        more = f"; and {len(wrong) - shown} more" if len(wrong) > shown else ""
        raise ValueError(
            f"{where}: {foreign}{len(wrong)} tensors do not fit its config: {'; '.join(wrong[:shown])}{more}"
        )
