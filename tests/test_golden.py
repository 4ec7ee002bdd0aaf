"""The package against arrays computed with transformers (golden/make_golden.py). Does not need torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import ours
from golden.compare import CASES, golden, gradient_error, prompts
from helpers.checkpoints import original_layout, random_checkpoint, weights_digest

from gptoss_jax import from_pretrained
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import get_params

# With "mxfp4", experts stay packed and are dequantized layer by layer.
HELD = [*((name, "float32") for name in CASES), ("mxfp4", "mxfp4")]
# Other numbers of experts per token compile another program; one of them is enough every time.
SLOW = ("top1", "top4")


def cases(*names):
    """Parameters of a test; those of SLOW cases are marked slow."""
    return [pytest.param(*one, marks=pytest.mark.slow) if one[0] in SLOW else one for one in names]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name of a case -> its checkpoint folder."""

    @functools.cache
    def make(name):
        case, arrays = CASES[name], golden(name)
        folder = tmp_path_factory.mktemp(name)
        random_checkpoint(folder, case.experts_per_token, case.form, int(arrays["seed"]), case.dialect)
        assert weights_digest(folder) == arrays["digest"], "these are not the weights of the golden arrays"
        return folder

    return make


@pytest.fixture(scope="module")
def load(checkpoint):
    """(name of a case, format of the experts) -> the model, in float32."""
    return functools.cache(
        lambda name, experts: from_pretrained(checkpoint(name), dtype="float32", experts=experts)
    )


@pytest.mark.parametrize("name, experts", HELD)
def test_logits_before_and_after_position_5000(name, experts, load, record_property):
    arrays = golden(name)
    # Packing does not depend on positions, and a short sequence compiles faster.
    tokens = arrays["tokens"][: None if experts == "float32" else 28]
    kept = arrays["places"] < len(tokens)
    logits = ours.logits(load(name, experts), tokens)[arrays["places"][kept]]
    error = np.abs(logits - arrays["logits"][kept]).max() / arrays["largest"]
    record_property("error", f"{error:.1e}")
    print(f"{name}, experts {experts}: largest difference of a logit / largest logit = {error:.1e}")
    assert error <= 2e-5


@pytest.mark.parametrize(("name",), cases(*((name,) for name in CASES)))
def test_loss_and_the_gradient_of_every_parameter(name, load, record_property):
    arrays = golden(name)
    loss, gradients = ours.loss_and_gradients(load(name, "float32"), arrays["batch"], arrays["positions"])
    assert loss == pytest.approx(float(arrays["loss"]), rel=1e-5)
    assert {f"gradient/{key}" for key in gradients} == {key for key in arrays if key.startswith("gradient/")}
    errors = {key: gradient_error(key, gradient, arrays) for key, gradient in gradients.items()}
    worst = max(errors, key=errors.get)
    record_property("error", f"{errors[worst]:.1e}")
    print(f"{name}: largest relative error of a gradient = {errors[worst]:.1e}, {worst}")
    assert errors[worst] <= 1e-4, worst


@pytest.mark.parametrize("name, experts", cases(*HELD))
def test_greedy_continuations_of_a_ragged_batch(name, experts, load):
    arrays = golden(name)
    expected = arrays["continuations"].tolist()
    params = SamplingParams(max_new_tokens=len(expected[0]))
    answers = [answer.tokens for answer in generate(load(name, experts), prompts(arrays), params)]
    assert answers == expected


@pytest.mark.parametrize("name", ["top2", "mxfp4"])
def test_the_original_layout_gives_the_same_model(name, checkpoint, tmp_path):
    original = from_pretrained(original_layout(checkpoint(name), tmp_path / "original"))
    published = from_pretrained(checkpoint(name))
    assert original.config == published.config
    jax.tree.map(np.testing.assert_array_equal, get_params(original), get_params(published))


@pytest.mark.parametrize("experts", ["bfloat16", "mxfp4"])
def test_parameters_that_stay_bfloat16_decode_in_float32(experts, checkpoint, load):
    """Loaded with defaults, a released checkpoint keeps bfloat16 biases beside float32 activations."""
    arrays = golden("mxfp4")
    params = SamplingParams(max_new_tokens=6)
    model = from_pretrained(checkpoint("mxfp4"), experts=experts)
    assert model.blocks[0].moe.down_bias.get_value().dtype == jnp.bfloat16
    found = [answer.tokens for answer in generate(model, prompts(arrays), params)]
    expected = generate(load("mxfp4", "mxfp4"), prompts(arrays), params)
    assert found == [answer.tokens for answer in expected]
