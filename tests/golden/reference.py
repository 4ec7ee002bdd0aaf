"""transformers' GptOssForCausalLM as the reference: eager attention, eager experts. Needs torch, not jax."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, GptOssForCausalLM, Mxfp4Config
from transformers.utils import logging

# More threads than free cores spin at every barrier: on a busy machine, one thread is several times faster.
torch.set_num_threads(1)
logging.disable_progress_bar()


def load(folder: str | os.PathLike, dtype: torch.dtype = torch.float32, packed: bool = False):
    """Loads the model of a folder with all parameters in a dtype; packed experts are dequantized."""
    extra = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    model = GptOssForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", **extra
    )
    # The dequantized matrices are exact in either dtype.
    model = model.to(dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", "eager")
    return model


def logits(model, tokens: np.ndarray, piece: int | None = None) -> np.ndarray:
    """Returns float32 logits [T, V] of one sequence [T], in one pass or, faster, in chunks with its own
    cache."""
    tokens = torch.as_tensor(tokens, dtype=torch.int64)[None]
    with torch.no_grad():
        if piece is None:
            return model(tokens, use_cache=False).logits[0].float().numpy()
        cache, parts = DynamicCache(config=model.config), []
        for part in tokens.split(piece, dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits[0].float())
    return torch.cat(parts).numpy()


def router_gap(model, tokens: np.ndarray) -> float:
    """Returns the smallest distance, over all tokens and layers, between the last expert chosen and the
    first not chosen. If it is within float32 rounding, another implementation may correctly choose
    differently."""
    gaps = []

    def look(module, inputs, outputs):
        top = torch.topk(outputs[0], module.top_k + 1, dim=-1).values
        gaps.append((top[:, -2] - top[:, -1]).min().item())

    hooks = [layer.mlp.router.register_forward_hook(look) for layer in model.model.layers]
    logits(model, tokens, piece=128)
    for hook in hooks:
        hook.remove()
    return min(gaps)


def loss_and_gradients(
    model, tokens: np.ndarray, positions: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the mean cross-entropy of the next tokens of [B, T], and its gradients by published name."""
    tokens, positions = (torch.as_tensor(array, dtype=torch.int64) for array in (tokens, positions))
    model.zero_grad()
    out = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False)
    log_probs = torch.log_softmax(out.logits[:, :-1], dim=-1)
    loss = -log_probs.gather(-1, tokens[:, 1:, None]).mean()
    loss.backward()
    return loss.item(), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def greedy(model, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[np.ndarray, float]:
    """Returns the greedy continuations [B, new_tokens] of one batch, padded on the left, and the smallest
    margin between the best and the second logit, relative to the largest |logit|."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    steps = torch.stack(out.logits).float()
    best, second = torch.topk(steps, 2, dim=-1).values.unbind(-1)
    return out.sequences[:, longest:].numpy(), ((best - second).min() / steps.abs().max()).item()
