"""Triton kernels through the lowering for CUDA, which needs no GPU."""

import jax
from jax._src.pallas.triton import lowering


def kernels_for_cuda(monkeypatch, function, *arguments) -> list[str]:
    """The Triton programs of a function for these (abstract) arguments.

    Pallas hands them over without looking whether they are well formed: here they are verified.
    """
    whole, kernels = lowering.lower_jaxpr_to_triton_module, []

    def verified(*args, **kwargs):
        result = whole(*args, **kwargs)
        kernels.append(result.module.operation.get_asm())
        result.module.operation.verify()
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", verified)
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == len(kernels)
    for kernel in kernels:
        # Float32 may not be rounded to TF32 (0) on its way to the tensor cores; 2 is IEEE.
        assert "inputPrecision = tf32" not in kernel and "inputPrecision = 0" not in kernel
    return kernels
