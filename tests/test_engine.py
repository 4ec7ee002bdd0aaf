"""The engine: any load gives the answers of `generate`, slots are freed, prefixes are reused."""

import collections
import dataclasses
import gc
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gptoss_jax.config import LoraConfig, MeshConfig, ModelConfig, RopeScaling
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.inference import prefill, prefix_cache, slots
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.generate import generate, stream_one
from gptoss_jax.inference.sampling_params import SamplingParams, join_parts
from gptoss_jax.model.parameters import parameter_shardings
from gptoss_jax.model.transformer import bind, init_params
from gptoss_jax.parallel.mesh import make_mesh

TOKENIZER = make_tokenizer("bytes")
# Wide enough for answers whose bits do not depend on the load; a block of 64 tokens keeps prompts short.
CONFIG = ModelConfig(
    vocab_size=261,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=12,
    max_position_embeddings=256,
    rope_theta=1000.0,
    rope_scaling=RopeScaling(factor=8.0, beta_fast=2.0, beta_slow=0.25, original_max_position_embeddings=24),
    initializer_range=0.3,
    compute_dtype="float32",
)
CONFIGS = {
    "plain": CONFIG,
    "mxfp4": dataclasses.replace(CONFIG, expert_format="mxfp4"),
    "adapter": dataclasses.replace(CONFIG, lora=LoraConfig(rank=4)),
}
SHARED = [(11 * i + 3) % 256 for i in range(190)]
REQUESTS = [
    ([7], SamplingParams(max_new_tokens=20, logprobs=True)),
    (SHARED[:9], SamplingParams(max_new_tokens=33, temperature=0.9, seed=4, logprobs=True)),
    (SHARED[:70], SamplingParams(max_new_tokens=7, temperature=0.7, top_k=20, top_p=0.9, logprobs=True)),
    (SHARED[:130], SamplingParams(max_new_tokens=25, temperature=1.1, min_p=0.02, seed=9, logprobs=True)),
    (SHARED[:129] + [5, 6], SamplingParams(max_new_tokens=12, logprobs=True, top_logprobs=3)),
    (SHARED, SamplingParams(max_new_tokens=30, temperature=1.0, stop_tokens=range(40), logprobs=True)),
    (SHARED[:50], SamplingParams(max_new_tokens=30, presence_penalty=2, frequency_penalty=1, logprobs=True)),
    (SHARED[:50], SamplingParams(max_new_tokens=9, logit_bias={3: 100, 4: 99}, temperature=1, logprobs=True)),
    (SHARED[:66], SamplingParams(max_new_tokens=5, logprobs=True, prompt_logprobs=True)),
    ([1, 2, 3], SamplingParams(max_new_tokens=40, temperature=1.2, stop_strings=["e", "t"], logprobs=True)),
    (SHARED[:5], SamplingParams(temperature=1, grammar="start: /[a-f]{4,9}/", logprobs=True)),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "BLOCK", 64)
        patch.setattr(prefix_cache, "BLOCK", 64)
        patch.setattr(prefill, "CHUNK_SIZES", (64, 32))
        patch.setattr(prefill, "MIN_CACHE_LEN", 128)
        patch.setattr(slots, "MAX_STEPS", 16)
        jax.clear_caches()
        yield
    jax.clear_caches()


def random_model(config: ModelConfig):
    def one(path, leaf):
        is_b = str(path[-1]).endswith("lora_b']")
        return 0.1 * jax.random.normal(jax.random.key(8), leaf.shape) if is_b else leaf

    return bind(config, jax.tree_util.tree_map_with_path(one, init_params(config, jax.random.key(0))))


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def alone(model):
    """The answer of `generate` to each of REQUESTS alone."""
    return answers_alone(model)


def answers_alone(model):
    return [generate(model, [prompt], params, tokenizer=TOKENIZER)[0] for prompt, params in REQUESTS]


def run(engine: Engine, max_steps: int = 10_000) -> dict:
    """Steps until nothing is left; returns the parts of each request."""
    parts = {}
    while engine.has_work:
        for request, part in engine.step():
            parts.setdefault(request, []).append(part)
        max_steps -= 1
        assert max_steps
    return parts


def answer(engine: Engine, prompt, params):
    request = engine.submit(prompt, params)
    return join_parts(run(engine)[request]), request


@dataclasses.dataclass(frozen=True)
class Arrival:
    step: int
    index: int  # of REQUESTS
    cancelled_after: int | None  # steps


