"""Sampling parameters: values of any kind, and errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.inference.generate import generate, stream
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import bind


@pytest.fixture
def model(tiny_config, random_params):
    return bind(tiny_config, random_params(tiny_config))


def test_numpy_and_jax_values(model):
    def complete(prompts, sampling):
        return [answer.tokens for answer in generate(model, prompts, sampling)]

    sampling = SamplingParams(max_new_tokens=6, temperature=0.5, seed=3, stop_tokens=(9,))
    prompts = (np.array(prompt) for prompt in ([5, 6], [7]))
    other = SamplingParams(
        max_new_tokens=np.array(6),
        temperature=jnp.float32(0.5),
        seed=np.uint32(3),
        stop_tokens=(jnp.int32(9) for _ in range(1)),
    )
    assert other == sampling and hash(other) == hash(sampling)
    assert complete(prompts, other) == complete([[5, 6], [7]], sampling)
    assert SamplingParams(stop_strings="ab").stop_strings == ("ab",)
    assert SamplingParams(stop_tokens=np.array([3, 4])).stop_tokens == (3, 4)
    biased = SamplingParams(logit_bias={np.int32(3): jnp.float32(0.5), 7: -100})
    assert biased == SamplingParams(logit_bias=[[3, 0.5], (7, -100)]) and hash(biased)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: must be above 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: must be an integer"),
        ({"temperature": -0.1}, "temperature is -0.1: must be 0 (greedy) or more, and fit in float32"),
        ({"temperature": 1e300}, "temperature is 1e+300: must be 0 (greedy) or more, and fit in float32"),
        ({"temperature": float("nan")}, "temperature is nan: must be a finite number"),
        ({"temperature": "hot"}, "temperature is 'hot': must be a finite number"),
        ({"temperature": [0.5, 1.0]}, "temperature is (0.5, 1.0): must be a finite number"),
        ({"top_k": 0}, "top_k is 0: must be from 1 to 2147483647, or None"),
        ({"top_k": 1 << 31}, "top_k is 2147483648: must be from 1 to 2147483647, or None"),
        ({"top_k": 2.5}, "top_k is 2.5: must be an integer or None"),
        ({"top_p": 0.0}, "top_p is 0.0: must be above 0 and at most 1, or None"),
        ({"top_p": 1.1}, "top_p is 1.1: must be above 0 and at most 1, or None"),
        ({"min_p": -0.1}, "min_p is -0.1: must be at least 0 and below 1, or None"),
        ({"min_p": 1.0}, "min_p is 1.0: must be at least 0 and below 1, or None"),
        ({"seed": -1}, "seed is -1: must be from 0 to 4294967295"),
        ({"stop_strings": ""}, "stop_strings is ('',): must not contain an empty string"),
        ({"stop_strings": None}, "stop_strings is None: must be a sequence, each item text"),
        ({"stop_tokens": [1.5]}, "stop_tokens is (1.5,): must be a sequence, each item an integer"),
        ({"stop_tokens": [True]}, "stop_tokens is (True,): must be a sequence, each item an integer"),
        ({"stop_tokens": 5}, "stop_tokens is 5: must be a sequence, each item an integer"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1: must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3: must be from -2 to 2"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101: must be from -100 to 100"),
        ({"logit_bias": {-1: 1}}, "token in logit_bias is -1: must be from 0 to 2147483647"),
        ({"logit_bias": [(5, 1), (5, 2)]}, "token in logit_bias is 5: must not occur twice"),
        (
            {"logit_bias": {"5": 1}},
            "logit_bias is (('5', 1),): must be a sequence, each item (an integer, a finite number)",
        ),
        (
            {"logit_bias": dict.fromkeys(range(301), 1)},
            "number of pairs in logit_bias is 301: must be at most 300",
        ),
        ({"grammar": " "}, "grammar is ' ': must not be empty, or None"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs is 21: must be from 0 to 20"),
        ({"top_logprobs": 1}, "top_logprobs is 1: must be 0 without logprobs"),
    ],
)
def test_sampling_params_out_of_range(settings, message):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, r"prompts is \[\]: must hold at least one prompt"),
        ([[1], []], {}, r"prompts\[1\] is \[\]: must hold at least one token"),
        ([1, 2], {}, r"prompts\[0\] is 1: must be a sequence of token ids"),
        ([[1], [96, 97]], {}, r"prompts\[1\]\[1\] is 97: a token id must be an integer from 0 to 96"),
        ([[-1]], {}, r"prompts\[0\]\[0\] is -1: a token id must be an integer from 0 to 96"),
        ([[1.5]], {}, r"prompts\[0\]\[0\] is 1.5: a token id must be an integer from 0 to 96"),
        ([[2**70]], {}, r"prompts\[0\]\[0\] is 1180591620717411303424: a token id must be"),
        ([[[1], [1, 2]]], {}, r"prompts\[0\] is \[\[1\], \[1, 2\]\]: must be a sequence of token ids"),
        ([[1]], {"stop_strings": "a"}, r"stop_strings is \('a',\): must come with a tokenizer"),
        ([[1]], {"stop_tokens": [97]}, r"stop_tokens is \(97,\): each must be an integer from 0 to 96"),
        ([[1]], {"stop_tokens": [2**31]}, r"stop_tokens is \(2147483648,\): each must be an integer from"),
        ([[1], [1] * 182], {"max_new_tokens": 11}, "max_new_tokens is 11: must be at most 10, because"),
        ([[1] * 192], {}, r"prompts\[0\] has 192 tokens and model.max_position_embeddings is 192"),
    ],
)
def test_errors(model, prompts, settings, message):
    sampling = SamplingParams(**settings)
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, prompts, sampling)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        stream(model, prompts, sampling)  # immediately, not at the first `next`


def test_sampling_params_for_each_prompt(model):
    message = "number of sampling params is 3: must be one for all prompts, or 2, one for each"
    with pytest.raises(ValueError, match=message):
        generate(model, [[1], [2]], [SamplingParams()] * 3)
