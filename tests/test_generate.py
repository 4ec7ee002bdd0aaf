"""Generation: against the plain forward pass, batches against single prompts, meshes, and compilations."""

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
from gptoss_jax.inference import engine, prefill, slots
from gptoss_jax.inference.generate import generate, stream
from gptoss_jax.inference.prefill import max_compilations
from gptoss_jax.inference.sampling import SamplingSettings, sample
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.kernels import backend
from gptoss_jax.model.parameters import parameter_shardings
from gptoss_jax.model.transformer import bind, init_params
from gptoss_jax.parallel.mesh import make_mesh

PROMPTS = [[5], [11, 3, 96, 0, 7, 8, 9], list(range(40, 63)), [1, 2]]
NEW = 40
GREEDY = SamplingParams(max_new_tokens=NEW)
SAMPLED = SamplingParams(max_new_tokens=NEW, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01)
# One of each kind in one batch.
MIXED = [
    SamplingParams(max_new_tokens=40, top_p=0.5, seed=3),
    SamplingParams(max_new_tokens=3, temperature=1.2, top_k=20, seed=4294967295),
    SamplingParams(max_new_tokens=17, temperature=0.8, top_p=0.9),
    SamplingParams(max_new_tokens=1, temperature=1.0, min_p=0.05, seed=7),
]


@pytest.fixture
def any_model(either_config, random_params):
    return either_config, random_params(either_config)


@pytest.fixture
def gpt_oss(tiny_config, random_params):
    return tiny_config, random_params(tiny_config)


def complete(config, params, prompts, sampling=GREEDY, **kwargs) -> list[list[int]]:
    """Returns the tokens of `generate`."""
    return [answer.tokens for answer in generate(bind(config, params), prompts, sampling, **kwargs)]


def join(chunks) -> list[list[int]]:
    """Concatenates the tokens of a stream's chunks."""
    return [sum((part.tokens for part in parts), []) for parts in zip(*chunks, strict=True)]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_match_the_plain_forward_pass(any_model, apply_model, sampling):
    config, params = any_model
    answers = complete(config, params, PROMPTS, dataclasses.replace(sampling, seed=9))
    rows_BT = np.zeros((len(PROMPTS), 64), np.int32)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        rows_BT[b, : len(prompt) + NEW] = prompt + answer
    # In one forward pass: if the first t tokens are right, the next logits are those of a loop.
    logits_BTV = apply_model(config, params, rows_BT)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(9), t) for t in range(NEW)])
    settings = SamplingSettings.of([sampling] * NEW)
    for b, prompt in enumerate(PROMPTS):
        logits_TV = logits_BTV[b, len(prompt) - 1 : len(prompt) - 1 + NEW]
        assert answers[b] == sample(logits_TV, keys, settings).tolist()
    other = complete(config, params, PROMPTS, dataclasses.replace(sampling, seed=10))
    assert (answers == other) == (sampling is GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, MIXED], ids=["greedy", "sampled", "mixed"])
def test_a_prompt_has_the_same_answer_alone_and_in_any_batch(any_model, sampling):
    each = sampling if isinstance(sampling, list) else [sampling] * 4
    together = complete(*any_model, PROMPTS, sampling)
    for prompt, one, answer in zip(PROMPTS, each, together, strict=True):
        assert complete(*any_model, [prompt], one) == [answer]
    order = [2, 0, 3, 1]
    answers = complete(*any_model, [PROMPTS[b] for b in order], [each[b] for b in order])
    assert answers == [together[b] for b in order]
    assert [len(answer) for answer in together] == [one.max_new_tokens for one in each]


@pytest.mark.slow
def test_seeds_distinguish_identical_prompts(gpt_oss):
    each = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed) for seed in range(16)]
    answers = complete(*gpt_oss, [[5, 6]] * 16, each)
    assert len({tuple(answer) for answer in answers}) > 12
    for seed in (0, 9, 15):
        assert complete(*gpt_oss, [[5, 6]], each[seed]) == [answers[seed]]


