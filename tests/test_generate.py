"""The cache against the plain forward pass, batches against single prompts, and what compiles how often."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import MeshConfig
from gptoss_jax.inference import generate as engine
from gptoss_jax.inference.generate import generate, generate_with_params, stream, stream_with_params
from gptoss_jax.inference.sampling import sample
from gptoss_jax.model.kv_cache import make_cache
from gptoss_jax.model.transformer import with_params
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.sharding import parameter_shardings

PROMPTS = [[5], [11, 3, 96, 0, 7, 8, 9], list(range(40, 63)), [1, 2]]
# With this, any one of them needs a cache of 64: the tests share a few compiled programs.
MOST = 40
GREEDY: dict = {}
SAMPLED = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01}


@pytest.fixture
def any_model(either_config, random_params):
    return either_config, random_params(either_config)


@pytest.fixture
def gpt_oss(tiny_config, random_params):
    return tiny_config, random_params(tiny_config)


@functools.partial(jax.jit, static_argnames="config")
def cached_logits(config, params, cache, tokens_BT, positions_BT):
    model = with_params(config, params)
    hidden_BTD, cache, _ = model.hidden_states(tokens_BT, None, positions_BT, cache=cache)
    return model.logits(hidden_BTD), cache


def test_logits_with_the_cache_equal_those_without(any_model, apply_model):
    config, params = any_model
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (3, 23))
    expected = apply_model(config, params, tokens_BT)
    assert np.std(expected) > 1, "logits too flat to show a mistake"
    for pieces in ([23], [8, 1, 8, 1, 1, 1, 1, 1, 1]):
        cache, got, start = make_cache(config, 3, 29, jnp.float32), [], 0
        for size in pieces:
            positions_BT = np.broadcast_to(np.arange(start, start + size), (3, size))
            logits, cache = cached_logits(
                config, params, cache, tokens_BT[:, start : start + size], positions_BT
            )
            got.append(logits)
            start += size
        # The largest logit sets the scale: that of the rounding in the sums that all of them are.
        error = np.max(np.abs(np.concatenate(got, axis=1) - expected))
        assert error < 1e-5 * np.max(np.abs(expected))


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_the_plain_forward_pass(any_model, apply_model, settings):
    config, params = any_model
    answers = generate_with_params(config, params, PROMPTS, MOST, **settings, seed=9)
    rows_BT = np.zeros((len(PROMPTS), 64), np.int32)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        rows_BT[b, : len(prompt) + MOST] = prompt + answer
    # All at once: if the first t tokens are right, then the logits of the next one are those of a loop.
    logits_BTV = apply_model(config, params, rows_BT)
    for b, prompt in enumerate(PROMPTS):
        keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(9), b), t) for t in range(MOST)]
        logits_TV = logits_BTV[b, len(prompt) - 1 : len(prompt) - 1 + MOST]
        assert answers[b] == sample(logits_TV, jnp.stack(keys), **settings).tolist()
    other = generate_with_params(config, params, PROMPTS, MOST, **settings, seed=10)
    assert (answers == other) == (settings is GREEDY)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_equals_its_prompts_alone(any_model, settings):
    together = generate_with_params(*any_model, PROMPTS, MOST, **settings)
    for b in range(len(PROMPTS)):
        # A sequence's place in the batch is part of its key, so it keeps that; the others are something else.
        others = [prompt if i == b else [0] for i, prompt in enumerate(PROMPTS)]
        assert generate_with_params(*any_model, others, MOST, **settings)[b] == together[b]
    first = generate_with_params(*any_model, PROMPTS[:1], MOST, **settings)
    assert first == together[:1]


def test_a_prompt_in_many_pieces(gpt_oss, monkeypatch):
    # To the very end of the context, whose length is no power of two.
    prompts = [[(7 * i) % 97 for i in range(170)], [4]]
    expected = generate_with_params(*gpt_oss, prompts, max_new_tokens=22)
    monkeypatch.setattr(engine, "LARGEST_PIECE", 16)
    assert generate_with_params(*gpt_oss, prompts, max_new_tokens=22) == expected
    assert [len(answer) for answer in expected] == [22, 22]


def test_stop_tokens(gpt_oss):
    whole = generate_with_params(*gpt_oss, PROMPTS, MOST)
    stops = (whole[1][4], whole[2][0])
    expected = [
        answer[: next((i for i, token in enumerate(answer) if token in stops), MOST)] for answer in whole
    ]
    assert generate_with_params(*gpt_oss, PROMPTS, MOST, stop_tokens=stops) == expected
    assert expected[2] == [] and 0 < len(expected[1]) <= 4
    # More stop tokens than there is room for at first; any token ends its answer at once.
    assert generate_with_params(*gpt_oss, PROMPTS, MOST, stop_tokens=range(97)) == [[], [], [], []]


def test_stream_is_generate_in_parts(gpt_oss):
    model = with_params(*gpt_oss)
    settings = SAMPLED | {"max_new_tokens": MOST, "stop_tokens": (1, 2, 3)}
    expected = generate(model, PROMPTS, **settings)
    chunks = list(stream(model, PROMPTS, **settings))
    assert all(len(part) <= 1 for part in chunks[0])
    assert len(chunks) > 2
    assert [sum(parts, []) for parts in zip(*chunks, strict=True)] == expected
    assert len({len(answer) for answer in expected}) > 1


def test_on_a_mesh(tiny_config, random_params):
    # Three prompts over four shards of the batch; experts and heads are split as well.
    config = dataclasses.replace(tiny_config, num_local_experts=6, vocab_size=98)
    params = random_params(config)
    settings = {"max_new_tokens": 12, "temperature": 1.0, "stop_tokens": (1, 2, 3)}
    expected = generate_with_params(config, params, PROMPTS[:3], **settings)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        assert generate_with_params(config, placed, PROMPTS[:3], **settings) == expected
        with compilations() as programs:
            generate_with_params(config, placed, PROMPTS[1:], **settings)
    assert programs == []


@contextlib.contextmanager
def compilations():
    """Counts what jax compiles; the list holds one entry for each program."""
    events = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_what_compiles(gpt_oss, monkeypatch):
    config, params = gpt_oss
    traces = []

    def counted(*args, **kwargs):
        traces.append(None)
        return with_params(*args, **kwargs)

    monkeypatch.setattr(engine, "with_params", counted)
    with compilations() as programs:
        generate_with_params(config, params, [[1] * 9, [2]], 15, temperature=1.0, top_k=5)
    assert (len(traces), len(programs)) == (2, 3)  # the empty cache, the reader and the decoder
    with compilations() as programs:
        generate_with_params(config, params, [[3] * 17, [4] * 5], 8, temperature=0.5, top_k=90, seed=7)
        list(stream_with_params(config, params, [[1] * 3, [2] * 2], 20, 2, 3, stop_tokens=[6, 7]))
    assert (len(traces), len(programs)) == (2, 0)
    with compilations() as programs:
        generate_with_params(config, params, [[1] * 9, [2]], 15)
    assert (len(traces), len(programs)) == (3, 1)  # greedy is another decoder


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, r"prompts is \[\]: must hold at least one prompt"),
        ([[1], []], {}, r"prompts\[1\] is \[\]: must hold at least one token"),
        ([1, 2], {}, r"prompts\[0\] is 1: must be a sequence of token ids"),
        ([[1], [96, 97]], {}, r"prompts\[1\]\[1\] is 97: a token id must be an integer from 0 to 96"),
        ([[-1]], {}, r"prompts\[0\]\[0\] is -1: a token id must be an integer from 0 to 96"),
        ([[1.5]], {}, r"prompts\[0\]\[0\] is 1.5: a token id must be an integer from 0 to 96"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0: must be 1 or more"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1: must be 0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": 0}, "top_k is 0: must be 1 or more"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0: must be above 0 and at most 1"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1: must be above 0 and at most 1"),
        ([[1]], {"min_p": -0.1}, "min_p is -0.1: must be at least 0 and below 1"),
        ([[1]], {"min_p": 1.0}, "min_p is 1.0: must be at least 0 and below 1"),
        ([[1]], {"seed": -1}, "seed is -1: must be from 0 to 4294967295"),
        ([[1], [1] * 182], {"max_new_tokens": 11}, "max_new_tokens is 11: must be at most 10, because"),
        ([[1] * 192], {}, r"prompts\[0\] has 192 tokens and model.max_position_embeddings is 192"),
    ],
)  # fmt: skip
def test_errors(gpt_oss, prompts, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate_with_params(*gpt_oss, prompts, **settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        stream_with_params(*gpt_oss, prompts, **settings)  # at once, not at the first next
