"""Adapters against PEFT's, around transformers' GptOssForCausalLM: logits, gradients and steps of AdamW."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import SIZES, random_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from golden import reference  # noqa: E402

from gptoss_jax import from_pretrained  # noqa: E402
from gptoss_jax.config import DataConfig, LoraConfig, OptimConfig, TrainConfig  # noqa: E402
from gptoss_jax.config.model import LORA_TARGETS  # noqa: E402
from gptoss_jax.model import lora  # noqa: E402
from gptoss_jax.model.parameters import merge_params, split_params  # noqa: E402
from gptoss_jax.model.transformer import abstract_params, bind, get_params  # noqa: E402
from gptoss_jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from gptoss_jax.training.state import create_state  # noqa: E402
from gptoss_jax.training.step import make_train_step  # noqa: E402

pytestmark = pytest.mark.parity

LORA = LoraConfig(rank=7, expert_rank=3, alpha=11.0, targets=LORA_TARGETS)
OPTIM = OptimConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0, max_grad_norm=0.0)
BATCH, LENGTH, STEPS = 2, 40, 10
V = SIZES["vocab_size"]


def published(params) -> dict[str, np.ndarray]:
    """Returns the adapters of a tree by the names and in the layout of PEFT (its "default" adapter)."""
    found, blocks = {}, params["blocks"]

    def add(name, a, b):
        found[f"base_model.model.{name}.lora_A.default.weight"] = np.ascontiguousarray(a)
        found[f"base_model.model.{name}.lora_B.default.weight"] = np.ascontiguousarray(b)

    def of_experts(a_EIr, b_ErO):
        # A has the rows of each expert together, B the columns of each rank.
        a, b = a_EIr.swapaxes(1, 2), b_ErO.transpose(2, 1, 0)
        return a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)

    for layer in range(SIZES["num_hidden_layers"]):
        row = layer // len(blocks)
        block = {
            module: {name: np.asarray(leaf[row]) for name, leaf in values.items()}
            for module, values in blocks[str(layer % len(blocks))].items()
        }
        attention, moe = block["attention"], block["moe"]
        rank, attn, mlp = LORA.rank, f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name in "qkv":
            a, b = attention[f"{name}_lora_a"], attention[f"{name}_lora_b"]
            add(f"{attn}.{name}_proj", a.T, b.reshape(rank, -1).T)
        out_a, out_b = attention["out_lora_a"], attention["out_lora_b"]
        add(f"{attn}.o_proj", out_a.reshape(-1, rank).T, out_b.T)
        add(f"{mlp}.router", moe["router_lora_a"].T, moe["router_lora_b"].T)
        b_ErFP = moe["gate_up_lora_b"].swapaxes(2, 3)
        b = b_ErFP.reshape(*b_ErFP.shape[:2], -1)
        add(f"{mlp}.experts.base_layer", *of_experts(moe["gate_up_lora_a"], b))
        add(f"{mlp}.experts", *of_experts(moe["down_lora_a"], moe["down_lora_b"]))
    add("lm_head", np.asarray(params["head"]["lora_a"]).T, np.asarray(params["head"]["lora_b"]))
    return found


def random_adapters(config):
    rng = np.random.default_rng(3)
    adapters, _ = split_params(abstract_params(config), lora.is_adapter)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32), adapters
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(config with adapters, random adapters, base weights, folder of the base)."""
    folder = random_checkpoint(tmp_path_factory.mktemp("base"), 3, "float32", seed=5)
    base = from_pretrained(folder, dtype="float32")
    config = dataclasses.replace(base.config, lora=LORA)
    return config, random_adapters(config), get_params(base), folder


@pytest.fixture
def theirs(ours):
    """PEFT's model with the same adapters."""
    config, adapters, _, folder = ours
    experts = {f"mlp.experts.{name}": LORA.expert_rank for name in ("gate_up_proj", "down_proj")}
    settings = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
        target_parameters=[*experts, "mlp.router.weight"],
        rank_pattern=experts,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(reference.load(folder), settings)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = published(adapters)
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        name: value.shape for name, value in values.items()
    }
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(torch.as_tensor(values[name]))
    return model, parameters