@pytest.mark.slow
def test_many_prefill_chunks_and_a_growing_cache(gpt_oss, monkeypatch):
    # To the end of the context, whose length is not a power of two.
    prompts, sampling = [[(7 * i) % 97 for i in range(170)], [4]], SamplingParams(max_new_tokens=22)
    expected = complete(*gpt_oss, prompts, sampling)
    assert [len(answer) for answer in expected] == [22, 22]
    monkeypatch.setattr(prefill, "CHUNK_SIZES", (16, 4))
    monkeypatch.setattr(prefill, "MIN_CACHE_LEN", 2)
    monkeypatch.setattr(slots, "MAX_STEPS", 5)
    lengths = []
    monkeypatch.setattr(slots, "grow", lambda *args: lengths.append(args[2]) or GROW(*args))
    jax.clear_caches()
    assert complete(*gpt_oss, prompts, sampling) == expected
    assert complete(*gpt_oss, [[4]], SamplingParams(max_new_tokens=20)) == [expected[1][:20]]
    assert lengths == [192, 16, 32]  # the short prompt gets its slot first
    jax.clear_caches()


GROW = slots.grow


def test_prefill_chunks():
    def sizes(end, position=0):
        return [size for _, size in prefill.chunks(position, end)]

    assert sizes(0) == [] and sizes(1) == sizes(32) == [32] and sizes(33) == [32, 32]
    assert sizes(63) == [32, 32] and sizes(64) == sizes(127) == [128] and sizes(200) == [128, 128]
    assert sizes(256) == [512] and sizes(1200) == [512, 512, 128, 32, 32]
    # After a prefix that was reused, up to the end of its block first.
    assert sizes(1200, position=300) == [128, 128, 512, 128, 32, 32] and sizes(1000, position=512) == [512]
    # Not if no whole block follows: one call is faster than two.
    assert sizes(560, position=480) == [128]
    for position in (0, 1, 300, 512, 700):
        for end in range(position, 1500):
            counts = [count for count, _ in prefill.chunks(position, end)]
            ends = np.cumsum([position, *counts])
            assert ends[-1] == end and all(0 < count <= 512 for count in counts)
            if position % 512 == 0:
                assert set(range(position, end, 512)) <= set(ends.tolist())


def test_groups_of_prompts(tiny_config):
    wide = dataclasses.replace(tiny_config, hidden_size=128)
    # On CPU at most 512 tokens, or with more than 8 slots 4,096.
    assert [prefill.max_prefill_batch(wide, size, 256, num_slots=8) for size in (512, 128, 32)] == [1, 4, 16]
    assert [prefill.max_prefill_batch(wide, size, 256, num_slots=9) for size in (512, 128, 32)] == [
        8,
        32,
        128,
    ]
    assert prefill.max_prefill_batch(wide, 32, 1 << 15, num_slots=8) == 2
    # With explicit sizes, as for a plan: four devices that split the batch; few slots on CPU.
    for count, shards, is_one_cpu, limit in (
        (9, 4, False, 32),
        (8, 4, False, 32),
        (9, 1, True, 8),
        (8, 1, True, 1),
    ):
        sizes = {"shards": shards, "is_one_cpu": is_one_cpu}
        assert prefill.prefill_limit(wide, 512, 256, count, **sizes) == limit
    assert [prefill.prefill_batch(limit, pending) for limit, pending in ((32, 40), (8, 9), (8, 3))] == [
        16,
        4,
        1,
    ]
    assert prefill.max_prefill_batch(tiny_config, 32, 256, num_slots=8) == 1


def test_stop_tokens(gpt_oss):
    whole = complete(*gpt_oss, PROMPTS)
    stops = (whole[1][4], whole[2][0])

    def until(answer, stops):
        return answer[: next((i for i, token in enumerate(answer) if token in stops), NEW)]

    expected = [until(answer, stops) for answer in whole]
    answers = generate(bind(*gpt_oss), PROMPTS, dataclasses.replace(GREEDY, stop_tokens=stops))
    assert [answer.tokens for answer in answers] == expected
    assert expected[2] == [] and 0 < len(expected[1]) <= 4
    reasons = ["length" if len(answer) == NEW else "stop" for answer in expected]
    assert [answer.finish_reason for answer in answers] == reasons
    # Different ones for each prompt; with every token a stop token, the answer ends immediately.
    each = [(), (whole[1][4],), [], range(97)]
    expected = [until(answer, stops) for answer, stops in zip(whole, each, strict=True)]
    assert complete(*gpt_oss, PROMPTS, [dataclasses.replace(GREEDY, stop_tokens=t) for t in each]) == expected
    assert complete(*gpt_oss, PROMPTS, dataclasses.replace(GREEDY, stop_tokens=range(97))) == [[], [], [], []]


