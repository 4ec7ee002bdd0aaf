"""What a model costs: parameters, useful operations for a token, and the share of a chip's peak (MFU).

Only operations that the mathematics asks for count: the experts a token is sent to, the keys its window
lets it see. Recomputation, padding and the masked half of an attention product are cost, not use: they
lower the MFU.
"""

import re

from gptoss_jax.config import SLIDING, ModelConfig

# Dense bfloat16 peaks with float32 accumulation, in FLOP/s, for one device as JAX counts devices. NVIDIA's
# data sheets print many of them with 2:4 sparsity, which is twice the dense number. A pattern must match
# the whole of `device.device_kind`; a name that none matches has no peak, rather than a near one's.
_PEAKS: tuple[tuple[str, float], ...] = (
    # https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x: "Peak compute per chip (bf16)".
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 ?(lite|e)", 918e12),
    # 2,307e12 for a chip, which is two devices in JAX, one for each TensorCore.
    (r"TPU ?7x", 2307e12 / 2),
    # NVIDIA A100 data sheet; the same for SXM and PCIe, 40 and 80 GB.
    (r"NVIDIA A100[- ].*", 312e12),
    # NVIDIA H100 data sheet: 1,979 (SXM), 1,513 (PCIe) and 1,671 (NVL) with sparsity.
    (r"NVIDIA H100 80GB HBM3", 1979e12 / 2),
    (r"NVIDIA H100 PCIe", 1513e12 / 2),
    (r"NVIDIA H100 NVL", 1671e12 / 2),
    # NVIDIA H200 data sheet: 1,979 (SXM) and 1,671 (NVL) with sparsity.
    (r"NVIDIA H200", 1979e12 / 2),
    (r"NVIDIA H200 NVL", 1671e12 / 2),
    # NVIDIA GH200 data sheet: 1,979 with sparsity.
    (r"NVIDIA GH200 .*", 1979e12 / 2),
    # NVIDIA Blackwell architecture brief: 4.5 (HGX B200) and 5 (GB200) PFLOP/s for a GPU with sparsity.
    (r"NVIDIA B200", 4500e12 / 2),
    (r"NVIDIA GB200", 5000e12 / 2),
    # NVIDIA L4, L40S, A10, A30 and A40 data sheets: 242 with sparsity; 362, 125, 165 and 149.7 dense.
    (r"NVIDIA L4", 242e12 / 2),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA A40", 149.7e12),
)


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Numbers of parameters, `(total, active)`; norms, biases and sinks are in both.

    Active are those a token is multiplied with: `num_experts_per_tok` of the experts, and not the input
    embedding, from which a row is only looked up. Tied weights count once, in both, because the head uses
    them. Shapes: MATH.md, "Sizes" and "Forward".
    """
    hidden, width = config.hidden_size, config.intermediate_size
    q_out = config.num_attention_heads * config.head_dim
    kv_out = config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * q_out + 2 * hidden * kv_out
    if config.attention_bias:
        attention += q_out + 2 * kv_out + hidden
    if config.learned_sinks:
        attention += config.num_attention_heads
    router = config.num_local_experts * (hidden + config.router_bias)
    expert = 3 * hidden * width + config.expert_bias * (2 * width + hidden)
    vocabulary = config.vocab_size * hidden

    outside_experts = config.num_hidden_layers * (attention + router + 2 * hidden) + hidden + vocabulary
    experts = config.num_hidden_layers * expert
    total = outside_experts + experts * config.num_local_experts
    active = outside_experts + experts * config.num_experts_per_tok
    return (total if config.tie_word_embeddings else total + vocabulary), active


def mean_visible_keys(config: ModelConfig, layer_type: str, seq_len: int) -> float:
    """How many keys a query sees, on average over the positions of a row of `seq_len` tokens of one document.

    A query at position i sees i + 1 keys in a full layer, and min(i + 1, W + sink_tokens) in a sliding one
    (the first tokens that stay visible add themselves once they have left the window; MATH.md, "Forward").
    """
    most = seq_len
    if layer_type == SLIDING:
        most = min(seq_len, config.sliding_window + config.sink_tokens)
    return (most * (most + 1) / 2 + (seq_len - most) * most) / seq_len


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> float:
    """Useful floating-point operations for one token of a row of `seq_len` tokens, head included.

    Two for each multiply-add of a matrix product: projections, router, active experts, head, and q·k and
    p·v over the keys that are visible on average. Norms, softmax and activations are left out, as is usual.
    Training is three times the forward pass (Kaplan et al. 2020, arXiv:2001.08361, section 2.1: backward is
    twice forward). Rows packed from several short documents need less in attention: this is the cost of one
    document a row.

    Raises ValueError if `seq_len` is below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: must be 1 or more")
    hidden, q_out = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_out = config.num_key_value_heads * config.head_dim
    projections = 2 * hidden * q_out + 2 * hidden * kv_out
    router = hidden * config.num_local_experts
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
    every_layer = config.num_hidden_layers * (projections + router + experts)
    visible = sum(mean_visible_keys(config, kind, seq_len) for kind in config.resolved_layer_types)
    forward = 2 * (every_layer + 2 * q_out * visible + hidden * config.vocab_size)
    return 3.0 * forward if training else float(forward)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one JAX device in FLOP/s, by `jax.devices()[0].device_kind`.

    None for a chip that is not in the table (every CPU, and a slice of a GPU), never that of a similar one.
    """
    if "MIG" in device_kind:
        return None
    return next((peak for name, peak in _PEAKS if re.fullmatch(name, device_kind, re.IGNORECASE)), None)


def mfu(flops_per_second: float, device_kind: str, device_count: int = 1) -> float | None:
    """Model FLOPs utilisation: useful FLOP/s of all devices together over their peak, between 0 and 1.

    Chowdhery et al. 2022, arXiv:2204.02311, appendix B. None where `peak_flops` knows no peak.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_second / (peak * device_count)
