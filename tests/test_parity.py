"""The package against transformers' GptOssForCausalLM, both run here on the same checkpoints."""

import functools
import json

import numpy as np
import pytest
from helpers.checkpoints import random_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from golden import ours, reference  # noqa: E402
from golden.compare import CASES, golden, prompts, relative  # noqa: E402

from gptoss_jax import from_pretrained, save_pretrained  # noqa: E402
from gptoss_jax.inference.generate import generate  # noqa: E402
from gptoss_jax.inference.sampling_params import SamplingParams  # noqa: E402

pytestmark = pytest.mark.parity

# Tokens per forward pass of transformers, whose attention stores all scores of a pass.
PIECE = 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name of a case -> its checkpoint folder, with the seed of the golden arrays: rounding decides no
    choice of experts."""

    @functools.cache
    def make(name):
        case, seed = CASES[name], int(golden(name)["seed"])
        folder = tmp_path_factory.mktemp(name)
        return random_checkpoint(folder, case.experts_per_token, case.form, seed, case.dialect)

    return make


@pytest.fixture(scope="module")
def theirs(checkpoint):
    """name of a case -> transformers' model in float32."""
    return functools.cache(lambda name: reference.load(checkpoint(name), packed=CASES[name].form == "mxfp4"))


@pytest.fixture
def figure(record_property):
    """Reports a measured value: in the report's properties and, with -rA, in the output."""

    def say(name, value):
        record_property(name, f"{value:.2e}")
        print(f"{name}: {value:.2e}")

    return say


def log_softmax(logits_TV):
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(axis=-1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(axis=-1, keepdims=True))


def mean_kl(p_TV, q_TV):
    """KL(p || q) of the next token in nats, from logits; the mean over tokens."""
    p_TV, q_TV = log_softmax(p_TV), log_softmax(q_TV)
    return np.mean(np.sum(np.exp(p_TV) * (p_TV - q_TV), axis=-1))


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_sequence_past_position_5000(name, checkpoint, theirs, figure):
    tokens = golden(name)["tokens"]
    assert len(tokens) > 5100
    expected = reference.logits(theirs(name), tokens, PIECE)
    # Packed experts stay packed here.
    logits = ours.logits(from_pretrained(checkpoint(name), dtype="float32"), tokens)
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    figure("largest difference / largest logit", error)
    assert error <= 2e-5


@pytest.mark.parametrize("name", CASES)
def test_loss_and_the_gradient_of_every_parameter(name, checkpoint, theirs, figure):
    arrays = golden(name)
    expected_loss, expected = reference.loss_and_gradients(theirs(name), arrays["batch"], arrays["positions"])
    model = from_pretrained(checkpoint(name), dtype="float32", experts="float32")
    loss, gradients = ours.loss_and_gradients(model, arrays["batch"], arrays["positions"])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    errors = {}
    for key, gradient in gradients.items():
        assert gradient.shape == expected[key].shape, key
        errors[key] = relative(np.linalg.norm(gradient - expected[key]), np.linalg.norm(expected[key]))
    worst = max(errors, key=errors.get)
    figure(f"largest relative error, {worst}", errors[worst])
    assert errors[worst] <= 1e-4, worst


@pytest.mark.parametrize("name", CASES)
def test_greedy_continuations_of_a_ragged_batch(name, checkpoint, theirs, figure):
    ragged = prompts(golden(name))
    expected, margin = reference.greedy(theirs(name), ragged, new_tokens=64)
    figure("smallest margin of a token / largest logit", margin)
    model = from_pretrained(checkpoint(name), dtype="float32", experts="float32")
    answers = generate(model, ragged, SamplingParams(max_new_tokens=64))
    assert [answer.tokens for answer in answers] == expected.tolist()


def test_greedy_continuations_of_prompts_around_the_window_size(tmp_path, figure):
    folder = random_checkpoint(tmp_path, 4, "float32", seed=2)
    written = json.loads((folder / "config.json").read_text()) | {"sliding_window": 128}
    (folder / "config.json").write_text(json.dumps(written))
    rng = np.random.default_rng(2)
    lengths = (1, 2, 31, 32, 33, 127, 128, 129, 130, 255, 256, 300, 511, 512, 513, 700)
    ragged = [rng.integers(0, 211, length).tolist() for length in lengths]
    expected, margin = reference.greedy(reference.load(folder), ragged, new_tokens=128)
    figure("smallest margin of a token / largest logit", margin)
    assert len(set(expected.flatten().tolist())) > 40
    answers = generate(from_pretrained(folder), ragged, SamplingParams(max_new_tokens=128))
    assert [answer.tokens for answer in answers] == expected.tolist()


def test_bfloat16_is_as_close_to_float32_as_the_reference_in_bfloat16(checkpoint, theirs, figure):
    # Only a few tokens, because bfloat16 is slow on CPU.
    tokens = golden("top4")["tokens"][:500]
    exact = reference.logits(theirs("top4"), tokens, PIECE)
    rounded = reference.logits(reference.load(checkpoint("top4"), torch.bfloat16), tokens, PIECE)
    logits = ours.logits(from_pretrained(checkpoint("top4"), dtype="bfloat16"), tokens)
    far, their_far = mean_kl(exact, logits), mean_kl(exact, rounded)
    figure("KL(transformers float32 || ours bfloat16)", far)
    figure("KL(transformers float32 || transformers bfloat16)", their_far)
    figure("KL(transformers bfloat16 || ours bfloat16)", mean_kl(rounded, logits))
    assert far <= 1e-3
    assert far <= their_far


@pytest.mark.parametrize("form", ["float32", "bfloat16", "mxfp4"])
def test_a_saved_model_is_the_same_to_transformers_as_its_source(form, tmp_path, figure):
    source = random_checkpoint(tmp_path / "source", 4, form)
    save_pretrained(from_pretrained(source), tmp_path / "saved")
    tokens = golden("top4")["tokens"][:300]
    expected, logits = (
        reference.logits(reference.load(folder, packed=form == "mxfp4"), tokens)
        for folder in (source, tmp_path / "saved")
    )
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "mxfp4"])
def test_transformers_loads_a_model_saved_in_another_format(form, tmp_path, checkpoint, figure):
    held = from_pretrained(checkpoint("top4" if form == "mxfp4" else "mxfp4"))
    save_pretrained(held, tmp_path / "saved", experts=form)
    tokens = golden("top4")["tokens"][:300]
    expected = ours.logits(from_pretrained(tmp_path / "saved", dtype="float32", experts="float32"), tokens)
    logits = reference.logits(reference.load(tmp_path / "saved", packed=form == "mxfp4"), tokens)
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    figure("largest difference / largest logit", error)
    assert error <= 2e-5