def test_stop_strings(tiny_config, random_params, monkeypatch):
    # Four ids unknown to the tokenizer.
    config = dataclasses.replace(tiny_config, vocab_size=261)
    params, tokenizer = random_params(config), make_tokenizer("bytes")
    sampling = SamplingParams(max_new_tokens=NEW, temperature=1.0)
    whole = complete(config, params, PROMPTS, sampling)
    # Stop strings in an answer's text: one that spans two tokens, and one that does not occur.
    texts = [tokenizer.decode_bytes([t for t in answer if t < 256]) for answer in whole]
    b, i = next(
        (b, i)
        for b, answer in enumerate(whole)
        for i in range(3, len(answer) - 1)
        if max(answer[i : i + 2]) < 128 and len(texts[b]) == len(answer)
    )
    string = bytes(whole[b][i : i + 2]).decode()
    both = dataclasses.replace(sampling, stop_strings=["never there", string])
    answers = generate(bind(config, params), PROMPTS, both, tokenizer=tokenizer)
    end = texts[b].find(string.encode()) + 2
    assert answers[b].tokens == whole[b][:end] and end <= i + 2
    assert answers[b].finish_reason == "stop"
    each = [dataclasses.replace(sampling, stop_strings=string if j == b else ()) for j in range(len(PROMPTS))]
    answers = generate(bind(config, params), PROMPTS, each, tokenizer=tokenizer)
    found = [answer.tokens for answer in answers]
    assert found == [whole[j][:end] if j == b else whole[j] for j in range(len(PROMPTS))]
    reasons = ["stop" if j == b else "length" for j in range(len(PROMPTS))]
    assert [answer.finish_reason for answer in answers] == reasons
    assert join(stream(bind(config, params), PROMPTS, each, tokenizer=tokenizer)) == found
    # Found in the last tokens that the prompt may have, while another prompt goes on.
    each[b] = dataclasses.replace(each[b], max_new_tokens=end + 1)
    (*_, answer) = (parts[b] for parts in stream(bind(config, params), PROMPTS, each, tokenizer=tokenizer))
    assert answer.finish_reason == "stop"
    # A finished prompt is not continued, but for a call that was sent before.
    steps, decode = [], slots.decode

    def counted(config, params, state, num_steps, *args):
        steps.append(int(num_steps))
        return decode(config, params, state, num_steps, *args)

    monkeypatch.setattr(slots, "decode", counted)
    monkeypatch.setattr(slots, "MAX_STEPS", 4)
    jax.clear_caches()
    each[b] = dataclasses.replace(each[b], max_new_tokens=NEW)
    assert complete(config, params, [PROMPTS[b]], each[b], tokenizer=tokenizer) == [whole[b][:end]]
    assert end <= sum(steps) <= end + 2 * 4 < NEW
    jax.clear_caches()


def test_tokens_outside_the_tokenizer(tiny_config, random_params):
    config = dataclasses.replace(tiny_config, vocab_size=261)
    each = [SamplingParams(max_new_tokens=NEW, temperature=5.0, seed=seed) for seed in range(4)]
    expected = complete(config, random_params(config), PROMPTS, each)
    assert any(token >= 257 for answer in expected for token in answer)
    each = [dataclasses.replace(one, stop_strings="never there") for one in each]
    tokenizer = make_tokenizer("bytes")
    assert complete(config, random_params(config), PROMPTS, each, tokenizer=tokenizer) == expected


