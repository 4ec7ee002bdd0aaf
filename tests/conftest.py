"""Eight simulated devices, and fixtures shared by the tests. The sizes of each model all differ.

Markers (`pytest -m`): `slow` tests are deselected by default; `tpu` tests need libtpu and `parity` tests need
torch and transformers, and are skipped without. Tests that need published data skip without it, too: it is
read from `../shared/data`, beside the checkout (`helpers/data.py`), and gpt-oss's vocabulary also from
tiktoken's cache or the network. No other test needs a network or a file outside the checkout.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import os
import pathlib
import shutil
import time

from helpers.xla_flags import FAST_COMPILE

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The caller's flags come last and win.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {FAST_COMPILE} {os.environ.get('XLA_FLAGS', '')}"
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import SIZES, original_layout, random_checkpoint
from helpers.data import SHARED_DATA
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.config import DataConfig, ModelConfig, RopeScaling, TrainConfig
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.kernels.cpu import build
from gptoss_jax.model.parameters import path_names
from gptoss_jax.model.transformer import abstract_params, bind, init_params

# Compiled programs are shared by all processes of a run, and by later runs.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
}
# The files that take longest, in this order. They run first: with two processes, one that is begun last would
# leave the other without work.
LONGEST = [
    "rl", "train", "lora_training", "distributed", "preferences", "fake_quant", "server_answer_grammar",
    "notebooks", "lora_runs", "meshes", "any_path", "lora", "generate", "engine", "packed_training",
    "benchmarks", "plan", "golden", "step", "encoding", "parity", "kv_cache", "lora_parity", "kernel_check",
    "plan_adapters", "memory_table", "startup", "chat_training", "x64",
]  # fmt: skip
# Files that need packages of the extra `test-all`. Without these, they are left out, which the summary says.
TEST_ALL = {
    "test_chat_page.py": ("httpx2", "websockets"),
    "test_harmony_reference.py": ("openai_harmony",),
    "test_notebooks.py": ("nbclient", "nbformat"),
    "test_serve.py": ("httpx2",),
    "test_server_answer_grammar.py": ("jsonschema",),
    "test_server_app.py": ("httpx2", "openai"),
    "test_server_chat.py": ("httpx2", "openai"),
    "test_server_chat_clients.py": ("agents", "langchain_openai", "openai"),
    "test_server_completions.py": ("httpx2", "openai"),
    "test_server_fuzz.py": ("httpx2",),
    "test_server_responses.py": ("httpx2", "openai"),
    "test_server_socket.py": ("httpx2", "openai"),
}
collect_ignore = [
    name for name, modules in TEST_ALL.items() if not all(map(importlib.util.find_spec, modules))
]
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.write_line(
            f"left out, need pip install -e '.[test-all]': {', '.join(collect_ignore)}"
        )


def pytest_configure(config):
    for name, value in COMPILED.items():
        value = os.environ.setdefault(name, str(value))
        jax.config.update(name.lower(), float(value) if name.endswith("SECS") else value)
    for file in COMPILED["JAX_COMPILATION_CACHE_DIR"].glob("*"):
        # Old ones are of code that has changed. Another process may remove them, too.
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > 7 * 86400:
                file.unlink()


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish():
    # Tracing makes many objects: by default, Python searches the thousands of modules imported so far for
    # garbage again and again, for a seventh of the CPU time of `pytest tests/test_step.py`.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """The gpt-oss architecture. YaRN's correction range is 0.37 to 1.58, within the four frequencies."""
    return ModelConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=4,
        max_position_embeddings=192,
        rope_theta=1000.0,
        rope_scaling=RopeScaling(
            factor=8.0, beta_fast=2.0, beta_slow=0.25, original_max_position_embeddings=24
        ),
        initializer_range=0.3,
        compute_dtype="float32",
    )


@pytest.fixture(scope="session")
def notebook_config() -> ModelConfig:
    """The other dialect: tied embeddings, no biases, sink tokens instead of learned sinks, plain SwiGLU, no
    YaRN."""
    return ModelConfig(
        vocab_size=101,
        hidden_size=26,
        intermediate_size=44,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=10,
        num_local_experts=7,
        num_experts_per_tok=2,
        sliding_window=4,
        max_position_embeddings=64,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_bias=False,
        expert_bias=False,
        router_bias=False,
        learned_sinks=False,
        sink_tokens=2,
        swiglu_alpha=1.0,
        swiglu_limit=None,
        swiglu_up_offset=0.0,
        tie_word_embeddings=True,
        initializer_range=0.3,
        compute_dtype="float32",
    )


