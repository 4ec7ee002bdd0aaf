"""Strips wrapper prefixes from tensor names and identifies tensors of other models."""

import re
from collections.abc import Iterable

# Modules that wrap others, anywhere in a name: torch.compile, data parallelism, FSDP, activation
# checkpointing, DeepSpeed.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
PEFT = "base_model.model."
# A pattern in one of the names -> what the tensors are. The first that fits counts.
FOREIGN = {
    r"\.lora_|\.base_layer\.|\.modules_to_save\.|\.original_module\.": "a PEFT model with an adapter that is "
    "not merged (merge_and_unload of peft merges it)",
    r"\.(qweight|qzeros|weight_packed|weight_scale\w*|absmax|quant_map|SCB)$|\.quant_state\.": "a model that "
    "GPTQ, AWQ, bitsandbytes or the like has quantized (must be bfloat16, float16, float32 or MXFP4)",
    r"^blk\.\d+\.": "a model with the names of GGUF",
    r"\.block_sparse_moe\.": "a Mixtral model",
    r"\.mlp\.shared_expert": "a DeepSeek or Qwen model with shared experts",
    r"\.experts\.\d+\.gate_up_proj": "experts one by one, with gate and up in one matrix in an order that "
    "their names do not tell (must be gate_proj and up_proj, or all experts in one gate_up_proj)",
    r"\.mlp\.gate\.weight$": "another mixture of experts, such as Qwen or DeepSeek",
    r"\.mlp\.experts\.(\d+|gate_up_projs\.\d+)\.": "experts one by one",
    r"layers\.\d+\.mlp\.(gate|up)_proj\.weight$": "a model without experts, such as Llama, Qwen or Mistral",
    r"^(transformer\.)?h\.\d+\.": "a GPT-2 model",
    r"(^|\.)(exp_avg|exp_avg_sq|optimizer)(\.|$)": "the state of an optimizer",
}


def unwrapped(where: str, names: Iterable[str]) -> dict[str, str]:
    """Returns the name of every tensor without what wrappers and trainers put before it.

    Raises ValueError where two tensors come to have the same name.
    """
    names = list(names)
    found = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    for name in names:
        while found[name].startswith(PEFT):
            found[name] = found[name].removeprefix(PEFT)
    short = found.values()
    if any(name.startswith("model.model.") for name in short) and all(n.startswith("model.") for n in short):
        # The model is the attribute `model` of a trainer's module.
        found = {name: other.removeprefix("model.") for name, other in found.items()}
    elif any(name.startswith("layers.") for name in short):
        # The base model was saved, without the class that adds the head.
        found = {name: f"model.{other}" if _of_base(other) else other for name, other in found.items()}
    first: dict[str, str] = {}
    for name, other in found.items():
        if first.setdefault(other, name) != name:
            raise ValueError(f"{where}: holds both {first[other]} and {name}, which are the same tensor")
    return found


def _of_base(name: str) -> bool:
    return name.split(".")[0] in ("layers", "embed_tokens", "norm")


def described(names: Iterable[str]) -> str | None:
    """Returns what the tensors with these names seem to be, where they are known not to be gpt-oss's."""
    names = list(names)
    return next((what for key, what in FOREIGN.items() if any(re.search(key, name) for name in names)), None)