def test_multi_host_streams_ignore_the_clock(monkeypatch):
    # Clocks differ between hosts, which must all take the same steps.
    assert (engine.next_num_steps(4, 4, 0.0), engine.next_num_steps(4, 4, 9.0)) == (8, 2)
    # A call that was shorter than it could have been does not lengthen the next.
    assert (engine.next_num_steps(1, 4, 0.0), engine.next_num_steps(1, 4, 9.0)) == (4, 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for limit, expected in ((1, 2), (4, 8), (8, 8)):
        assert engine.next_num_steps(1, limit, 0.0) == engine.next_num_steps(1, limit, 9.0) == expected


def test_default_tokenizer_is_that_of_the_model_folder(tiny_config, random_params, tmp_path):
    config = dataclasses.replace(tiny_config, vocab_size=261)
    model = bind(config, random_params(config))
    make_tokenizer("bytes").save(tmp_path)
    sampling = SamplingParams(max_new_tokens=6, stop_strings=["zz"])
    with pytest.raises(ValueError, match="stop_strings is .* must come with a tokenizer"):
        generate(model, [[1]], sampling)
    model.origin = str(tmp_path)
    expected = generate(model, [[1]], SamplingParams(max_new_tokens=6))
    assert generate(model, [[1]], sampling) == expected
    assert join(stream(model, [[1]], sampling)) == [expected[0].tokens]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logprobs(gpt_oss, apply_model, sampling):
    config, params = gpt_oss
    expected = generate(bind(*gpt_oss), PROMPTS, sampling)
    sampling = dataclasses.replace(sampling, logprobs=True)
    answers = generate(bind(*gpt_oss), PROMPTS, sampling)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        row_BT = np.zeros((len(PROMPTS), 64), np.int32)
        row_BT[0, : len(prompt) + NEW] = prompt + answer.tokens
        logits_TV = apply_model(config, params, row_BT)[0, len(prompt) - 1 : len(prompt) - 1 + NEW]
        wanted = jax.nn.log_softmax(logits_TV)[np.arange(NEW), answer.tokens]
        np.testing.assert_allclose(answer.logprobs, wanted, atol=1e-4)
    stop = dataclasses.replace(sampling, stop_tokens=[answers[1].tokens[3]])
    # Only prompts that ask for logprobs get them.
    stopped = generate(bind(*gpt_oss), PROMPTS, [dataclasses.replace(stop, logprobs=False), stop, stop, stop])
    assert stopped[0].logprobs is None
    assert all(len(answer.tokens) == len(answer.logprobs) for answer in stopped[1:])
    end = len(stopped[1].tokens)
    np.testing.assert_allclose(stopped[1].logprobs, answers[1].logprobs[:end], atol=1e-5)


def test_stream_is_generate_in_parts(gpt_oss):
    model, sampling = bind(*gpt_oss), dataclasses.replace(SAMPLED, stop_tokens=range(9))
    expected = generate(model, PROMPTS, sampling)
    chunks = list(stream(model, PROMPTS, sampling))
    assert all(len(part.tokens) <= 1 for part in chunks[0])
    assert len(chunks) > 2
    assert join(chunks) == [answer.tokens for answer in expected]
    assert len({len(answer.tokens) for answer in expected}) > 1
    # An answer has a finish reason from its last part on.
    for answer, parts in zip(expected, zip(*chunks, strict=True), strict=True):
        reasons = [part.finish_reason for part in parts]
        first = reasons.index(answer.finish_reason)
        assert reasons == [None] * first + [answer.finish_reason] * (len(parts) - first)
        assert all(part == Completion([], None, answer.finish_reason) for part in parts[first + 1 :])
    with_logprobs = stream(model, PROMPTS, dataclasses.replace(sampling, logprobs=True))
    assert join(with_logprobs) == [answer.tokens for answer in expected]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "mxfp4"])
@pytest.mark.parametrize("splits", ["data", "fsdp", "context"])
def test_on_a_mesh(tiny_config, random_params, form, splits):
    # Three prompts on four shards of the batch; experts and heads are split as well. Weights are only read in
    # their stack if they are stored as they are used, without FSDP.
    config = dataclasses.replace(tiny_config, num_local_experts=6, vocab_size=98)
    if form == "mxfp4":
        config = dataclasses.replace(config, hidden_size=32, intermediate_size=64, expert_format=form)
        params = init_params(config, jax.random.key(0))
    else:
        params = random_params(config)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, stop_tokens=range(20))
    expected = complete(config, params, PROMPTS[:3], sampling)
    assert len({len(answer) for answer in expected}) > 1
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, splits: 2}, expert=2, tensor=2))
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        assert complete(config, placed, PROMPTS[:3], sampling) == expected
        with compilations() as programs:
            complete(config, placed, PROMPTS[1:], sampling)
    assert programs == []


def test_cache_is_sharded_on_a_mesh(tiny_config, random_params):
    config = dataclasses.replace(tiny_config, num_local_experts=6, vocab_size=98)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    params = random_params(config)
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        state = slots.init_slots(config, 4, 192)
        text = slots.decode.lower(config, placed, state, *decode_arguments(state)).compile().as_text()
    # A device has one of two heads of one of four sequences: [2 periods, 1, 1, 192 slots, 8].
    assert "f32[2,1,1,192,8]" in text and "f32[2,4,2,192,8]" not in text


def decode_arguments(state):
    """Returns a number of steps, masks and changes for `slots.decode`."""
    flags_B = np.zeros(len(state.token_B), bool)
    return np.int32(1), np.full(state.requests.stop_mask.shape, -1, np.int32), (flags_B, flags_B)