@pytest.fixture(scope="session", params=["tiny_config", "notebook_config"])
def either_config(request) -> ModelConfig:
    return request.getfixturevalue(request.param)


@functools.cache
def _random_params(config: ModelConfig, seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = path_names(path)[-1]
        spread = 1.0 if name == "sinks" else 0.3
        return jnp.asarray((name == "scale") + spread * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config))


@pytest.fixture(scope="session")
def random_params():
    """(config, seed=0) -> random parameters, even norms, biases and sinks, with logits far from uniform."""
    return lambda config, seed=0: _random_params(config, seed)


@functools.cache
def _apply(config: ModelConfig):
    return jax.jit(lambda params, *inputs: bind(config, params)(*inputs))


@pytest.fixture(scope="session")
def apply_model():
    """(config, params, tokens, segment ids, positions) -> NumPy logits; compiled once per config."""
    return lambda config, params, *inputs: np.asarray(_apply(config)(params, *inputs))


@pytest.fixture(scope="session")
def harmony(tmp_path_factory):
    """gpt-oss's tokenizer: from `shared/data`, else as tiktoken finds it; skips without either."""
    ranks = SHARED_DATA / "tokenizer" / "encodings" / "o200k_base.tiktoken"
    with pytest.MonkeyPatch.context() as patch:
        if ranks.is_file():
            cache = tmp_path_factory.mktemp("tiktoken")
            shutil.copy(ranks, cache / hashlib.sha1(RANKS_URL.encode()).hexdigest())
            patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        try:
            tokenizer = make_tokenizer("o200k_harmony")
        except ValueError as error:
            pytest.skip(f"needs o200k_base.tiktoken: {error}")
        yield tokenizer


@pytest.fixture(params=["native", "plain"])
def cpu_form(request, monkeypatch):
    """Runs a test with the C++ kernels, if they can be compiled, and as on a machine without a compiler."""
    if request.param == "plain":
        monkeypatch.setattr(build, "is_available", lambda: False)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """(form) -> a Hugging Face folder shared by all tests; to change one, use `edited_folder`."""

    @functools.cache
    def make(form):
        return random_checkpoint(tmp_path_factory.mktemp(form), 3, form)

    return make


@pytest.fixture(scope="session")
def original_folder(hf_folder, tmp_path_factory):
    """(form) -> a folder with only `original/`, the weights of `hf_folder(form)`."""

    @functools.cache
    def make(form):
        folder = tmp_path_factory.mktemp(f"original-{form}")
        original_layout(hf_folder(form), folder / "original")
        return folder

    return make


@pytest.fixture
def edited_folder(hf_folder, tmp_path):
    """(form, edit) -> a copy of `hf_folder(form)`, after `edit` changed its dict of tensors."""

    def make(form, edit=lambda tensors: None):
        folder = shutil.copytree(hf_folder(form), tmp_path / f"copy-{form}")
        tensors = {name: array.copy() for name, array in load_file(folder / "model.safetensors").items()}
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def divisible_folder(tmp_path_factory):
    """(form) -> a Hugging Face folder whose sizes are divisible by every axis of a 2 × 2 × 2 mesh."""

    @functools.cache
    def make(form):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIZES, "vocab_size", 212)
            patch.setitem(SIZES, "num_local_experts", 10)
            return random_checkpoint(tmp_path_factory.mktemp(f"divisible-{form}"), 3, form)

    return make


@pytest.fixture(scope="session")
def run_folder(tiny_config, tmp_path_factory):
    """A run folder as train.py leaves it: config, tokenizer, one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    model = dataclasses.replace(tiny_config, vocab_size=257)
    TrainConfig(model=model, data=DataConfig(seq_len=64), run_dir=str(folder)).save(folder / "config.json")
    make_tokenizer("bytes").save(folder)
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, init_params(model, jax.random.key(0)), {"step": jnp.array(3)}, {"step": 3})
    checkpoints.close()
    return folder