ARRIVALS = st.builds(
    Arrival, st.integers(0, 25), st.integers(0, len(REQUESTS) - 1), st.none() | st.none() | st.integers(0, 12)
)
# Shrinking would take minutes.
QUICKLY = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
SCHEDULES = st.lists(ARRIVALS, min_size=1, max_size=14)


def check_schedule(engine: Engine, schedule: list[Arrival], alone, is_exact: bool) -> None:
    """Holds every answer equal to the one alone, with the same bits if `is_exact`."""
    engine.reset()  # in case that an earlier schedule failed
    submitted, parts, step = {}, {}, 0
    ends = {}
    pending = sorted(schedule, key=lambda one: one.step)
    while pending or engine.has_work:
        while pending and pending[0].step <= step:
            one = pending.pop(0)
            prompt, params = REQUESTS[one.index]
            request = engine.submit(prompt, params)
            submitted[request], parts[request] = one, []
            ends[request] = None if one.cancelled_after is None else step + one.cancelled_after
        for request, end in ends.items():
            if end is not None and end <= step and not request.is_done:
                engine.cancel(request)
        for request, part in engine.step():
            assert not request.is_cancelled
            parts[request].append(part)
        step += 1
        assert step < 5000
    assert engine.num_running == engine.num_waiting == 0
    for request, one in submitted.items():
        expected = alone[one.index]
        if request.is_cancelled:
            tokens = [token for part in parts[request] for token in part.tokens]
            assert tokens == expected.tokens[: len(tokens)]
            continue
        found = join_parts(parts[request])
        if is_exact:
            assert found == expected
        else:
            assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
            np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def engines(model, alone):
    """(reuse, slots) -> an engine that all schedules share, so that prefixes of earlier ones are reused.

    Those that reuse any prefix pause after a frequent token, as at the end of a Harmony message.
    """
    made = {}
    sampled = collections.Counter(token for one in alone for token in one.tokens)

    def get(reuse, num_slots):
        key = reuse, num_slots
        if key not in made:
            made[key] = Engine(model, TOKENIZER, num_slots=num_slots, prefix_reuse=reuse)
            if reuse == "any":
                ((made[key]._pause_token, _),) = sampled.most_common(1)
        return made[key]

    return get


@settings(QUICKLY, max_examples=25)
@given(SCHEDULES, st.sampled_from(["off", "exact", "any"]), st.sampled_from([3, 8]))
def test_answers_do_not_depend_on_the_load(engines, alone, schedule, reuse, num_slots):
    check_schedule(engines(reuse, num_slots), schedule, alone, is_exact=reuse != "any")


@pytest.mark.slow
@pytest.mark.parametrize("form", CONFIGS)
def test_answers_do_not_depend_on_the_load_in_200_schedules(form):
    model = random_model(CONFIGS[form])
    alone = answers_alone(model)
    made = {reuse: Engine(model, TOKENIZER, num_slots=8, prefix_reuse=reuse) for reuse in ("off", "exact")}

    @settings(QUICKLY, max_examples=200)
    @given(SCHEDULES, st.sampled_from(["off", "exact"]))
    def check(schedule, reuse):
        check_schedule(made[reuse], schedule, alone, is_exact=True)

    check()


@pytest.mark.slow
def test_bits_do_not_depend_on_the_load_in_optimized_programs():
    """The same at XLA's usual optimization level, which the tests turn off, and with the usual chunks."""
    code = """
import numpy as np
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams, join_parts
from test_engine import CONFIG, dataclasses, random_model, run
model = random_model(dataclasses.replace(CONFIG, hidden_size=384, max_position_embeddings=2048))
rng = np.random.default_rng(0)
prompts = [rng.integers(0, 256, n).tolist() for n in (1, 30, 33, 100, 140, 400, 600, 1200, 31, 97)]
each = [SamplingParams(max_new_tokens=40, temperature=i % 3 / 2, seed=i, logprobs=True) for i in range(10)]
alone = [generate(model, [prompt], params)[0] for prompt, params in zip(prompts, each)]
for reuse in ("off", "exact", "exact"):
    engine = Engine(model, num_slots=8, prefix_reuse=reuse)
    for _ in range(2):
        requests = [engine.submit(*one) for one in zip(prompts, each)]
        parts = run(engine)
        assert [join_parts(parts[request]) for request in requests] == alone
"""
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": f"{os.path.dirname(__file__)}:{os.getcwd()}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_slot_of_a_cancelled_request_is_free_within_two_calls(model, alone, monkeypatch):
    engine = Engine(model, TOKENIZER, num_slots=1, prefix_reuse="off")
    calls, decode = [], slots.decode
    monkeypatch.setattr(slots, "decode", lambda *args: calls.append(None) or decode(*args))
    params = SamplingParams(max_new_tokens=200)
    running, waiting = engine.submit([7], params), engine.submit(*REQUESTS[1])
    while not running.tokens:
        engine.step()
    engine.cancel(running)
    sent = len(calls)
    parts = []
    while not parts:
        parts = engine.step()
    assert parts[0][0] is waiting and len(calls) <= sent + 2
    assert join_parts([parts[0][1], *run(engine)[waiting]]) == alone[1]
    assert running.is_cancelled and running.finish_reason is None
    engine.cancel(running)  # again, and after the end
    engine.cancel(waiting)
    assert waiting.finish_reason == "length"


