"""Reinforcement learning: advantages and losses by hand, prompts, rewards, rollouts, meshes and runs."""

import dataclasses
import functools
import json
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.objectives import (
    MODEL,
    OPTIM,
    V,
    mesh_of,
    params_on,
    plain_log_probs,
    start_params,
    steps_on,
    train_on_chat,
)
from helpers.params import assert_close
from helpers.processes import ROOT, start_all, start_one, wait_for_exit
from helpers.weights import leaves

from gptoss_jax.checkpoints.export import save_pretrained
from gptoss_jax.cli import main
from gptoss_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.config.preset import flags_of, read_preset, with_settings
from gptoss_jax.data import stdlib_chat
from gptoss_jax.data.batches import ADVANTAGES, SAMPLED_LOG_PROBS, usable_prompts
from gptoss_jax.data.chat_rows import RowError
from gptoss_jax.data.chat_statistics import summary
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.data.prompt_rows import expected_answer, read_prompt
from gptoss_jax.data.token_cache import build_cache
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.model import lora
from gptoss_jax.model.parameters import merge_params, split_params
from gptoss_jax.model.transformer import bind, init_params, segment_positions
from gptoss_jax.training.loop import train
from gptoss_jax.training.metrics import StepTimer, read_metrics
from gptoss_jax.training.preferences import without_adapters
from gptoss_jax.training.rewards import Answer, Reward, RewardError, load_rewards
from gptoss_jax.training.rl import DIFFERENCE, group_advantages, grpo_objective, grpo_terms
from gptoss_jax.training.rollout_rows import Sample, make_rows
from gptoss_jax.training.rollouts import RolloutFeed
from gptoss_jax.training.state import create_state
from gptoss_jax.training.step import make_train_step

B, T = 8, 24
GRPO = GrpoConfig(("format",), group_size=4, max_new_tokens=8, epsilon=0.1, epsilon_high=0.3, beta=0.2)


# Formulas.


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0, 0, 1], [2, 2, 2, 2], [0, 0, 0, 4]])
    centered = [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-1, -1, -1, 3]]
    np.testing.assert_allclose(group_advantages(rewards, "none"), centered, atol=1e-12)
    # Sample standard deviations: the root of 4 / 4 / 3 = 1 / 3, and that of (1 + 1 + 1 + 9) / 3 = 4.
    stds = np.array([[math.sqrt(1 / 3)], [0], [2]])
    np.testing.assert_allclose(group_advantages(rewards), np.array(centered) / (stds + 1e-4), atol=1e-12)
    # Whose mean is not exactly 0.1.
    assert not group_advantages(np.full((1, 3), 0.1)).any()


def test_terms_by_hand():
    config = GrpoConfig(("format",), epsilon=0.2, epsilon_high=0.3)
    # Ratios 1, 1.5 and 0.5, each with a good and with a bad answer.
    now = jnp.log(jnp.array([0.2, 0.3, 0.1] * 2))
    sampled = jnp.log(jnp.array([0.2] * 6))
    terms = grpo_terms(config, now, sampled, jnp.array([2.0] * 3 + [-2.0] * 3))
    np.testing.assert_allclose(terms["loss"], [-2, -2.6, -1, 2, 3, 1.6], rtol=1e-6)
    np.testing.assert_array_equal(terms["clip_ratio"], [0, 1, 0, 0, 0, 1])
    np.testing.assert_allclose(terms["entropy"], -np.log([0.2, 0.3, 0.1] * 2), rtol=1e-6)
    expected = [0, math.log(1.5), math.log(2)] * 2
    np.testing.assert_allclose(terms[DIFFERENCE], expected, rtol=1e-5, atol=1e-7)
    assert "kl" not in terms

    # The ratio of a token of a bad answer is limited, without a gradient beyond.
    def loss(log_prob):
        return grpo_terms(config, log_prob, jnp.log(0.01), jnp.array(-1.0))["loss"]

    for ratio, expected in ((2.9, 2.9), (3.5, 0.0)):
        value, slope = jax.value_and_grad(loss)(jnp.log(0.01 * ratio))
        assert float(value) == pytest.approx(min(ratio, 3), rel=1e-5)
        assert float(slope) == pytest.approx(expected, rel=1e-5)
    # q / p - log(q / p) - 1 with q / p = 2.
    config = dataclasses.replace(config, beta=0.5)
    terms = grpo_terms(config, jnp.log(0.1), jnp.log(0.1), jnp.array(1.0), jnp.log(0.2))
    assert float(terms["kl"]) == pytest.approx(1 - math.log(2), rel=1e-6)
    assert float(terms["loss"]) == pytest.approx(-1 + 0.5 * (1 - math.log(2)), rel=1e-6)


