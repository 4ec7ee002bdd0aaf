"""Names of the hand-written kernels, and the setting that replaces them by plain XLA."""

import os

from gptoss_jax.config.base import require

# The environment variable that takes the same values as the setting, and the one it has replaced.
ENVIRONMENT, FORMER_ENVIRONMENT = "GPTOSS_JAX_KERNELS", "GPTOSS_JAX_NATIVE"

# Each kernel, and the backends that have one.
KERNELS = {
    "attention": ("gpu", "tpu"),
    "grouped_matmul": ("cpu", "gpu", "tpu"),
    "mxfp4_matmul": ("cpu", "gpu", "tpu"),
    "decode_matmul": ("cpu",),
    "decode_experts": ("cpu",),
    "decode_mxfp4_experts": ("cpu",),
    "decode_attention": ("cpu",),
}
ALLOWED = f"must be auto, unchecked, plain, or plain: with some of {', '.join(KERNELS)}, comma-separated"


def plain_kernels(setting: str, field: str) -> frozenset[str]:
    """The kernels that a setting turns off.

    Args:
      setting: "auto" and "unchecked" turn none off, "plain" all, "plain:NAME,NAME" the named ones.
      field: the setting's name, for the error message.

    Raises ValueError for any other text.
    """
    if setting in ("auto", "unchecked"):
        return frozenset()
    kind, _, names = setting.partition(":")
    chosen = frozenset(names.split(",")) if setting != "plain" else frozenset(KERNELS)
    require(kind == "plain" and chosen <= KERNELS.keys(), field, setting, ALLOWED)
    return chosen


def kernel_variable() -> str:
    """The value of GPTOSS_JAX_KERNELS. Raises ValueError for a bad one, and for the variable it replaced."""
    former = os.environ.get(FORMER_ENVIRONMENT)
    require(former is None, FORMER_ENVIRONMENT, former, f"was replaced: set {ENVIRONMENT}=plain, or nothing")
    setting = os.environ.get(ENVIRONMENT, "auto")
    plain_kernels(setting, ENVIRONMENT)
    return setting
