"""Names of the hand-written kernels, and the setting that replaces them with plain XLA."""

import os

from gptoss_jax.config.base import require

# Environment variable with the same values as the setting, and its former name.
ENVIRONMENT, FORMER_ENVIRONMENT = "GPTOSS_JAX_KERNELS", "GPTOSS_JAX_NATIVE"

# Kernels, and the backends that implement them.
KERNELS = {
    "attention": ("cpu", "gpu", "tpu"),
    "grouped_matmul": ("cpu", "gpu", "tpu"),
    "mxfp4_matmul": ("cpu", "gpu", "tpu"),
    "mxfp4_unpack": ("cpu",),
    "decode_matmul": ("cpu",),
    "decode_experts": ("cpu",),
    "decode_mxfp4_experts": ("cpu",),
    "decode_attention": ("cpu",),
    "swiglu": ("cpu",),
    "rope": ("cpu",),
    "adamw": ("cpu",),
}
ALLOWED = "must be auto, required, unchecked, plain, or plain: and a comma-separated list of " + ", ".join(
    KERNELS
)


def plain_kernels(setting: str, field: str) -> frozenset[str]:
    """Returns the kernels that a setting turns off.

    Args:
      setting: "auto", "required" and "unchecked" turn off none, "plain" all, "plain:NAME,NAME" those named.
      field: the setting's name, for the error message.

    Raises ValueError for any other text.
    """
    if setting in ("auto", "required", "unchecked"):
        return frozenset()
    kind, _, names = setting.partition(":")
    chosen = frozenset(names.split(",")) if setting != "plain" else frozenset(KERNELS)
    require(kind == "plain" and chosen <= KERNELS.keys(), field, setting, ALLOWED)
    return chosen


def kernel_variable() -> str:
    """Returns GPTOSS_JAX_KERNELS. Raises ValueError if it is invalid, or if its former name is set."""
    former = os.environ.get(FORMER_ENVIRONMENT)
    require(former is None, FORMER_ENVIRONMENT, former, f"was renamed; set {ENVIRONMENT}=plain, or unset it")
    setting = os.environ.get(ENVIRONMENT, "auto")
    plain_kernels(setting, ENVIRONMENT)
    return setting
