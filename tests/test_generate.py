"""Answers against the plain forward pass, batches against single prompts, and what compiles how often."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tpu_compiler import BYTES_MADE, needs_libtpu, tpu_devices

from gptoss_jax.checkpoints import load
from gptoss_jax.config import MeshConfig, ModelConfig
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.inference import engine
from gptoss_jax.inference.engine import max_compilations
from gptoss_jax.inference.generate import (
    generate,
    generate_with_params,
    stream,
    stream_with_params,
)
from gptoss_jax.inference.sampling import sample
from gptoss_jax.kernels import backend
from gptoss_jax.model.kv_cache import init_cache
from gptoss_jax.model.parameters import parameter_shardings
from gptoss_jax.model.transformer import bind, init_params
from gptoss_jax.parallel.mesh import make_mesh

PROMPTS = [[5], [11, 3, 96, 0, 7, 8, 9], list(range(40, 63)), [1, 2]]
MOST = 40
GREEDY: dict = {}
SAMPLED = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01}
# One of each kind, in one batch.
MIXED = {
    "temperature": [0.0, 1.2, 0.8, 1.0],
    "top_k": [None, 20, None, None],
    "top_p": [0.5, None, 0.9, None],
    "min_p": [None, None, None, 0.05],
    "seed": [3, 4294967295, 0, 7],
    "max_new_tokens": [40, 3, 17, 1],
}


@pytest.fixture
def any_model(either_config, random_params):
    return either_config, random_params(either_config)


@pytest.fixture
def gpt_oss(tiny_config, random_params):
    return tiny_config, random_params(tiny_config)


def alone(settings: dict, b: int) -> dict:
    """The settings of one prompt of a batch."""
    return {name: value[b] if isinstance(value, list) else value for name, value in settings.items()}


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_the_plain_forward_pass(any_model, apply_model, settings):
    config, params = any_model
    answers = generate_with_params(config, params, PROMPTS, MOST, **settings, seed=9)
    rows_BT = np.zeros((len(PROMPTS), 64), np.int32)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        rows_BT[b, : len(prompt) + MOST] = prompt + answer
    # All at once: if the first t tokens are right, then the logits of the next one are those of a loop.
    logits_BTV = apply_model(config, params, rows_BT)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(9), t) for t in range(MOST)])
    for b, prompt in enumerate(PROMPTS):
        logits_TV = logits_BTV[b, len(prompt) - 1 : len(prompt) - 1 + MOST]
        assert answers[b] == sample(logits_TV, keys, **settings).tolist()
    other = generate_with_params(config, params, PROMPTS, MOST, **settings, seed=10)
    assert (answers == other) == (settings is GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, MIXED], ids=["greedy", "sampled", "mixed"])
def test_a_prompt_has_the_same_answer_alone_and_in_any_batch(any_model, settings):
    settings = {"max_new_tokens": MOST} | settings
    together = generate_with_params(*any_model, PROMPTS, **settings)
    for b, prompt in enumerate(PROMPTS):
        assert generate_with_params(*any_model, [prompt], **alone(settings, b)) == [together[b]]
    order = [2, 0, 3, 1]
    moved = {
        name: [value[b] for b in order] if isinstance(value, list) else value
        for name, value in settings.items()
    }
    answers = generate_with_params(*any_model, [PROMPTS[b] for b in order], **moved)
    assert answers == [together[b] for b in order]
    if settings.get("seed"):
        assert [len(answer) for answer in together] == settings["max_new_tokens"]


@pytest.mark.slow
def test_sixteen_of_the_same_prompt(gpt_oss):
    settings = {"max_new_tokens": 12, "temperature": 1.0}
    seeds = list(range(16))
    answers = generate_with_params(*gpt_oss, [[5, 6]] * 16, **settings, seed=seeds)
    assert len({tuple(answer) for answer in answers}) > 12
    for seed in (0, 9, 15):
        assert generate_with_params(*gpt_oss, [[5, 6]], **settings, seed=seed) == [answers[seed]]


@pytest.mark.slow
def test_a_prompt_in_many_pieces_and_a_cache_that_grows(gpt_oss, monkeypatch):
    # To the very end of the context, whose length is no power of two.
    prompts = [[(7 * i) % 97 for i in range(170)], [4]]
    expected = generate_with_params(*gpt_oss, prompts, max_new_tokens=22)
    assert [len(answer) for answer in expected] == [22, 22]
    monkeypatch.setattr(engine, "PIECES", (16, 4))
    monkeypatch.setattr(engine, "SMALLEST_CACHE", 2)
    monkeypatch.setattr(engine, "STEPS", 5)
    grown = []
    monkeypatch.setattr(engine, "resize", lambda *args: grown.append(args[2]) or GROW(*args))
    jax.clear_caches()
    assert generate_with_params(*gpt_oss, prompts, max_new_tokens=22) == expected
    assert generate_with_params(*gpt_oss, [[4]], max_new_tokens=20) == [expected[1][:20]]
    assert grown == [16, 32]
    jax.clear_caches()


GROW = engine.resize


def test_how_prompts_are_cut():
    def sizes(count, batch=1):
        return [size for _, size in engine._pieces(count, batch)]

    assert sizes(0) == [] and sizes(1) == sizes(32) == [32] and sizes(33) == [32, 32]
    assert sizes(63) == [32, 32] and sizes(64) == sizes(127) == [128] and sizes(200) == [128, 128]
    assert sizes(256) == [512] and sizes(1200) == [512, 512, 128, 32, 32]
    # So many sequences that a piece is shorter.
    assert sizes(300, batch=16) == [128, 128, 32, 32] and sizes(100, batch=500) == [32] * 4
    for count in range(1, 1500):
        pieces = list(engine._pieces(count, 1))
        ends = [start + size for start, size in pieces]
        assert [start for start, _ in pieces] == [0, *ends[:-1]] and ends[-1] >= count > pieces[-1][0]


def test_stop_tokens(gpt_oss):
    whole = generate_with_params(*gpt_oss, PROMPTS, MOST)
    stops = (whole[1][4], whole[2][0])

    def until(answer, stops):
        return answer[: next((i for i, token in enumerate(answer) if token in stops), MOST)]

    expected = [until(answer, stops) for answer in whole]
    assert generate_with_params(*gpt_oss, PROMPTS, MOST, stop_tokens=stops) == expected
    assert expected[2] == [] and 0 < len(expected[1]) <= 4
    # Some for each prompt.
    each = [(), (whole[1][4],), [], range(97)]
    expected = [until(answer, stops) for answer, stops in zip(whole, each, strict=True)]
    assert generate_with_params(*gpt_oss, PROMPTS, MOST, stop_tokens=each) == expected
    # More stop tokens than there is room for at first; any token ends its answer at once.
    assert generate_with_params(*gpt_oss, PROMPTS, MOST, stop_tokens=range(97)) == [[], [], [], []]


def test_stop_strings(tiny_config, random_params, monkeypatch):
    # Four ids that the tokenizer does not know.
    config = dataclasses.replace(tiny_config, vocab_size=261)
    params, tokenizer = random_params(config), make_tokenizer("bytes")
    settings = {"max_new_tokens": MOST, "temperature": 1.0, "tokenizer": tokenizer}
    whole = generate_with_params(config, params, PROMPTS, **settings)
    # Bytes of an answer that are text: one that two tokens make, and one that never comes.
    texts = [tokenizer.decode_bytes([t for t in answer if t < 256]) for answer in whole]
    b, i = next(
        (b, i)
        for b, answer in enumerate(whole)
        for i in range(3, len(answer) - 1)
        if max(answer[i : i + 2]) < 128 and len(texts[b]) == len(answer)
    )
    string = bytes(whole[b][i : i + 2]).decode()
    found = generate_with_params(config, params, PROMPTS, **settings, stop_strings=["never there", string])
    end = texts[b].find(string.encode()) + 2
    assert found[b] == whole[b][:end] and end <= i + 2
    each = [[string] if j == b else [] for j in range(len(PROMPTS))]
    found = generate_with_params(config, params, PROMPTS, **settings, stop_strings=each)
    assert found == [whole[j][:end] if j == b else whole[j] for j in range(len(PROMPTS))]
    chunks = list(stream_with_params(config, params, PROMPTS, **settings, stop_strings=each))
    assert [sum(parts, []) for parts in zip(*chunks, strict=True)] == found
    # A prompt that is done is computed no further.
    calls, decode = [], engine._decode

    def counted(config, params, cache, latest_B, done_B, made, steps, *others):
        calls.append((int(made), int(steps)))
        return decode(config, params, cache, latest_B, done_B, made, steps, *others)

    monkeypatch.setattr(engine, "_decode", counted)
    monkeypatch.setattr(engine, "STEPS", 4)
    jax.clear_caches()
    alone = generate_with_params(config, params, [PROMPTS[b]], **settings, stop_strings=string)
    assert alone == [whole[b][:end]]
    made, steps = calls[-1]
    assert made < end <= made + steps < MOST
    jax.clear_caches()


def test_tokens_that_the_tokenizer_does_not_know(tiny_config, random_params):
    config = dataclasses.replace(tiny_config, vocab_size=261)
    settings = {"max_new_tokens": MOST, "temperature": 5.0, "seed": [0, 1, 2, 3]}
    expected = generate_with_params(config, random_params(config), PROMPTS, **settings)
    assert any(token >= 257 for answer in expected for token in answer)
    settings |= {"stop_strings": "never there", "tokenizer": make_tokenizer("bytes")}
    assert generate_with_params(config, random_params(config), PROMPTS, **settings) == expected


def test_a_stream_of_several_processes_reads_no_clock(monkeypatch):
    # Their clocks differ, and all of them must take the same steps.
    assert (engine._next_steps(4, 0.0), engine._next_steps(4, 9.0)) == (8, 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for steps, expected in ((1, 2), (4, 8), (8, 8)):
        assert engine._next_steps(steps, 0.0) == engine._next_steps(steps, 9.0) == expected


def test_the_tokenizer_of_the_model_s_folder(tiny_config, random_params, tmp_path):
    config = dataclasses.replace(tiny_config, vocab_size=261)
    model = bind(config, random_params(config))
    make_tokenizer("bytes").save(tmp_path)
    by_place = (6, 0.0, None, None, None, (), ["zz"])
    with pytest.raises(ValueError, match="stop_strings is .* must come with the tokenizer"):
        generate(model, [[1]], *by_place)
    model.origin = str(tmp_path)
    expected = generate(model, [[1]], 6)
    assert generate(model, [[1]], *by_place) == expected
    assert [sum(parts, []) for parts in zip(*stream(model, [[1]], *by_place), strict=True)] == expected


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_log_probabilities(gpt_oss, apply_model, settings):
    config, params = gpt_oss
    expected = generate_with_params(config, params, PROMPTS, MOST, **settings)
    answers, scores = generate_with_params(config, params, PROMPTS, MOST, **settings, log_probs=True)
    assert answers == expected
    for prompt, answer, score in zip(PROMPTS, answers, scores, strict=True):
        row_BT = np.zeros((len(PROMPTS), 64), np.int32)
        row_BT[0, : len(prompt) + MOST] = prompt + answer
        logits_TV = apply_model(config, params, row_BT)[0, len(prompt) - 1 : len(prompt) - 1 + MOST]
        wanted = jax.nn.log_softmax(logits_TV)[np.arange(MOST), answer]
        np.testing.assert_allclose(score, wanted, atol=1e-4)
    stops = answers[1][3]
    tokens, scores_until = generate_with_params(
        config, params, PROMPTS, MOST, **settings, log_probs=True, stop_tokens=[stops]
    )
    assert list(map(len, tokens)) == list(map(len, scores_until))
    np.testing.assert_allclose(scores_until[1], scores[1][: len(tokens[1])], atol=1e-5)


def test_stream_is_generate_in_parts(gpt_oss):
    model = bind(*gpt_oss)
    settings = SAMPLED | {"max_new_tokens": MOST, "stop_tokens": range(9)}
    expected = generate(model, PROMPTS, **settings)
    chunks = list(stream(model, PROMPTS, **settings))
    assert all(len(part) <= 1 for part in chunks[0])
    assert len(chunks) > 2
    assert [sum(parts, []) for parts in zip(*chunks, strict=True)] == expected
    assert len({len(answer) for answer in expected}) > 1
    pairs = list(stream(model, PROMPTS, **settings, log_probs=True))
    assert [sum(parts, []) for parts in zip(*(tokens for tokens, _ in pairs), strict=True)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "mxfp4"])
@pytest.mark.parametrize("splits", ["data", "fsdp"])
def test_on_a_mesh(tiny_config, random_params, form, splits):
    # Three prompts over four shards of the batch; experts and heads are split as well. Only what is stored as
    # it is used, without fsdp, is read in its stack.
    config = dataclasses.replace(tiny_config, num_local_experts=6, vocab_size=98)
    if form == "mxfp4":
        config = dataclasses.replace(config, hidden_size=32, intermediate_size=64, expert_format=form)
        params = init_params(config, jax.random.key(0))
    else:
        params = random_params(config)
    settings = {"max_new_tokens": 12, "temperature": 1.0, "stop_tokens": range(20)}
    expected = generate_with_params(config, params, PROMPTS[:3], **settings)
    assert len({len(answer) for answer in expected}) > 1
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, splits: 2}, expert=2, tensor=2))
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        assert generate_with_params(config, placed, PROMPTS[:3], **settings) == expected
        with compilations() as programs:
            generate_with_params(config, placed, PROMPTS[1:], **settings)
    assert programs == []


def test_on_a_mesh_no_device_gets_the_whole_cache(tiny_config, random_params):
    config = dataclasses.replace(tiny_config, num_local_experts=6, vocab_size=98)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    params = random_params(config)
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    zeros_B = np.zeros(4, np.int32)
    arguments = zeros_B, zeros_B > 0, np.int32(0), np.int32(4), zeros_B + 4, zeros_B[:, None] - 1
    with jax.set_mesh(mesh):
        cache = engine._empty_cache(config, 4, 192)
        lowered = engine._decode.lower(
            config, placed, cache, *arguments, zeros_B.astype(np.uint32), {}, False
        )
        text = lowered.compile().as_text()
    # A device has one of two heads of one of four sequences: [2 periods, 1, 1, 192 slots, 8].
    assert "f32[2,1,1,192,8]" in text and "f32[2,4,2,192,8]" not in text


@needs_libtpu
@pytest.mark.parametrize(("topology", "tensor"), [("v5e:2x2", 1), ("v5p:2x2x1", 4)])
def test_on_tpus_no_packed_bytes_are_copied(topology, tensor, monkeypatch):
    """Layers of gpt-oss-20b, placed as `from_pretrained` does, and the whole decoding step."""
    config = ModelConfig(
        vocab_size=1024, num_hidden_layers=6, expert_format="mxfp4", compute_dtype="bfloat16"
    )
    with tpu_devices(topology) as devices, contextlib.ExitStack() as stack:
        if tensor == 1:
            # Without a mesh the default device would be asked.
            monkeypatch.setattr(backend, "platform", lambda: "tpu")
            monkeypatch.setattr(backend, "device_kind", lambda: devices[0].device_kind)
            monkeypatch.setattr(jax, "local_devices", lambda: devices)
            mesh, whole = None, jax.sharding.SingleDeviceSharding(devices[0])
        else:
            mesh = make_mesh(MeshConfig(data=1, tensor=tensor), devices)
            stack.enter_context(jax.set_mesh(mesh))
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = load.load_target(config, mesh, "bfloat16")

        def zeros(*shape, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

        cache = jax.eval_shape(lambda: init_cache(config, 2, 256, jnp.bfloat16))
        cache = jax.tree.map(lambda leaf: zeros(*leaf.shape, dtype=leaf.dtype), cache)
        step = zeros(2), zeros(2, dtype=bool), zeros(), zeros(), zeros(2), zeros(2, 8)
        lowered = engine._decode.lower(config, params, cache, *step, zeros(2, dtype=jnp.uint32), {}, False)
        compiled = lowered.compile()
    text = compiled.as_text()
    # Two products of the experts in each of the two layers of a period.
    assert text.count('custom_call_target="tpu_custom_call"') == 4 and not BYTES_MADE.search(text)


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
        return bind(*args, **kwargs)

    monkeypatch.setattr(engine, "bind", counted)
    jax.clear_caches()
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


@pytest.mark.slow
def test_any_prompts_compile_a_number_of_programs_that_is_known(tiny_config, random_params, monkeypatch):
    config = dataclasses.replace(tiny_config, num_hidden_layers=2, max_position_embeddings=90)
    params = random_params(config)
    monkeypatch.setattr(engine, "SMALLEST_CACHE", 16)
    monkeypatch.setattr(engine, "PIECES", (32, 8, 4))
    assert max_compilations(config, decoders=2) == 4 * (2 + 3 + 2)  # lengths 16, 32, 64, 90
    assert max_compilations(dataclasses.replace(config, max_position_embeddings=131072)) == 14 * (2 + 3 + 1)
    rng = np.random.default_rng(0)
    jax.clear_caches()
    with compilations() as programs:
        done = 0
        while done < 1000:
            # A batch of 13 … 16 is one of 16.
            lengths = rng.integers(1, 80, rng.integers(13, 17))
            prompts = [rng.integers(0, 97, length).tolist() for length in lengths]
            generate_with_params(
                config, params, prompts, int(rng.integers(1, 11)), temperature=float(rng.integers(0, 2))
            )
            done += len(prompts)
    # Nothing else compiles, eager operations included.
    assert 8 <= len(programs) <= max_compilations(config, decoders=2)
    jax.clear_caches()


def test_numbers_of_all_kinds(gpt_oss):
    expected = generate_with_params(*gpt_oss, [[5, 6], [7]], 6, 0.5, seed=3, stop_tokens=[9])
    one_by_one = (np.array(prompt) for prompt in ([5, 6], [7]))
    temperature, seed = jnp.float32(0.5), np.array([3, 3], np.uint32)
    settings = {"temperature": temperature, "seed": seed, "stop_tokens": (jnp.int32(9) for _ in range(1))}
    assert generate_with_params(*gpt_oss, one_by_one, np.array(6), **settings) == expected


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
        ([[1]], {"temperature": "hot"}, "temperature is 'hot': must be 0"),
        ([[1]], {"top_k": 2.5}, "top_k is 2.5: must be 1 or more, or None"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5: must be 1 or more"),
        ([[1], [2]], {"top_p": [0.5, 1.5]}, r"top_p\[1\] is 1.5: must be above 0"),
        ([[1], [2]], {"seed": [1, 2, 3]}, r"seed is \[1, 2, 3\]: must be one value, or 2, one for"),
        ([[1]], {"stop_strings": ""}, r"stop_strings is \[''\]: must hold strings that are not empty"),
        ([[1], [2]], {"stop_strings": [["a"], ["b", ""]]}, r"stop_strings\[1\] is \['b', ''\]: must hold"),
        ([[1], [2]], {"stop_strings": [["a"]]}, r"stop_strings is .*: must be one sequence, or 2, one"),
        ([[1]], {"stop_strings": "a"}, r"stop_strings is \['a'\]: must come with the tokenizer"),
        ([[1]], {"stop_tokens": [1.5]}, r"stop_tokens is \[1.5\]: must hold token ids from 0 to 96"),
        ([[1]], {"stop_tokens": [97]}, r"stop_tokens is \[97\]: must hold token ids from 0 to 96"),
        ([[1]], {"stop_tokens": [2**31]}, r"stop_tokens is \[2147483648\]: must hold token ids"),
        ([[1]], {"stop_tokens": [True]}, r"stop_tokens is \[True\]: must hold token ids"),
        ([[1]], {"stop_tokens": 5}, "stop_tokens is 5: must be a sequence of token ids"),
        ([[1]], {"stop_strings": None}, "stop_strings is None: must be a sequence of strings"),
        ([[1]], {"temperature": 1e300}, "temperature is 1e.300: must be 0 .greedy. or more, and fit in"),
        ([[2**70]], {}, r"prompts\[0\]\[0\] is 1180591620717411303424: a token id must be"),
        ([[[1], [1, 2]]], {}, r"prompts\[0\] is \[\[1\], \[1, 2\]\]: must be a sequence of token ids"),
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