def tokens_of(seed):
    return np.random.default_rng(seed).integers(0, V, (BATCH, LENGTH + 1))


def their_loss(model, tokens):
    inputs = torch.as_tensor(tokens[:, :-1])
    logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.as_tensor(tokens[:, 1:]).flatten())


def our_batch(tokens):
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((BATCH, LENGTH))}
    batch["positions"] = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
    return {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


def run_ours(ours, seeds):
    """Returns the gradient of the first step (from AdamW's first moment) and the adapters after the last."""
    config, adapters, base, _ = ours
    train = TrainConfig(
        model=config, data=DataConfig(seq_len=LENGTH, batch_size=BATCH), optim=OPTIM, steps=100
    )
    state = create_state(train, make_mesh(MeshConfig(data=1), jax.devices()[:1]), adapters)
    step, gradients = make_train_step(train), None
    for seed in seeds:
        state, _ = step(jax.tree.map(jnp.copy, state), our_batch(tokens_of(seed)), base)
        if gradients is None:
            mean = jax.tree.leaves(state.opt_state, is_leaf=lambda node: hasattr(node, "mu"))
            (mean,) = (node.mu for node in mean if hasattr(node, "mu"))
            gradients = jax.tree.map(lambda m: m / (1 - OPTIM.beta1), mean)
    return published(gradients), published(state.params)


def test_logits_equal_pefts(ours, theirs, record_property):
    config, adapters, base, _ = ours
    model, _ = theirs
    tokens = tokens_of(0)[:, :-1]
    with torch.no_grad():
        expected = model(input_ids=torch.as_tensor(tokens), use_cache=False).logits.numpy()
    params = merge_params(adapters, base)
    found = np.asarray(jax.jit(lambda p, t: bind(config, p)(t))(params, jnp.asarray(tokens, jnp.int32)))
    without = np.asarray(bind(dataclasses.replace(config, lora=None), base)(jnp.asarray(tokens, jnp.int32)))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    record_property("largest difference / largest logit", f"{error:.2e}")
    print(f"logits: {error:.2e}")
    assert error <= 2e-5
    assert np.abs(found - without).max() > 0.05 * np.abs(expected).max()


def test_gradients_and_ten_steps_equal_pefts(ours, theirs, record_property):
    model, parameters = theirs
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=OPTIM.learning_rate,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.epsilon,
        weight_decay=OPTIM.weight_decay,
    )
    # In some batches the gradient of an element is so near zero that rounding decides its sign, and AdamW
    # makes a whole step of it. Not in these.
    seeds = range(301, 301 + STEPS)
    found_gradients, found = run_ours(ours, seeds)
    expected_gradients = None
    for seed in seeds:
        optimizer.zero_grad()
        their_loss(model, tokens_of(seed)).backward()
        if expected_gradients is None:
            expected_gradients = {name: p.grad.numpy().copy() for name, p in parameters.items()}
        optimizer.step()

    def errors(found, expected):
        assert found.keys() == expected.keys()
        norms = {name: np.linalg.norm(found[name] - value) for name, value in expected.items()}
        return {name: norms[name] / np.linalg.norm(value) for name, value in expected.items()}

    gradient_errors = errors(found_gradients, expected_gradients)
    worst = max(gradient_errors, key=gradient_errors.get)
    record_property(f"largest relative error of a gradient, {worst}", f"{gradient_errors[worst]:.2e}")
    print(f"gradients: {gradient_errors[worst]:.2e} {worst}")
    assert gradient_errors[worst] <= 1e-4, worst
    final = {name: p.detach().numpy() for name, p in parameters.items()}
    difference = {name: np.abs(found[name] - value).max() for name, value in final.items()}
    worst = max(difference, key=difference.get)
    moved = max(np.abs(value - published(ours[1])[name]).max() for name, value in final.items())
    print(f"ten steps: {difference[worst]:.2e} {worst}, largest change {moved:.2e}")
    record_property(f"largest difference after ten steps, {worst}", f"{difference[worst]:.2e}")
    assert difference[worst] <= 1e-4 < moved and math.isfinite(moved)