@needs_libtpu
@pytest.mark.parametrize(("topology", "tensor"), [("v5e:2x2", 1), ("v5p:2x2x1", 4)])
def test_on_tpus_no_packed_bytes_are_copied(topology, tensor, monkeypatch):
    """Layers of gpt-oss-20b, placed as by `from_pretrained`, and the whole decoding step."""
    config = ModelConfig(
        vocab_size=1024, num_hidden_layers=6, expert_format="mxfp4", compute_dtype="bfloat16"
    )
    with tpu_devices(topology) as devices, contextlib.ExitStack() as stack:
        if tensor == 1:
            # Without a mesh the default device would decide.
            monkeypatch.setattr(backend, "platform", lambda: "tpu")
            monkeypatch.setattr(backend, "device_kind", lambda: devices[0].device_kind)
            monkeypatch.setattr(jax, "local_devices", lambda: devices)
            mesh, whole = None, jax.sharding.SingleDeviceSharding(devices[0])
        else:
            mesh = make_mesh(MeshConfig(data=1, tensor=tensor), devices)
            stack.enter_context(jax.set_mesh(mesh))
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = load.load_target(config, mesh, "bfloat16")

        def abstract(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

        state = jax.eval_shape(lambda: slots.init_slots(config, 2, 256))
        arguments = jax.tree.map(abstract, (state, *decode_arguments(state)))
        lowered = slots.decode.lower(config, params, *arguments)
        compiled = lowered.compile()
    text = compiled.as_text()
    # Two expert matmuls in each of the two layers of a period.
    assert text.count('custom_call_target="tpu_custom_call"') == 4 and not BYTES_MADE.search(text)


@contextlib.contextmanager
def compilations():
    """A list with one entry for each program that JAX compiles."""
    events = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_compilations(gpt_oss, monkeypatch):
    config, params = gpt_oss
    traces = []

    def counted(*args, **kwargs):
        traces.append(None)
        return bind(*args, **kwargs)

    monkeypatch.setattr(slots, "bind", counted)
    jax.clear_caches()
    sampling = SamplingParams(max_new_tokens=15, temperature=1.0, top_k=5)
    with compilations() as programs:
        complete(config, params, [[1] * 9, [2]], sampling)
    # An empty row, a prefill, slots, an insertion and the decoder.
    assert (len(traces), len(programs)) == (2, 5)
    other = SamplingParams(max_new_tokens=8, temperature=0.5, top_k=90, seed=7)
    third = SamplingParams(max_new_tokens=20, temperature=2, top_k=3, stop_tokens=range(20))
    with compilations() as programs:
        complete(config, params, [[3] * 17, [4] * 5], other)
        list(stream(bind(config, params), [[1] * 3, [2] * 2], third))
        complete(config, params, [[1] * 9, [2]], SamplingParams(max_new_tokens=15))
    assert (len(traces), len(programs)) == (2, 0)
    asked = SamplingParams(
        max_new_tokens=15, logprobs=True, top_logprobs=3, presence_penalty=1, logit_bias={5: 1}, min_p=0.1
    )
    with compilations() as programs:
        complete(config, params, [[1] * 9, [2]], asked)
    assert (len(traces), len(programs)) == (2, 0)


@pytest.mark.slow
def test_compilations_are_bounded_for_any_prompts(tiny_config, random_params, monkeypatch):
    config = dataclasses.replace(tiny_config, num_hidden_layers=2, max_position_embeddings=90)
    params = random_params(config)
    monkeypatch.setattr(prefill, "MIN_CACHE_LEN", 16)
    monkeypatch.setattr(prefill, "CHUNK_SIZES", (32, 8, 4))
    # Lengths 16, 32, 64 and 90; three chunks, one group, or with 16 slots three.
    assert max_compilations(config) == 4 * (4 + 3 * (1 + 1) + 6) + 4 * 5 // 2
    assert max_compilations(config, 16) == 4 * (4 + 3 * (1 + 3) + 6) + 4 * 5 // 2
    rng = np.random.default_rng(0)
    jax.clear_caches()
    with compilations() as programs:
        done = 0
        while done < 1000:
            # Batches of 13 to 16 are padded to 16.
            lengths = rng.integers(1, 80, rng.integers(13, 17))
            prompts = [rng.integers(0, 97, length).tolist() for length in lengths]
            sampling = SamplingParams(
                max_new_tokens=int(rng.integers(1, 11)), temperature=float(rng.integers(0, 2))
            )
            complete(config, params, prompts, sampling)
            done += len(prompts)
    # Nothing else is compiled, not even eager operations.
    assert 8 <= len(programs) <= max_compilations(config, 16)
    jax.clear_caches()