def test_cancelled_while_waiting_or_read(model, alone):
    engine = Engine(model, TOKENIZER, num_slots=2, prefix_reuse="off")
    first, same, other, queued = (engine.submit(*REQUESTS[i]) for i in (5, 5, 3, 0))
    engine.step()  # reads a chunk
    assert engine.num_waiting == 4
    engine.cancel(first)
    engine.cancel(queued)
    parts = run(engine)
    assert set(parts) == {same, other}
    assert join_parts(parts[same]) == alone[5] and join_parts(parts[other]) == alone[3]


def test_short_prompts_pass_a_long_one(model):
    engine = Engine(model, num_slots=4, prefix_reuse="off")
    params = SamplingParams(max_new_tokens=1)
    prompts = [SHARED, SHARED[60:120], SHARED[120:130], SHARED[130:140]]
    requests = [engine.submit(prompt, params) for prompt in prompts]
    order = list(run(engine))  # by the first part
    assert order[0] in requests[1:] and order.index(requests[0]) >= 2


def test_equal_prompts_are_read_once(model, monkeypatch):
    engine = Engine(model, num_slots=4, prefix_reuse="off")
    rows, read = [], slots.prefill
    monkeypatch.setattr(slots, "prefill", lambda *a, **k: rows.append(len(a[2])) or read(*a, **k))
    each = [SamplingParams(max_new_tokens=6, temperature=1.0, seed=seed) for seed in range(4)]
    requests = [engine.submit(SHARED[:60], params) for params in each]
    parts = run(engine)
    assert rows == [1]
    found = [join_parts(parts[request]).tokens for request in requests]
    assert found == [generate(model, [SHARED[:60]], params)[0].tokens for params in each]
    assert len(set(map(tuple, found))) > 1


def test_reset_drops_everything(model, alone):
    engine = Engine(model, TOKENIZER, num_slots=1)
    requests = [engine.submit(*REQUESTS[i]) for i in (3, 1)]
    while not requests[0].tokens:
        engine.step()
    engine.reset()
    assert not engine.has_work and all(request.is_cancelled for request in requests)
    assert answer(engine, *REQUESTS[1])[0] == alone[1]
    engine.reset(drop_prefixes=True)
    assert len(engine.prefix_cache) == engine.prefix_cache.num_bytes == 0
    assert answer(engine, *REQUESTS[1])[0] == alone[1]


def test_ctrl_c_in_the_middle_of_a_step(model, alone, monkeypatch):
    engine = Engine(model, TOKENIZER, num_slots=1, prefix_reuse="exact")
    decode = slots.decode

    def interrupted(*args):
        decode(*args)  # its argument is donated, its result lost
        raise KeyboardInterrupt

    monkeypatch.setattr(slots, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream_one(engine, *REQUESTS[3]))
    monkeypatch.setattr(slots, "decode", decode)
    found = join_parts(list(stream_one(engine, *REQUESTS[3])))
    assert found == alone[3]


