"""Lowering of Triton kernels for CUDA, which does not need a GPU."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir
from jaxlib.triton import dialect

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))


def kernels_for_cuda(function, *arguments) -> list[str]:
    """The Triton programs of a function for these (abstract) arguments.

    Pallas hands them to XLA without looking whether they are well formed: here they are verified.
    """
    programs, kernels = [], []
    with jax.sharding.use_abstract_mesh(H100):  # newer versions of JAX require the kind of GPU
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))

    def collect(operation):
        if "mhlo.backend_config" in operation.attributes:
            programs.append(operation.attributes["mhlo.backend_config"]["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(collect)
    with ir.Context() as context, ir.Location.unknown():
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        for program in programs:
            kernel = ir.Module.parse(program)
            kernel.operation.verify()
            kernels.append(str(kernel))
    for kernel in kernels:
        # Float32 operands must not be rounded to TF32 (0); 2 is IEEE.
        assert "inputPrecision = tf32" not in kernel and "inputPrecision = 0" not in kernel
    return kernels
