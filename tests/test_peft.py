"""Adapters against PEFT and transformers: the files of one are read by the other, with equal logits."""

import functools
import json
import warnings

import numpy as np
import pytest
from helpers.adapters import FILES, LORA, random_adapter
from helpers.checkpoints import SIZES
from helpers.weights import logits, tensors_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from golden import reference  # noqa: E402

from gptoss_jax.checkpoints.adapters import read_adapter, write_adapter  # noqa: E402
from gptoss_jax.checkpoints.load import from_pretrained  # noqa: E402
from gptoss_jax.checkpoints.merge import merge  # noqa: E402
from gptoss_jax.config import LoraConfig, ModelConfig  # noqa: E402

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(5).integers(0, SIZES["vocab_size"], (1, 40))
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def base(hf_folder):
    return hf_folder("float32")


def their_logits(model):
    return reference.logits(model, TOKENS[0])


def assert_same_logits(found, expected, without):
    """Asserts a difference of at most 2e-5 of the largest logit, and that the adapter matters."""
    scale = np.abs(expected).max()
    assert np.abs(expected - without).max() > 0.02 * scale
    assert np.abs(found - expected).max() < 2e-5 * scale


@functools.cache
def logits_of_base(folder):
    return logits(from_pretrained(folder), TOKENS)[0]


CASES = {
    "all": LORA,
    "attention": LoraConfig(rank=6, alpha=9.0, targets=("q", "k", "v", "out")),
    "experts": LoraConfig(rank=3, expert_rank=3, rslora=True, targets=("gate_up", "down")),
    "gate_up": LoraConfig(rank=4, expert_rank=2, alpha=1.5, targets=("q", "gate_up")),
    "down": LoraConfig(rank=4, expert_rank=2, targets=("down",)),
    "router": LoraConfig(rank=2, targets=("router",)),
    "head": LoraConfig(rank=2, targets=("head",)),
}


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_is_written(base, tmp_path, name):
    lora = CASES[name]
    config = ModelConfig.from_hf(base)
    write_adapter(random_adapter(config, lora, spread=0.1), config, tmp_path / "adapter", str(base))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(reference.load(base), tmp_path / "adapter").eval()
    # PEFT says that it used no pattern although it did.
    said = [str(one.message) for one in caught if "pattern" not in str(one.message)]
    assert not any("adapter keys" in message for message in said), said
    found = logits(from_pretrained(base, adapter=tmp_path / "adapter"), TOKENS)[0]
    assert_same_logits(found, their_logits(model), logits_of_base(base))
    merge(base, tmp_path / "merged", tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    for key, array in tensors_of(tmp_path / "merged").items():
        theirs = merged[key].numpy()
        np.testing.assert_allclose(array, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max(), err_msg=key)


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=4, lora_alpha=6, target_modules=ATTENTION, target_parameters=EXPERTS),
        dict(r=5, lora_alpha=9, target_modules="all-linear", target_parameters=EXPERTS, rank_pattern={
            "mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 3, "q_proj": 3,
        }, alpha_pattern={"v_proj": 4}, use_rslora=True),
        dict(r=3, lora_alpha=3, target_modules=["q_proj", "lm_head"],
             target_parameters=[*(f"1.{name}" for name in EXPERTS), "mlp.router.weight"]),
        dict(r=2, lora_alpha=4, target_modules=["o_proj"], layers_to_transform=[1, 2],
             target_parameters=["mlp.experts.down_proj"]),
    ],
    ids=["all", "patterns", "some-layers", "down-only"],
)  # fmt: skip
def test_what_peft_writes_is_read(base, tmp_path, settings):
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings)
    model = peft.get_peft_model(reference.load(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    found = logits(from_pretrained(base, adapter=tmp_path / "adapter"), TOKENS)[0]
    assert_same_logits(found, their_logits(model.eval()), logits_of_base(base))
    # Written again, PEFT reads the same function.
    config = ModelConfig.from_hf(base)
    write_adapter(read_adapter(tmp_path / "adapter", config), config, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(reference.load(base), tmp_path / "again").eval()
    assert_same_logits(found, their_logits(again), logits_of_base(base))
    assert json.loads((tmp_path / "again" / FILES[1]).read_text())["peft_type"] == "LORA"


def test_bfloat16_base_and_adapter_of_packed_experts(hf_folder, tmp_path):
    """The released form: PEFT on the dequantized base, the same adapter here on the packed one."""
    folder = hf_folder("mxfp4")
    config = ModelConfig.from_hf(folder)
    write_adapter(random_adapter(config, LORA, spread=0.1), config, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(reference.load(folder, packed=True), tmp_path / "adapter").eval()
    found = from_pretrained(folder, dtype="float32", experts="mxfp4", adapter=tmp_path / "adapter")
    assert_same_logits(logits(found, TOKENS)[0], their_logits(model), logits_of_base(folder))
