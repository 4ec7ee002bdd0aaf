"""XLA flags with which programs compile fast: most of the time of tests goes into compilation."""

import importlib.metadata

# Level 0 halves the time.
FAST_COMPILE = "--xla_backend_optimization_level=0"
# So do the older emitters of fusions, together with no threads. Later versions have only the new ones, so
# both kinds are tested.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