def test_prompt_logprobs(model, apply_model):
    prompt = SHARED[:70]
    params = SamplingParams(max_new_tokens=2, prompt_logprobs=True, top_logprobs=4)
    (found,) = generate(model, [prompt], params)
    logits = apply_model(CONFIG, init_params(CONFIG, jax.random.key(0)), np.array([prompt]))[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    assert found.prompt_logprobs[0] is None and len(found.prompt_logprobs) == 70
    expected = logprobs[np.arange(69), prompt[1:]]
    np.testing.assert_allclose(found.prompt_logprobs[1:], expected, atol=1e-4)
    assert found.prompt_top_logprobs[0] is None
    for position, best in enumerate(found.prompt_top_logprobs[1:]):
        order = np.argsort(-logprobs[position])[:4]
        assert [token for token, _ in best] == order.tolist()
        np.testing.assert_allclose([one for _, one in best], logprobs[position, order], atol=1e-4)
    (short,) = generate(model, [[5]], params)
    assert short.prompt_logprobs == [None] and short.prompt_top_logprobs == [None]


def test_stop_tokens_are_reported(model, alone):
    prompt, params = REQUESTS[0]
    stop = alone[0].tokens[3]
    first = alone[0].tokens.index(stop)
    found, _ = answer(Engine(model), prompt, dataclasses.replace(params, stop_tokens=[stop]))
    assert (found.tokens, found.finish_reason) == (alone[0].tokens[:first], "stop")
    assert found.stop_token == stop and alone[0].stop_token is None
    silent = dataclasses.replace(params, stop_tokens=[stop], logprobs=False)
    assert answer(Engine(model), prompt, silent)[0].stop_logprob is None
    (kept,) = generate(model, [prompt], dataclasses.replace(params, logprobs=True))
    stopped = dataclasses.replace(params, logprobs=True, stop_tokens=[stop])
    for one in (answer(Engine(model), prompt, stopped)[0], *generate(model, [prompt], stopped)):
        assert [*one.logprobs, one.stop_logprob] == kept.logprobs[: first + 1]
        assert kept.tokens[first] == one.stop_token and kept.stop_logprob is None


@pytest.mark.parametrize("reuse", ["any", "exact", "off"])
def test_a_second_turn_does_not_read_the_first_again(model, monkeypatch, reuse):
    engine = Engine(model, num_slots=2, prefix_reuse=reuse)
    tokens, read = [], slots.prefill
    monkeypatch.setattr(slots, "prefill", lambda *a, **k: tokens.append(int(a[5].sum())) or read(*a, **k))
    params = SamplingParams(max_new_tokens=10, logprobs=True)
    first, request = answer(engine, SHARED[:150], params)
    assert request.cached_tokens == 0 and sum(tokens) == 149
    tokens.clear()
    turn = [*SHARED[:150], *first.tokens, 9, 8, 7]
    second, request = answer(engine, turn, params)
    cached = {"any": 149, "exact": 128, "off": 0}[reuse]
    assert request.cached_tokens == cached and sum(tokens) == 162 - cached
    (expected,) = generate(model, [turn], params)
    assert second.tokens == expected.tokens
    if reuse != "any":
        assert second == expected
    # The same prompt again needs nothing but its last token.
    again, request = answer(engine, turn, params)
    assert request.cached_tokens == (0 if reuse == "off" else 162)
    assert again == second


def test_prefixes_are_reused_within_a_salt(model):
    engine, params = Engine(model), SamplingParams(max_new_tokens=2)
    for salt, cached in (("a", 0), ("b", 0), ("a", 99), ("", 0), ("b", 99)):
        request = engine.submit(SHARED[:100], params, cache_salt=salt)
        run(engine)
        assert request.cached_tokens == cached


def test_prefixes_are_bounded_by_bytes(model):
    engine = Engine(model, prefix_cache_bytes=1)
    found, _ = answer(engine, SHARED[:150], SamplingParams(max_new_tokens=2))
    assert engine.prefix_cache.num_bytes == len(engine.prefix_cache) == 0
    whole = Engine(model)
    answer(whole, SHARED[:150], SamplingParams(max_new_tokens=2))
    size, count = whole.prefix_cache.num_bytes, len(whole.prefix_cache)
    assert count == 3  # two blocks and a tail
    engine = Engine(model, prefix_cache_bytes=size)
    for start in range(12):
        prompt = [start, *SHARED[:149]]
        assert answer(engine, prompt, SamplingParams(max_new_tokens=2))[1].cached_tokens == 0
        assert 0 < engine.prefix_cache.num_bytes <= size and len(engine.prefix_cache) <= count
    # The latest is there, the others are gone.
    assert answer(engine, prompt, SamplingParams(max_new_tokens=2))[1].cached_tokens == 149
    assert answer(engine, [0, *SHARED[:149]], SamplingParams(max_new_tokens=2))[1].cached_tokens == 0


def test_the_end_of_reasoning_is_kept(model):
    """A slot pauses after <|end|>, which here is any frequent token."""
    engine = Engine(model, num_slots=2)
    params = SamplingParams(max_new_tokens=60, temperature=1.0, seed=3, logprobs=True)
    prompt = SHARED[:20]
    (expected,) = generate(model, [prompt], params)
    end = expected.tokens[5]
    last = max(i for i, token in enumerate(expected.tokens[:-1]) if token == end)
    engine._pause_token = end
    other = engine.submit([4, 5], SamplingParams(max_new_tokens=50))
    request = engine.submit(prompt, params)
    parts = run(engine)
    assert join_parts(parts[request]) == expected
    assert len(other.tokens) == 50
    # A prompt that repeats the answer up to that token, and then differs.
    turn = [*prompt, *expected.tokens[: last + 1], 250, 251]
    found, second = answer(engine, turn, params)
    assert second.cached_tokens == 20 + last
    assert found.tokens == generate(model, [turn], params)[0].tokens


def test_harmony_answers_pause_at_the_end_of_messages(model):
    tokenizer = make_tokenizer("bpe:300", lambda: iter(["some text"]))
    end = tokenizer.special_tokens["<|end|>"]
    assert Engine(model, tokenizer)._pause_token == end
    for reuse in ("off", "exact"):
        assert Engine(model, tokenizer, prefix_reuse=reuse)._pause_token is None


@pytest.mark.slow
def test_on_a_mesh():
    config = dataclasses.replace(CONFIG, num_local_experts=6, vocab_size=264)
    params = init_params(config, jax.random.key(0))
    asked = [(p, dataclasses.replace(q, max_new_tokens=5)) for p, q in (REQUESTS[i] for i in (0, 1, 3))]
    expected = [generate(bind(config, params), [p], q)[0] for p, q in asked]
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        engine = Engine(bind(config, placed), num_slots=3)
    assert engine.num_slots == 4
    # The engine sets its own mesh.
    for cached in ([0, 0, 0], [0, 8, 129]):
        requests = [engine.submit(*one) for one in asked]
        parts = run(engine)
        found = [join_parts(parts[request]).tokens for request in requests]
        assert found == [one.tokens for one in expected]
        assert [request.cached_tokens for request in requests] == cached


def test_many_requests_leave_nothing_behind(model):
    engine = Engine(model, num_slots=4, prefix_cache_bytes=200_000)
    rng = np.random.default_rng(0)
    open_requests = []
    for i in range(150):
        prompt = [i % 256, *SHARED[: int(rng.integers(0, 120))]]
        open_requests.append(engine.submit(prompt, SamplingParams(max_new_tokens=int(rng.integers(1, 12)))))
        if rng.random() < 0.4:
            engine.cancel(open_requests.pop(int(rng.integers(len(open_requests)))))
        engine.step()
    run(engine)
    assert all(request.is_done for request in open_requests)
    assert engine._owners == [None] * 4 and not engine._calls and not engine.has_work
    assert engine.prefix_cache.num_bytes <= 200_000
    nodes = [node for node in gc.get_objects() if isinstance(node, prefix_cache._Node) and node.key]
    own = [node for node in nodes if node in engine.prefix_cache._nodes]
    assert len(own) == len(engine.prefix_cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots is 0: must be 1 or more"),
        ({"max_context": 1}, "max_context is 1: must be from 2 to 256, model.max_position_embeddings"),
        ({"max_context": 257}, "max_context is 257: must be from 2 to 256, model.max_position_embeddings"),
        ({"prefix_reuse": "some"}, "prefix_reuse is 'some': must be any, exact or off"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes is -1: must be 0 or more"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Engine(model, **options)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, r"prompt is \[\]: must hold at least one token"),
        ([1, 261], {}, r"prompt\[1\] is 261: a token id must be an integer from 0 to 260"),
        ([1] * 100, {}, "prompt is '100 tokens long': must leave room for a completion; prompt has 100 "
         "tokens and max_context is 100"),
        ([1] * 80, {}, "max_new_tokens is 32: must be at most 20, because prompt has 80 tokens and "
         "max_context is 100"),
        ([1], {"logit_bias": {261: 1}}, r"logit_bias is \[261\]: each token must be .* 0 to 260"),
        ([1], {"grammar": "start: nothing"}, "grammar: .*nothing.*"),
    ],
)  # fmt: skip
def test_bad_requests(model, prompt, params, message):
    engine = Engine(model, TOKENIZER, max_context=100)
    with pytest.raises(ValueError, match=f"^{message}$"):
        engine.submit(prompt, SamplingParams(**params))
    assert not engine.has_work


def test_a_grammar_needs_a_tokenizer(model):
    with pytest.raises(ValueError, match="grammar is 'start: x': must come with a tokenizer"):
        Engine(model).submit([1], SamplingParams(grammar="start: x"))