def make_batch(seed=0):
    """Rows of two answers, one, and none, with prompts; padding at the end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    segments, weights = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
    advantages = np.zeros((B, T), np.float32)
    for row in range(B):
        start = 0
        for segment in range(1, 1 + (2, 1, 0, 2)[row % 4]):
            prompt, answer = rng.integers(1, 5), rng.integers(1, 7)
            segments[row, start : start + prompt + answer] = segment
            weights[row, start + prompt : start + prompt + answer] = 1
            advantages[row, start + prompt : start + prompt + answer] = rng.standard_normal()
            start += prompt + answer
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    batch |= {"positions": segment_positions(batch["segment_ids"]), "loss_weights": jnp.asarray(weights)}
    # About those of the model, so that some ratios are clipped and some are not.
    sampled = plain_log_probs(bind(MODEL, start_params()), batch)
    sampled += jnp.asarray(0.3 * rng.standard_normal((B, T)), jnp.float32)
    return batch | {ADVANTAGES: jnp.asarray(advantages), SAMPLED_LOG_PROBS: sampled}


def make_config(**changes):
    values = {
        "model": MODEL,
        "objective": "grpo",
        "grpo": GRPO,
        "data": DataConfig("stdlib-prompts", seq_len=T, batch_size=B),
        "optim": OPTIM,
        "steps": 20,
    }
    return TrainConfig(**(values | changes))


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_loss_gradients_and_metrics_match_the_formulas(beta):
    config, batch = make_config(grpo=dataclasses.replace(GRPO, beta=beta)), make_batch()
    adapters, frozen = split_params(jax.tree.map(jnp.asarray, start_params()), lora.is_adapter)
    objective = grpo_objective(config)
    weight = objective.weight(batch)
    assert float(weight) == float(jnp.sum(batch["loss_weights"])) > 20

    def found(adapters):
        sums, _ = objective.sums(bind(MODEL, merge_params(adapters, frozen)), batch)
        return sums["loss"] / weight, sums

    def by_hand(adapters):
        model = bind(MODEL, merge_params(adapters, frozen))
        log_p = plain_log_probs(model, batch)
        reference = jax.lax.stop_gradient(plain_log_probs(without_adapters(model), batch))
        total, clipped, divergence = 0.0, 0, 0.0
        for row, position in np.argwhere(np.asarray(batch["loss_weights"]) > 0):
            ratio = jnp.exp(log_p[row, position] - batch[SAMPLED_LOG_PROBS][row, position])
            advantage = batch[ADVANTAGES][row, position]
            other = jnp.clip(ratio, 0.9, 1.3)
            total -= jnp.minimum(ratio * advantage, other * advantage)
            clipped += (ratio != other) & (ratio * advantage > other * advantage)
            change = reference[row, position] - log_p[row, position]
            divergence += jnp.exp(change) - change - 1
        return (total + beta * divergence) / weight, (clipped, divergence)

    (loss, sums), gradients = jax.jit(jax.value_and_grad(found, has_aux=True))(adapters)
    (expected, (clipped, kl)), expected_gradients = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(
        adapters
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradients, expected_gradients, 1e-5)
    assert 0 < float(sums["clip_ratio"]) == float(clipped) < float(weight)
    assert float(sums["kl"]) == pytest.approx(float(kl), rel=1e-4) if beta else "kl" not in sums
    difference = jnp.abs(plain_log_probs(bind(MODEL, start_params()), batch) - batch[SAMPLED_LOG_PROBS])
    most = jnp.max(jnp.where(batch["loss_weights"] > 0, difference, 0))
    assert float(sums[DIFFERENCE]) == pytest.approx(float(most), abs=1e-5)


MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2 x expert 4": MeshConfig(data=2, expert=4),
    "data 2 x context 2 x tensor 2": MeshConfig(data=2, context=2, tensor=2),
    "fsdp 2 x expert 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


def step_on(mesh_config, grad_accum_steps=1):
    """Returns the metrics of a step, and its gradient."""
    (row,), gradients = steps_on(mesh_config, make_config(), [make_batch()], grad_accum_steps)
    return row, gradients


alone = functools.cache(functools.partial(step_on, None))


@pytest.mark.parametrize(
    ("mesh", "grad_accum_steps"),
    [
        (None, 4),
        *(pytest.param(name, 1, marks=() if "context" in name else pytest.mark.slow) for name in MESHES),
    ],
)
def test_meshes_and_microbatches_train_like_one_device(mesh, grad_accum_steps):
    metrics, gradients = step_on(MESHES.get(mesh), grad_accum_steps)
    expected, expected_gradients = alone()
    for name in ("loss", "entropy", "clip_ratio", "kl", DIFFERENCE, "grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert_close(gradients, expected_gradients, 1e-5)


# Prompts.

ASK = {"role": "user", "content": "Two plus two?"}
ANSWER = {"role": "assistant", "content": "Four."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Two plus two?", "solution": 4},
        {"prompt": "Two plus two?", "chosen": "Four.", "answer": None},
        {"prompt": [ASK]},
        {"prompt": [ASK], "messages": [ASK, ANSWER]},
        {"messages": [ASK]},
        {"messages": [ASK, ANSWER]},
        {"question": "Two plus two?", "answer": "Four."},
        {"query": "Two plus two?"},
        {"problem": "Two plus two?", "solution": "4"},
        {"prompt": [ASK, ANSWER]},
        {"instruction": "Two plus two?"},
        {"conversations": [{"from": "human", "value": "Two plus two?"}]},
        {"conversations": [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}]},
    ],
)
def test_forms_of_prompts(row):
    assert [one.message.text for one in read_prompt(row)][1:] == ["Two plus two?"]


def test_prompt_with_history_tools_and_instructions():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    row = {"prompt": [{"role": "system", "content": "Be brief."}, ASK, ANSWER, ASK], "tools": [tool]}
    messages = [one.message for one in read_prompt(row, "high")]
    assert [one.role for one in messages] == ["system", "developer", "user", "assistant", "user"]
    assert "Reasoning: high" in messages[0].text
    assert "Be brief." in messages[1].text and "type add" in messages[1].text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "its fields are text: must be prompt, messages, conversations, question, query, "),
        ({}, "its fields are none: must be prompt"),
        ({"prompt": 3}, "prompt is an int: must be text"),
        ({"prompt": ""}, "prompt is missing"),
        ({"messages": []}, "has no user message"),
        ({"messages": "a"}, "messages is a str: must be a list"),
    ],
)
def test_rows_without_a_prompt(row, message):
    with pytest.raises(RowError, match=f"^{re.escape(message)}"):
        read_prompt(row)


def test_expected_answers():
    assert expected_answer({"answer": " 4 ", "solution": "5"}) == "4"
    assert expected_answer({"solution": 4}) == "4" and expected_answer({"completion": "4"}) == "4"
    assert expected_answer({"messages": [ASK, ANSWER]}) == "Four."
    assert expected_answer({"conversations": [{"from": "gpt", "value": "4"}]}) == "4"
    assert expected_answer({"messages": [ASK]}) is None and expected_answer({"answer": None}) is None
    assert (
        expected_answer({"answer": " ", "solution": 4}) == "4" and expected_answer({"answer": True}) is None
    )


def test_standard_library_prompts(tmp_path):
    functions = "".join(f'def f{i}(x):\n    """Returns animal number {i} now."""\n' for i in range(40))
    (tmp_path / "zoo.py").write_text(f'"""Animals and their keepers."""\n{functions}')
    rows = list(stdlib_chat.prompt_rows(tmp_path, ["zoo.py"]))
    assert len(rows) == 41
    for row in rows:
        assert re.match(r"In five words: \w+ .*`zoo", row["prompt"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixty prompts, and two rows that cannot be used."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i, "tags": ["sum", {"of": i}]} for i in range(60)]
    rows[10:10] = [{"text": "a"}, {"prompt": ""}]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        f"prompts:{path}", "bpe:300", seq_len=320, batch_size=8, val_fraction=0.2,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip


def test_cache_of_prompts(source):
    cache = build_cache(source)
    assert cache.is_prompts and not cache.is_pairs and cache.weights.sum() == 0
    assert len(cache.held_out) == 60 and 8 <= cache.held_out.sum() <= 16
    harmony = Harmony(cache.tokenizer)
    for document in range(60):
        tokens = cache.tokens[cache.offsets[document] : cache.offsets[document + 1]].tolist()
        text = harmony.spelled_text(tokens)
        asked = f"<|start|>user<|message|>What is {document} + {document}?<|end|><|start|>assistant"
        assert text.endswith(asked) and text.startswith("<|start|>system<|message|>You are ChatGPT")
        row = cache.row(document)
        assert row["answer"] == 2 * document and row["tags"] == ["sum", {"of": document}]
        line = 1 + document + (2 if document >= 10 else 0)
        assert cache.where(document) == f"{source.source.removeprefix('prompts:')}:{line}"
    lines = summary(cache, source)
    assert lines[0] == "rows: 60 of 62 used: 60 with prompts"
    assert lines[1].startswith(f"prompts: 60, {cache.held_out.sum()} of them held out; ")
    assert "empty message 1" in lines[2] and "unknown format 1" in lines[2]


def test_prompts_that_are_too_long_are_left_out(source):
    cache = build_cache(source)
    lengths = np.diff(cache.offsets)
    longest = int(np.median(lengths))
    chosen = usable_prompts(cache, longest, held_out=False)
    assert chosen.tolist() == [i for i in range(60) if lengths[i] <= longest and not cache.held_out[i]]
    message = f"is 9: no training prompt fits; the shortest has {lengths[~cache.held_out].min()} tokens"
    with pytest.raises(ValueError, match=message):
        usable_prompts(cache, 9, held_out=False)


# Rewards.


@pytest.fixture(scope="module")
def harmony():
    return Harmony(make_tokenizer("bpe:300", lambda: ["the answer is 42, or five words of it"]))


def answer_of(harmony, text):
    return Answer.of(harmony, answer_of_tokens(harmony, text))


def answer_of_tokens(harmony, text):
    names = {"<|return|>": harmony.return_id, "<|end|>": harmony.end, "<|call|>": harmony.call}
    names |= {"<|start|>": harmony.start, "<|channel|>": harmony.channel, "<|message|>": harmony.message}
    pieces = [names.get(piece, piece) for piece in re.split(r"(<\|\w+\|>)", text) if piece]
    return [token for tokens in harmony.encode(pieces) for token in tokens]


FINAL = "<|channel|>final<|message|>"


def test_answers(harmony):
    text = f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{FINAL}42<|return|>"
    answer = answer_of(harmony, text)
    assert answer == "42" and answer.thinking == "Hm." and answer.text == text
    assert answer.is_complete and answer.is_well_formed and answer.num_tokens > 10
    cut = answer_of(harmony, f"{FINAL}42")
    assert cut == "42" and not cut.is_complete and not cut.is_well_formed
    for bad in (
        "42<|return|>",
        f"{FINAL}<|return|>",
        f"{FINAL}42<|end|>",
        f"{FINAL} <|return|>",
        "<|return|>",
    ):
        assert not answer_of(harmony, bad).is_well_formed, bad
    assert answer_of(harmony, "<|return|>") == "" and Answer.of(harmony, []) == ""
    # The end of a document ends an answer, but is not how one ends.
    (other,) = {*harmony.stop_tokens} - {harmony.return_id, harmony.call}
    ended = Answer.of(harmony, [*answer_of_tokens(harmony, f"{FINAL}42"), other])
    assert ended == "42" and ended.is_complete and not ended.is_well_formed
    assert harmony.end not in harmony.stop_tokens


def test_built_in_rewards(harmony):
    exact, form, pattern = load_rewards(GrpoConfig(("exact", "format", r"regex:^\d+$"), (2.0, 1.0, 0.5)))
    assert [one.name for one in (exact, form, pattern)] == ["exact", "format", "regex"]
    assert [one.weight for one in (exact, form, pattern)] == [2.0, 1.0, 0.5]
    good, bad = answer_of(harmony, f"{FINAL} 42<|return|>"), answer_of(harmony, f"{FINAL}43")
    row = {"answer": 42}
    assert [exact("", one, row) for one in (good, bad, answer_of(harmony, f"{FINAL}42"))] == [1, 0, 0]
    assert [form("", one, row) for one in (good, bad)] == [1, 0]
    assert [pattern("", one, row) for one in (good, bad)] == [0, 1]
    with pytest.raises(RewardError, match="^raised ValueError: the row has no answer: must have text"):
        exact("", good, {"answer": " ", "solution": True})


def test_rewards_of_a_file(tmp_path, harmony):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "def reward(prompt, answer, row):\n    return np.float32(len(prompt)) + row['n']\n"
        "def is_long(prompt, answer, row):\n    return len(answer) > 3\n"
        "def bad(prompt, answer, row):\n    return {'nan': float('nan'), 'none': None}.get(row['n'], 1 / 0)\n"
        "def leaves(*_):\n    raise SystemExit('x' * 300)\n"
        "scale = 3\n"
    )
    specs = ("regex:a", str(path), f"{path}:is_long", "regex:b")
    assert [one.name for one in load_rewards(GrpoConfig(specs))] == ["regex", "mine", "is_long", "regex_2"]
    (tmp_path / "beside.py").write_text("def reward(prompt, answer, row):\n    return 1\n")
    (tmp_path / "outer.py").write_text("from beside import reward as other\nvalues = []\n"
                                       "def a(*_):\n    values.append(1)\n    return other(*_)\n"
                                       "def b(*_):\n    return len(values)\n")  # fmt: skip
    first, second = load_rewards(GrpoConfig((f"{tmp_path}/outer.py:a", f"{tmp_path}/outer.py:b")))
    # Where dataclasses look up the names in annotations.
    typed = "from __future__ import annotations\nimport dataclasses\n"
    typed += "@dataclasses.dataclass\nclass A:\n    x: int\n"
    (tmp_path / "typed.py").write_text(f"{typed}def reward(*_):\n    return A(4).x\n")
    # A package of an environment below the folder stays imported, because there must not be two copies.
    packages = tmp_path / ".venv"
    packages.mkdir()
    (packages / "only_once.py").write_text("")
    for name in ("first", "other"):
        (tmp_path / f"{name}.py").write_text(
            f"import sys\nsys.path.append({str(packages)!r})\nimport only_once\nsys.path.pop()\n"
            "def reward(*_):\n    return id(only_once)\n"
        )
    names = ("typed", "first", "other")
    three = load_rewards(GrpoConfig(tuple(f"{tmp_path}/{name}.py" for name in names)))
    values = [one("", answer_of(harmony, "a"), {}) for one in three]
    assert values[0] == 4 and values[1] == values[2]
    (tmp_path / "b").mkdir()
    for folder, value in ((tmp_path, 1), (tmp_path / "b", 2)):
        (folder / "beside.py").write_text(f"def reward(prompt, answer, row):\n    return {value}\n")
        (folder / "same.py").write_text("from beside import reward\n")
    both = load_rewards(GrpoConfig((f"{tmp_path}/same.py", f"{tmp_path}/b/same.py")))
    assert [one("", answer, {}) for one in both for answer in [answer_of(harmony, "a")]] == [1.0, 2.0]
    assert first("", answer_of(harmony, "a"), {}) == 1.0 == second("", answer_of(harmony, "a"), {})
    mine, is_long, bad = load_rewards(GrpoConfig((str(path), f"{path}:is_long", f"{path}:bad")))
    assert (mine.name, is_long.name, bad.name) == ("mine", "is_long", "bad")
    answer = answer_of(harmony, FINAL + "four")
    assert mine("ab", answer, {"n": 1}) == 3.0 and is_long("ab", answer, {}) == 1.0
    with pytest.raises(RewardError, match=r"^raised SystemExit at mine.py:9: x{199}…$"):
        load_rewards(GrpoConfig((f"{path}:leaves",)))[0]("", answer, {})
    with pytest.raises(RewardError, match=r"^raised ZeroDivisionError at mine.py:7: division by zero$"):
        bad("", answer, {"n": 1})
    with pytest.raises(RewardError, match=r"^raised KeyError at mine.py:7: 'n'$"):
        bad("", answer, {})
    for value, message in (
        (math.nan, "returned nan: must be finite, and at most 1e\\+30"),
        (-math.inf, "returned -inf: must be finite, and at most 1e\\+30"),
        (10**400, "raised OverflowError: int too large to convert to float"),
        (1e31, r"returned 1e\+31: must be finite, and at most 1e\+30"),
        (None, "returned None, a NoneType: must be a number"),
        ("1", "returned '1', a str: must be a number"),
        ([1.0], r"returned \[1.0\], a list: must be a number"),
    ):
        with pytest.raises(RewardError, match=f"^{message}$"):
            Reward("one", lambda *_, value=value: value)("", answer, {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exakt", "grpo.rewards is 'exakt': must be exact, format, regex:PATTERN or FILE.py:FUNCTION"),
        ("regex:(", "grpo.rewards is 'regex:(': not a regular expression: missing )"),
        ("regex:", "grpo.rewards is 'regex:': must be regex:PATTERN"),
        ("none.py", "grpo.rewards is 'none.py': no such file"),
        ("FILE:other", "mine.py has no function other; it has reward, two"),
        ("FILE:scale", "mine.py has no function scale; it has reward, two"),
        ("BROKEN", "broken.py: NameError: name 'x' is not defined"),
        ("FILE:two", "mine.py:two': two must take (prompt, answer, row): too many positional arguments"),
        ("EXIT", "exit.py: SystemExit: 3"),
    ],
)
def test_rewards_that_cannot_be_loaded(tmp_path, spec, message):
    (tmp_path / "mine.py").write_text(
        "scale = 3\ndef reward(prompt, answer, row):\n    return 1\n"
        "def two(prompts, **others):\n    return 1\n"
    )
    (tmp_path / "broken.py").write_text("x\n")
    (tmp_path / "exit.py").write_text("import sys\nsys.exit(3)\n")
    spec = (
        spec.replace("EXIT", str(tmp_path / "exit.py"))
        .replace("FILE", str(tmp_path / "mine.py"))
        .replace("BROKEN", str(tmp_path / "broken.py"))
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rewards(GrpoConfig((spec,)))


# Rows.


def test_rows_of_answers(source):
    cache = build_cache(source)
    prompts = [cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist() for i in range(3)]
    samples = [
        Sample(0, [5, 6, 7], [-1.0, -2.0, -3.0], 0.5),
        Sample(1, [8], [-4.0], -0.25),
        Sample(1, [9, 9], [-5.0, -6.0]),  # left out
        Sample(2, [3, 4], [-7.0, -8.0], 0.0),
    ]
    both = len(prompts[0]) + 2 + len(prompts[1])
    rows = make_rows(cache, samples, both, unit=2)
    assert {x.shape for x in rows.values()} == {(2, both)}
    seen = []
    for row in range(2):
        ids = rows["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            mask = ids == segment
            one = {name: x[row][mask].tolist() for name, x in rows.items()}
            assert one["positions"] == list(range(mask.sum()))
            is_answer = np.array(one["loss_weights"]) > 0
            tokens = [one["tokens"][0], *one["targets"]]
            count = int(is_answer.sum())
            assert not is_answer[: len(is_answer) - count].any() and one["tokens"][1:] == one["targets"][:-1]
            assert np.array(one[ADVANTAGES])[~is_answer].tolist() == [0] * (len(is_answer) - count)
            document = prompts.index(tokens[:-count])
            answers = np.array(one[SAMPLED_LOG_PROBS])[is_answer].tolist()
            (advantage,) = set(np.array(one[ADVANTAGES])[is_answer].tolist())
            seen.append(Sample(document, tokens[-count:], answers, advantage))
    assert sorted(seen, key=lambda one: one.document) == [samples[0], samples[1], samples[3]]
    padding = rows["segment_ids"] == 0
    assert all((x[padding] == 0).all() for x in rows.values())


@pytest.mark.parametrize(
    ("answers", "unit", "rows"),
    # Two answers fit in a row.
    [(1, 1, 1), (2, 1, 1), (3, 1, 2), (9, 1, 6), (13, 1, 8), (9, 2, 6), (9, 4, 8), (17, 4, 12), (3, 4, 4)],
)
def test_few_numbers_of_rows(source, answers, unit, rows):
    cache = build_cache(source)
    samples = [Sample(i, [5], [-1.0], 1.0) for i in range(answers)]
    length = 2 * int(np.diff(cache.offsets).max())
    assert len(make_rows(cache, samples, length, unit)["tokens"]) == rows
    without = [dataclasses.replace(one, advantage=None) for one in samples]
    assert len(make_rows(cache, without, length, unit)["tokens"]) == unit


# Settings.

ROUNDED = {"hidden_size": 64, "intermediate_size": 96, "expert_fake_quant": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig()}, "data.source is 'stdlib': must be prompts:GLOB or stdlib-prompts if"),
        ({"objective": "lm"}, "objective is 'lm': must be 'grpo' for prompts (data.source 'stdlib-prompts')"),
        ({"grpo": GrpoConfig()}, "grpo.rewards is (): must be exact, format, regex:PATTERN or FILE.py:FUNC"),
        ({"grpo": GrpoConfig(("exact",), group_size=3)}, "grpo.group_size is 3: must divide data.batch_size"),
        ({"grpo": GrpoConfig(("exact",), max_new_tokens=T)}, "grpo.max_new_tokens is 24: must be below data"),
        ({"log_every": 2}, "log_every is 2: must be 1 if objective is 'grpo'"),
        ({"model": dataclasses.replace(MODEL, **ROUNDED)}, "grpo.beta is 0.2: must be 0 with"),
        ({"model": dataclasses.replace(MODEL, lora=None)}, "grpo.beta is 0.2: must be 0 without model.lora"),
        ({"model": dataclasses.replace(MODEL, residual_dropout=0.1)}, "model.residual_dropout is 0.1: must"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make_config(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 1}, "grpo.group_size is 1: must be 2 or more"),
        ({"epsilon": 1.0}, "grpo.epsilon is 1.0: must be at least 0 and below 1"),
        ({"max_ratio": 1.0}, "grpo.max_ratio is 1.0: must be above 1"),
        ({"rewards": ("exact", "exact")}, "grpo.rewards is ('exact', 'exact'): must not have 'exact' twice"),
        (
            {"rewards": ("exact",), "reward_weights": (1.0, 2.0)},
            "grpo.reward_weights is (1.0, 2.0): must have",
        ),
        (
            {"rewards": ("exact",), "reward_weights": (0.0,)},
            "grpo.reward_weights is (0.0,): must not all be 0",
        ),
        ({"scale_rewards": "batch"}, "grpo.scale_rewards is 'batch': must be 'group' or 'none'"),
    ],
)
def test_settings_of_grpo(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        GrpoConfig(**values)


def test_flags_with_several_rewards():
    given = ["--grpo.rewards", "exact", r"regex:\d+ it's", "--grpo.reward-weights", "2", "-1.5"]
    (*_, first, _, second) = with_settings(given)
    preset = "quickstart_grpo"
    for flags in (given, flags_of([first, second])):
        config = read_preset(preset, flags)
        assert config.grpo.rewards == ("exact", r"regex:\d+ it's")
        assert config.grpo.reward_weights == (2.0, -1.5)
    full = read_preset(preset, ["--model.lora", "None", "--grpo.beta", "0"])
    assert full.model.lora is None and full.grpo.beta == 0
    with pytest.raises(ValueError, match="^grpo.beta is 0.03: must be 0 without model.lora"):
        read_preset(preset, ["--model.lora", "None"])
    with pytest.raises(ValueError, match='^grpo.rewards is "regex:it\'s": has a quote that is not closed'):
        flags_of(["grpo.rewards=regex:it's"])


# Runs.


@pytest.fixture(scope="module")
def base(tmp_path_factory, source):
    """A run to start from, whose answers have about the right form."""
    folder = tmp_path_factory.mktemp("base")
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f"{2 * i}"} for i in range(60)]
    config = train_on_chat(folder, source, rows, steps=20)
    (folder / "mine.py").write_text(
        "def reward(prompt, answer, row):\n"
        "    return sum(map(ord, answer.text)) % 7 + 0.5 * answer.num_tokens\n"
    )
    return config


def grpo_config(base, source, run_dir, **changes):
    grpo = GrpoConfig((f"{base.run_dir}/../mine.py",), group_size=4, max_new_tokens=9, beta=0.1)
    values = {
        "model": dataclasses.replace(base.model, lora=LoraConfig(rank=4)),
        "objective": "grpo", "steps": 6, "run_dir": str(run_dir), "init_from": base.run_dir,
        "data": dataclasses.replace(source, tokenizer=f"file:{base.run_dir}/tokenizer.json"),
        "grpo": dataclasses.replace(grpo, **changes.pop("grpo", {})),
        "checkpoint": CheckpointConfig(every=1, keep=9),
        "optim": OptimConfig(learning_rate=3e-2, warmup_steps=0, schedule="constant"),
        "eval": EvalConfig(every=6, batches=2, temperature=1.0),
    }  # fmt: skip
    return dataclasses.replace(base, **(values | changes))


def steps_of(config):
    return [row for row in read_metrics(f"{config.run_dir}/metrics.jsonl") if "reward" in row]


def test_run_shows_what_it_does_and_resumes_exactly(base, source, tmp_path, capsys):
    config = grpo_config(base, source, tmp_path / "whole", steps=4)
    state = train(config)
    said = capsys.readouterr().out
    assert "2 prompts × 4 answers of up to 9 tokens" in said and "· held-out reward " in said
    assert (
        said.count("held-out question:\n  │ What is ") == 3 and said.count("the model's answer, reward ") == 3
    )
    rows = steps_of(config)
    assert len(rows) == 4 and (tmp_path / "whole" / "report.png").exists()
    for row in rows:
        assert 0 < row[DIFFERENCE] <= 1e-5 and row["clip_ratio"] == 0
        assert row["reward"] > 0 and row["reward_std"] > 0 and row["rewards/mine"] == row["reward"]
        assert 1 <= row["completions/min_length"] <= row["completions/mean_length"] <= 9
        assert row["rollout_tokens_per_second"] > 0 and row["train_tokens_per_second"] > 0
        assert row["entropy"] > 0 and row["groups_left_out"] == 0
    # The adapter is new, and then it is not.
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and rows[-1]["kl"] > 1e-6
    evaluations = [row for row in read_metrics(f"{config.run_dir}/metrics.jsonl") if "val_reward" in row]
    assert [row.get("final", False) for row in evaluations] == [False, True]
    cut = dataclasses.replace(config, run_dir=str(tmp_path / "cut"))
    train(dataclasses.replace(cut, steps=2))
    again = train(cut)
    for name, leaf in leaves(state.params).items():
        np.testing.assert_array_equal(leaves(again.params)[name], leaf, err_msg=name)


@pytest.mark.slow
def test_several_steps_on_the_same_answers_resume_exactly(base, source, tmp_path):
    config = grpo_config(base, source, tmp_path / "whole", grpo={"iterations": 3, "beta": 0.0})
    state = train(config)
    rows = steps_of(config)
    assert [DIFFERENCE in row for row in rows] == [True, False, False] * 2
    assert len({row["rollout_seconds"] for row in rows}) == 2
    assert rows[0]["clip_ratio"] == 0 and max(row["clip_ratio"] for row in rows) > 0
    cut = dataclasses.replace(config, run_dir=str(tmp_path / "cut"))
    train(dataclasses.replace(cut, steps=4))
    again = train(cut)
    for name, leaf in leaves(state.params).items():
        np.testing.assert_array_equal(leaves(again.params)[name], leaf, err_msg=name)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, expert=4),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (
                MeshConfig(data=4, tensor=2),
                MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
                MeshConfig(data=1, fsdp=8),
                MeshConfig(data=2, context=2, expert=2),
            )
        ),
    ],
)
def test_rollouts_on_a_mesh_equal_those_of_one_device(base, source, tmp_path, mesh):
    config = grpo_config(base, source, tmp_path / "run")
    cache = build_cache(config.data)
    start = jax.tree.map(np.asarray, init_params(config.model, jax.random.key(5)))

    def first_step(mesh_config):
        mesh = mesh_of(mesh_config)
        with jax.set_mesh(mesh):
            adapters, frozen = params_on(mesh, config.model, start)
            state = create_state(config, mesh, adapters)
            feed = RolloutFeed(config, cache, mesh, print, load_rewards(config.grpo))
            log = types.SimpleNamespace(timer=StepTimer(), flush=lambda: None)
            batch, metrics = feed.next(0, adapters, frozen, log)
            _, found = make_train_step(config, grpo_objective(config))(state, batch, frozen)
            return feed._samples, metrics | jax.device_get(found)

    samples, metrics = first_step(mesh)
    expected, expected_metrics = first_step(None)
    assert [one.tokens for one in samples] == [one.tokens for one in expected]
    for one, other in zip(samples, expected, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-5, atol=1e-5)
        assert one.advantage == other.advantage
    assert metrics["reward"] == expected_metrics["reward"] and metrics[DIFFERENCE] <= 1e-5
    for name in ("loss", "entropy", "grad_norm"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_format": "mxfp4", "lora": LoraConfig(rank=4, expert_rank=2)},
        {"expert_fake_quant": True},
    ],
    ids=["adapters on packed experts", "rounded weights"],
)
@pytest.mark.slow
def test_rollouts_of_mxfp4(base, source, tmp_path, changes):
    """What is sampled with, packed or rounded, is what is trained with."""
    model = dataclasses.replace(
        base.model, hidden_size=64, intermediate_size=96, num_attention_heads=6, num_key_value_heads=2,
        head_dim=10, initializer_range=0.1,
    )  # fmt: skip
    start = bind(model, init_params(model, jax.random.key(3)))
    save_pretrained(start, tmp_path / "start", "mxfp4", tokenizer=base.run_dir)
    model, beta = dataclasses.replace(model, **changes), 0.1 if "lora" in changes else 0.0
    config = grpo_config(
        base, source, tmp_path / "run", model=model, init_from=str(tmp_path / "start"), grpo={"beta": beta}
    )
    train(dataclasses.replace(config, steps=3))
    rows = steps_of(config)
    assert len(rows) == 3 and rows[-1]["grad_norm"] > 0
    assert all(0 < row[DIFFERENCE] <= 1e-5 for row in rows)


@pytest.mark.slow
def test_two_processes_train_like_one(base, source, tmp_path):
    """Only process 0 computes rewards, and every process samples."""

    def line(name):
        config = grpo_config(base, source, tmp_path / name, mesh=MeshConfig(data=2, expert=4), steps=3)
        preset = tmp_path / f"{name}.py"
        preset.write_text(
            "from gptoss_jax.config import TrainConfig\n"
            f"config = TrainConfig.from_dict({config.to_dict()!r})\n"
        )
        return [sys.executable, str(ROOT / "train.py"), str(preset)]

    ended = [*wait_for_exit([start_one(line("one"), devices=8)]), *wait_for_exit(start_all(line("two"), 4))]
    assert [code for code, *_ in ended] == [0] * 3, ended
    rows, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert len(rows) == len(expected) == 5
    for row, other in zip(rows, expected, strict=True):
        names = [name for name in other if re.match(r"(val_)?(rewards?(/|_std|$)|loss$|completions/)", name)]
        assert len(names) >= 2
        for name in names:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name


def test_groups_with_a_bad_reward_are_left_out(base, source, tmp_path, capsys):
    path = tmp_path / "odd.py"
    path.write_text(
        "def reward(prompt, answer, row):\n"
        "    return float('nan') if row['answer'] % 4 else answer.num_tokens\n"
    )
    config = grpo_config(base, source, tmp_path / "run", grpo={"rewards": (str(path),)}, steps=3)
    train(config)
    said = capsys.readouterr().out
    left_out = [row["groups_left_out"] for row in steps_of(config)]
    assert sum(left_out) > 0 and max(left_out) < 2
    (final,) = (row for row in read_metrics(f"{config.run_dir}/metrics.jsonl") if row.get("final"))
    assert (
        final["val_answers_left_out"] > 0 and f"{final['val_answers_left_out']:.0f} of them left out" in said
    )
    assert all(row["rewards/odd"] == row["reward"] for row in steps_of(config))
    line = r"grpo.rewards: odd returned nan: must be finite, and at most 1e\+30; its group is left out "
    line += r"\(.*prompts.jsonl:\d+\)"
    lines = re.findall(line, said)
    assert 1 <= len(lines) <= 10 and len({*lines}) == len(lines)
    path.write_text("def reward(prompt, answer, row):\n    return None\n")
    message = (
        r"^no group of answers in a step has usable rewards; grpo.rewards: odd returned None, a NoneType: "
        r"must be a number; its group is left out \(.*\)$"
    )
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, run_dir=str(tmp_path / "bad")))


@pytest.mark.slow
def test_a_changed_reward_is_reported(base, source, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompt, answer, row):\n    return answer.num_tokens\n")
    config = grpo_config(base, source, tmp_path / "run", grpo={"rewards": (str(path),)}, steps=2)
    train(dataclasses.replace(config, steps=1))
    train(config)
    assert "has changed" not in capsys.readouterr().out
    path.write_text("def reward(prompt, answer, row):\n    return -answer.num_tokens\n")
    train(dataclasses.replace(config, steps=3))
    line = "grpo.rewards, their weights or a file have changed: rewards, and the best checkpoint, "
    assert line in capsys.readouterr().out
    # What counts is the file that was loaded.
    train(dataclasses.replace(config, steps=4, grpo=dataclasses.replace(config.grpo, reward_weights=(1.0,))))
    assert "have changed" not in capsys.readouterr().out
    train(dataclasses.replace(config, steps=5, grpo=dataclasses.replace(config.grpo, reward_weights=(2.0,))))
    assert line in capsys.readouterr().out
    assert [row["reward"] > 0 for row in steps_of(config)] == [True, True, False, False, False]


def test_a_step_without_usable_rewards_is_counted(base, source, tmp_path, monkeypatch, capsys):
    path = tmp_path / "now_and_then.py"
    path.write_text(
        "calls = [0]\n"
        "def reward(prompt, answer, row):\n"
        "    calls[0] += 1\n"
        "    return answer.num_tokens if calls[0] <= 8 else None\n"
    )
    config = grpo_config(base, source, tmp_path / "run", grpo={"rewards": (str(path),), "beta": 0.0}, steps=3)
    train(dataclasses.replace(config, eval=EvalConfig(every=50, batches=1)))
    rows = steps_of(config)
    assert [row["groups_left_out"] for row in rows] == [0, 2, 2]
    assert [row["loss"] == 0 for row in rows] == [False, True, True] and rows[1]["reward"] is None
    monkeypatch.setattr("gptoss_jax.training.rollouts.MAX_BAD_IN_A_ROW", 2)
    with pytest.raises(ValueError, match="^no group of answers in 2 steps in a row has usable rewards; grpo"):
        train(dataclasses.replace(config, run_dir=str(tmp_path / "again")))


@pytest.mark.slow
def test_answers_with_reasoning_are_sampled_to_their_end(source, tmp_path):
    """The end of the reasoning is not the end of the answer."""
    rows = [{"prompt": f"What is {i} + {i}?", "thinking": "Hm.", "completion": "4"} for i in range(60)]
    sft = train_on_chat(tmp_path, source, rows, steps=60)
    config = grpo_config(
        sft,
        source,
        tmp_path / "run",
        grpo={"rewards": ("format", "regex:^4$"), "max_new_tokens": 40},
        steps=1,
    )
    train(config)
    (row,) = steps_of(config)
    assert row["rewards/format"] > 0.5 and row["rewards/regex"] > 0.5, row


def test_equal_rewards_change_nothing(base, source, tmp_path):
    path = tmp_path / "same.py"
    path.write_text("def reward(prompt, answer, row):\n    return 0.25\n")
    optim = OptimConfig(learning_rate=3e-2, warmup_steps=0, weight_decay=0.0)
    config = grpo_config(
        base, source, tmp_path / "run", grpo={"rewards": (str(path),), "beta": 0.0}, steps=2, optim=optim
    )
    state = train(config)
    rows = steps_of(config)
    assert [(row["loss"], row["grad_norm"], row["frac_reward_zero_std"]) for row in rows] == [(0, 0, 1)] * 2
    first = jax.tree.leaves(init_params(config.model, jax.random.key(0)))
    assert len(first) == len(jax.tree.leaves(state.params))
    b = [x for name, x in leaves(state.params).items() if name.endswith("lora_b")]
    assert b and not any(np.any(x) for x in b)


def test_command_line(source, capsys):
    flags = ["--data.source", source.source, "--data.tokenizer", "bpe:300", "--data.seq-len", "194"]
    flags += ["--data.cache-dir", source.cache_dir, "--examples", "2"]
    assert main.main(["inspect-data", "quickstart_grpo", *flags]) == 0
    said = capsys.readouterr().out
    assert "prompts: 60" in said and "tokens of a prompt: shortest" in said and " trained" not in said
    assert re.search(r"epochs of \d+ prompts; \d+ with more than 162 tokens are left out", said), said
    assert main.main(["plan", "quickstart_grpo", "--chip", "cpu"]) == 0
    assert "sampling 64 answers needs" in " ".join(capsys.readouterr().out.split())
    assert main.main(["eval", "x", "--source", source.source]) == 2
    assert "a run with objective grpo reports its held-out prompts itself" in capsys.readouterr().err
