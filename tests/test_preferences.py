"""Training on preferences: losses against formulas, rows, references, meshes and runs."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.objectives import MODEL, OPTIM, V, plain_log_probs, start_params, steps_on, train_on_chat
from helpers.params import assert_close
from helpers.weights import leaves

from gptoss_jax.cli import main
from gptoss_jax.config import (
    CheckpointConfig,
    DataConfig,
    DpoConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.data.batches import BATCH_FIELDS, REFERENCE_FIELD, PackedRows, held_out_batches
from gptoss_jax.data.chat_rows import RowError
from gptoss_jax.data.chat_statistics import statistics, summary
from gptoss_jax.data.preference_rows import read_pair
from gptoss_jax.data.stdlib_chat import preference_rows
from gptoss_jax.data.token_cache import build_cache
from gptoss_jax.model import lora
from gptoss_jax.model.parameters import merge_params, split_params
from gptoss_jax.model.transformer import bind, init_params, segment_positions
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.training import losses
from gptoss_jax.training.loop import train
from gptoss_jax.training.metrics import read_metrics
from gptoss_jax.training.preferences import (
    PairLogProbs,
    num_pairs,
    pair_log_probs,
    preference_objective,
    preference_terms,
    token_log_probs,
    without_adapters,
)
from gptoss_jax.training.reference import FILE
from gptoss_jax.training.setup import check_devices

B, T = 8, 21
LOSSES = {
    "sigmoid": DpoConfig(beta=0.3),
    "smoothed": DpoConfig(beta=0.3, label_smoothing=0.2),
    "ipo": DpoConfig("ipo", beta=0.4),
    "orpo": DpoConfig("orpo", beta=0.2),
    "simpo": DpoConfig("simpo", beta=2.0, gamma=0.7),
}


def make_config(dpo=LOSSES["sigmoid"], model=MODEL, **changes):
    values = {
        "model": model,
        "objective": "dpo",
        "dpo": dpo,
        "data": DataConfig(source="stdlib-preferences", seq_len=T, batch_size=B),
        "optim": OPTIM,
        "steps": 20,
    }
    return TrainConfig(**(values | changes))


def make_batch(seed=0):
    """Rows of two pairs, one pair, and none; answers of different lengths; padding at the end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    segments, weights = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
    for row in range(B):
        start, prompts = 0, rng.integers(1, 3, 2)
        for pair in range((2, 1, 0, 2)[row % 4]):
            for side in range(2):
                length = prompts[pair] + rng.integers(1, 4)
                segments[row, start : start + length] = 1 + 2 * pair + side
                weights[row, start + prompts[pair] : start + length] = 1
                start += length
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    batch |= {"positions": segment_positions(batch["segment_ids"]), "loss_weights": jnp.asarray(weights)}
    return batch | {REFERENCE_FIELD: jnp.asarray(-3 * rng.random((B, T)), jnp.float32)}


def pairs_by_hand(log_p, batch):
    """(row, sum and number of tokens of the chosen answer, of the rejected one) of each pair."""
    ids, weights = np.asarray(batch["segment_ids"]), np.asarray(batch["loss_weights"])
    for row in range(B):
        for pair in range(ids[row].max() // 2):
            found = []
            for side in (1, 2):
                mask = (ids[row] == 2 * pair + side) & (weights[row] > 0)
                found += [jnp.sum(jnp.where(mask, log_p[row], 0)), mask.sum()]
            yield row, *found


def loss_by_hand(dpo, log_p, reference, batch):
    """The mean loss and metrics in the formulas of the papers, from log-probabilities [B, T]."""
    rows, others = list(pairs_by_hand(log_p, batch)), list(pairs_by_hand(reference, batch))
    total, metrics = 0.0, {"chosen": 0.0, "rejected": 0.0, "accuracies": 0.0}
    for (_, chosen, n, rejected, m), (_, chosen_ref, _, rejected_ref, _) in zip(rows, others, strict=True):
        c, d = chosen - chosen_ref, rejected - rejected_ref
        if dpo.loss == "sigmoid":
            p = 1 / (1 + jnp.exp(-dpo.beta * (c - d)))
            e = dpo.label_smoothing
            loss = -(1 - e) * jnp.log(p) - e * jnp.log(1 - p)
        elif dpo.loss == "ipo":
            loss = ((c / n - d / m) - 1 / (2 * dpo.beta)) ** 2
        elif dpo.loss == "orpo":
            odds = [jnp.exp(x / k) / (1 - jnp.exp(x / k)) for x, k in ((chosen, n), (rejected, m))]
            loss = -chosen / n - dpo.beta * jnp.log(1 / (1 + odds[1] / odds[0]))
        else:
            loss = -jnp.log(1 / (1 + jnp.exp(-(dpo.beta * (chosen / n - rejected / m) - dpo.gamma))))
        rewards = (c, d) if dpo.needs_reference else (chosen / n, rejected / m)
        metrics["chosen"] += dpo.beta * rewards[0] / len(rows)
        metrics["rejected"] += dpo.beta * rewards[1] / len(rows)
        metrics["accuracies"] += (rewards[0] > rewards[1]) / len(rows)
        total = total + loss / len(rows)
    return total, metrics


@pytest.mark.parametrize(
    ("name", "has_stored"),
    [(name, stored) for name in LOSSES for stored in (False, True)[: 1 + LOSSES[name].needs_reference]],
)
def test_losses_gradients_and_metrics_match_the_formulas(name, has_stored):
    dpo, batch = LOSSES[name], make_batch()
    config = make_config(dpo)
    if not has_stored:
        del batch[REFERENCE_FIELD]
    params = jax.tree.map(jnp.asarray, start_params())
    adapters, frozen = split_params(params, lora.is_adapter)
    objective = preference_objective(config)
    weight = objective.weight(batch)
    assert float(weight) == 2 + 1 + 2 + 2 + 1 + 2

    def found(adapters):
        sums, _ = objective.sums(bind(MODEL, merge_params(adapters, frozen)), batch)
        return sums["loss"] / weight, sums

    def expected(adapters):
        model = bind(MODEL, merge_params(adapters, frozen))
        reference = batch[REFERENCE_FIELD] if has_stored else plain_log_probs(without_adapters(model), batch)
        return loss_by_hand(dpo, plain_log_probs(model, batch), jax.lax.stop_gradient(reference), batch)

    (loss, sums), gradients = jax.jit(jax.value_and_grad(found, has_aux=True))(adapters)
    (by_hand, metrics), expected_gradients = jax.jit(jax.value_and_grad(expected, has_aux=True))(adapters)
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-5)
    assert_close(gradients, expected_gradients, 1e-5)
    for key, value in metrics.items():
        assert float(sums[f"rewards/{key}"] / weight) == pytest.approx(float(value), rel=1e-5, abs=1e-6), key
    margins = float((sums["rewards/chosen"] - sums["rewards/rejected"]) / weight)
    assert float(sums["rewards/margins"] / weight) == pytest.approx(margins, rel=1e-4, abs=1e-6)


def test_values_by_hand():
    pairs = PairLogProbs(*(jnp.array([[x]]) for x in (-2.0, -6.0, 2.0, 3.0)))
    reference = PairLogProbs(*(jnp.array([[x]]) for x in (-3.0, -5.0, 2.0, 3.0)))
    # c = 1 and d = -1.
    terms = preference_terms(DpoConfig(beta=0.5), pairs, reference)
    terms = {name: x.item() for name, x in terms.items()}
    assert terms["loss"] == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
    assert [terms[f"rewards/{n}"] for n in ("chosen", "rejected", "margins", "accuracies")] == [
        0.5, -0.5, 1.0, 1.0,
    ]  # fmt: skip
    assert [terms[f"logps/{name}"] for name in ("chosen", "rejected")] == [-2.0, -6.0]
    smoothed = preference_terms(DpoConfig(beta=0.5, label_smoothing=0.25), pairs, reference)["loss"]
    by_hand = 0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1))
    assert smoothed.item() == pytest.approx(by_hand, rel=1e-6)
    # 1/2 + 1/3 - 1 / (2 * 0.5)
    assert preference_terms(DpoConfig("ipo", 0.5), pairs, reference)["loss"].item() == pytest.approx(1 / 36)
    # Means of -1 and -2 nats.
    simpo = preference_terms(DpoConfig("simpo", 2.0, gamma=0.5), pairs, None)["loss"]
    assert simpo.item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-6)
    usual = preference_terms(DpoConfig("simpo", 2.0), pairs, None)["loss"]
    assert usual.item() == simpo.item()
    odds = [math.exp(-x) / (1 - math.exp(-x)) for x in (1, 2)]
    orpo = preference_terms(DpoConfig("orpo", 0.1), pairs, None)["loss"]
    assert orpo.item() == pytest.approx(1 + 0.1 * math.log(1 + odds[1] / odds[0]), rel=1e-6)


def test_fresh_adapter_has_a_loss_of_ln_2():
    params = init_params(MODEL, jax.random.key(3))
    objective, batch = preference_objective(make_config()), make_batch(4)
    del batch[REFERENCE_FIELD]
    sums, _ = jax.jit(lambda params: objective.sums(bind(MODEL, params), batch))(params)
    assert float(sums["loss"] / num_pairs(batch)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(sums["rewards/margins"]) == 0 and float(sums["rewards/accuracies"]) == 0


def test_pairs_of_rows():
    batch = {
        "segment_ids": jnp.array([[1, 1, 2, 2, 2, 3, 4], [1, 2, 2, 0, 0, 0, 0]]),
        "loss_weights": jnp.array([[0, 1.0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0]]),
    }
    log_p = jnp.array([[9, -1.0, 9, -2, -4, -8, -16], [-32, 9, -64, 9, 9, 9, 9]])
    found = pair_log_probs(log_p, batch)
    assert found.chosen.shape == (2, 4)
    np.testing.assert_array_equal(found.chosen[:, :2], [[-1, -8], [-32, 0]])
    np.testing.assert_array_equal(found.rejected[:, :2], [[-6, -16], [-64, 0]])
    np.testing.assert_array_equal(found.is_pair, [[True, True, False, False], [True, False, False, False]])
    assert float(num_pairs(batch)) == 3


@pytest.mark.parametrize("chunk", [1, 3, 12])
@pytest.mark.parametrize("mesh_config", [None, MeshConfig(data=2, fsdp=2), MeshConfig(data=2, tensor=2)])
def test_log_probs_match_the_plain_ones(chunk, mesh_config):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 12, 6), (32, 6)))
    targets = jnp.asarray(rng.integers(0, 32, (4, 12)), jnp.int32)
    mask = jnp.asarray(rng.random((4, 12)) < 0.6)
    # Gradients of both signs.
    slopes = jnp.asarray(rng.standard_normal((4, 12)), jnp.float32)

    def plain(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head.T, axis=-1)
        return jnp.where(mask, jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], 0)

    def found(hidden, head):
        return losses.log_probs((hidden,), (head,), targets, mask, chunk)

    def results(f):
        values = jax.jit(f)(hidden, head)
        return values, *jax.jit(jax.grad(lambda *x: jnp.sum(slopes * f(*x) ** 2), (0, 1)))(hidden, head)

    expected = results(plain)
    if mesh_config is None:
        here = results(found)
    else:
        with jax.set_mesh(make_mesh(mesh_config, jax.devices()[:4])):
            here = results(found)
    for one, other in zip(here, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2 x expert 4": MeshConfig(data=2, expert=4),
    "data 4 x tensor 2": MeshConfig(data=4, tensor=2),
    "fsdp 2 x expert 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


def run_on(mesh_config, grad_accum_steps=1):
    """Returns the metrics of two steps, and the gradient of the first."""
    batches = [{name: x for name, x in make_batch(seed).items() if name in BATCH_FIELDS} for seed in range(2)]
    return steps_on(mesh_config, make_config(), batches, grad_accum_steps)


alone = functools.cache(functools.partial(run_on, None))


@pytest.mark.parametrize(
    ("mesh", "grad_accum_steps"),
    [
        (None, 4),
        *(pytest.param(name, 1, marks=() if "fsdp 2" in name else pytest.mark.slow) for name in MESHES),
    ],
)
def test_meshes_and_microbatches_train_like_one_device(mesh, grad_accum_steps):
    rows, gradients = run_on(MESHES.get(mesh), grad_accum_steps)
    expected_rows, expected_gradients = alone()
    for row, expected in zip(rows, expected_rows, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert_close(gradients, expected_gradients, 1e-5)


def test_context_axis_is_refused():
    config = make_config(data=DataConfig(source="stdlib-preferences", seq_len=32, batch_size=B))
    mesh = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])
    with pytest.raises(ValueError, match="^mesh.context is 2: must be 1 if objective is 'dpo', which needs"):
        check_devices(config, mesh)


# Data.

ASK = [{"role": "user", "content": "Two plus two?"}]


def texts(messages):
    return [one.message.text for one in messages][1:]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
        {"prompt": ASK, "chosen": "Four.", "rejected": "Five."},
        {
            "prompt": ASK,
            "chosen": [{"role": "assistant", "content": "Four."}],
            "rejected": [{"role": "assistant", "content": "Five."}],
        },
        {
            "chosen": [*ASK, {"role": "assistant", "content": "Four."}],
            "rejected": [*ASK, {"role": "assistant", "content": "Five."}],
        },
        {
            "chosen": "\n\nHuman: Two plus two?\n\nAssistant: Four.",
            "rejected": "\n\nHuman: Two plus two?\n\nAssistant: Five.",
        },
        # As in UltraFeedback: whole conversations beside the prompt, and one of them again.
        {
            "prompt": "Two plus two?",
            "chosen": [*ASK, {"role": "assistant", "content": "Four."}],
            "rejected": [*ASK, {"role": "assistant", "content": "Five."}],
            "messages": [*ASK, {"role": "assistant", "content": "Four."}],
        },
    ],
)
def test_forms_of_rows(row):
    pair = read_pair(row)
    assert texts(pair.chosen) == ["Two plus two?", "Four."]
    assert texts(pair.rejected) == ["Two plus two?", "Five."]


def test_transcript_with_several_turns():
    before = "\n\nHuman: Hi\n\nAssistant: Hello: how are you?\n\nHuman: Two plus two?\n\nAssistant:"
    pair = read_pair({"chosen": f"{before} Four.", "rejected": f"{before} Five."})
    assert texts(pair.chosen) == ["Hi", "Hello: how are you?", "Two plus two?", "Four."]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "unknown format", "has no rejected; its fields are chosen, prompt"),
        ({}, "unknown format", "has no chosen and no rejected; its fields are none"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal answers", "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "bad content", "chosen is an int: must be text"),
        ({"chosen": 3, "rejected": "b"}, "bad content", "chosen is an int: must be text or messages"),
        ({"chosen": "a", "rejected": "b"}, "no prompt", "chosen is text without a prompt: must have"),
        (
            {"chosen": [*ASK, {"role": "assistant", "content": "b"}],
             "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]},
            "different prompts",
            "chosen and rejected differ before the last answer",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty message", "rejected is missing"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pairs(row, kind, message):
    with pytest.raises(RowError, match=f"^{re.escape(message)}") as caught:
        read_pair(row)
    assert caught.value.kind == kind


@pytest.fixture
def source(tmp_path):
    """Sixty pairs, and three rows that cannot be used."""
    rows = [
        {
            "prompt": f"What is {i} + {i}?",
            "chosen": f"It is {2 * i}.",
            "rejected": f"It is {2 * i + 1}, I think.",
        }
        for i in range(60)
    ]
    rows[10:10] = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "chosen": "c", "rejected": "c"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        f"preferences:{path}", "bpe:300", seq_len=800, batch_size=8, val_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def test_cache_and_rows_of_pairs(source):
    cache = build_cache(source)
    assert cache.is_pairs and len(cache.held_out) == 120
    np.testing.assert_array_equal(cache.held_out[::2], cache.held_out[1::2])
    found = statistics(cache, source)
    assert found["skipped"] == {"equal answers": 2, "unknown format": 1}
    assert any(line.startswith("pairs of answers: 60, ") for line in summary(cache, source))
    seen = []
    for held_out in (False, True):
        packed = PackedRows(cache, held_out, source.seq_len)
        for index in range(len(packed)):
            row = packed[index]
            ids, weights = row["segment_ids"], row["loss_weights"]
            assert ids.max() % 2 == 0
            for number in range(1, ids.max() + 1, 2):
                told = []
                for side in (0, 1):
                    mask = ids == number + side
                    assert row["positions"][mask].tolist() == list(range(mask.sum()))
                    # The answer alone is trained on, with its end.
                    answer = cache.tokenizer.decode(row["targets"][mask & (weights > 0)])
                    told.append(answer)
                prompt = [row["tokens"][(ids == number + side) & (weights == 0)] for side in (0, 1)]
                assert prompt[0].tolist() == prompt[1].tolist()
                first, second = re.findall(r"It is (\d+)[.,]", " ".join(told))
                assert int(second) == int(first) + 1
                seen.append(int(first) // 2)
    assert sorted(seen) == list(range(60))


def test_pairs_that_are_too_long(source):
    cache = build_cache(source)
    both = (np.diff(cache.offsets) - 1).reshape(-1, 2).sum(axis=1)
    limit = int(np.median(both))
    short = dataclasses.replace(source, seq_len=limit)
    packed = [PackedRows(cache, held_out, limit) for held_out in (False, True)]
    kept = sum(len(rows.plan.document) for rows in packed) // 2
    assert kept == (both <= limit).sum() < 60
    line = f"pairs longer than data.seq_len ({limit}): {60 - kept}, {60 - kept} left out"
    assert line in summary(cache, short)
    message = (
        f"data.seq_len is 9: no training pair fits; the shortest needs {both[~cache.held_out[::2]].min()}"
    )
    with pytest.raises(ValueError, match=message):
        PackedRows(cache, False, 9)


def test_standard_library_pairs(tmp_path):
    (tmp_path / "zoo.py").write_text(
        '"""Animals and their keepers."""\n'
        + "".join(f'def f{i}(x{i}):\n    """Returns animal number {i} now."""\n' for i in range(4))
    )
    rows = list(preference_rows(tmp_path, ["zoo.py"]))
    assert len(rows) == 9
    answers = {row["prompt"]: row["chosen"] for row in rows}
    for row in rows:
        assert row["rejected"] != row["chosen"] and row["rejected"] in answers.values()
        assert row["rejected"].startswith("`") == row["chosen"].startswith("`")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig()}, "data.source is 'stdlib': must be preferences:GLOB or stdlib-preferences"),
        ({"objective": "lm"}, "objective is 'lm': must be 'dpo' for pairs of answers"),
        (
            {"data": DataConfig("stdlib-preferences", overlong="cut")},
            "data.overlong is 'cut': must be 'skip' if",
        ),
        (
            {"data": DataConfig("stdlib-preferences", train_on="all")},
            "data.train_on is 'all': must be 'assist",
        ),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make_config(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "kto"}, "dpo.loss is 'kto': must be 'sigmoid' or 'ipo' or 'orpo' or 'simpo'"),
        ({"beta": 0.0}, "dpo.beta is 0.0: must be above 0"),
        ({"label_smoothing": 0.5}, "dpo.label_smoothing is 0.5: must be at least 0 and below 0.5"),
        ({"gamma": 0.5}, "dpo.gamma is 0.5: must be None unless dpo.loss is 'simpo'"),
        ({"loss": "simpo", "gamma": -1.0}, "dpo.gamma is -1.0: must be 0 or more, or None"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "dpo.label_smoothing is 0.1: must be 0 unless dpo.loss is"),
    ],
)
def test_settings_of_losses(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        DpoConfig(**values)


# Runs.


@pytest.fixture
def base(tmp_path, source):
    """A run without preferences, to start from."""
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    return train_on_chat(
        tmp_path, source, rows, optim=OptimConfig(learning_rate=3e-3, warmup_steps=0), steps=1
    )


def dpo_config(base, source, tmp_path, name, **changes):
    model = changes.pop("model", dataclasses.replace(base.model, lora=LoraConfig(rank=4)))
    values = {
        "model": model, "objective": "dpo", "steps": 6,
        "data": dataclasses.replace(source, tokenizer=f"file:{base.run_dir}/tokenizer.json"),
        "run_dir": str(tmp_path / name),
        "checkpoint": CheckpointConfig(every=2, keep=9), "init_from": base.run_dir,
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant"),
        "eval": EvalConfig(every=6, batches=50, sample_tokens=3),
    }  # fmt: skip
    return dataclasses.replace(base, **(values | changes))


@pytest.mark.parametrize("kind", ["adapter", pytest.param("full", marks=pytest.mark.slow)])
def test_run_learns_and_resumes_exactly(base, source, tmp_path, kind, capsys):
    model = {} if kind == "adapter" else {"model": base.model}
    config = dpo_config(base, source, tmp_path, "whole", **model)
    state = train(config)
    said = capsys.readouterr().out
    count = build_cache(config.data).meta["held_out_documents"] // 2
    assert "of the chosen answers preferred" in said and f", {count} pairs held out" in said
    rows = [row for row in read_metrics(f"{config.run_dir}/metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < 0.68 and rows[-1]["rewards/accuracies"] > 0.9
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"} <= {
        *rows[0]
    }
    (final,) = (row for row in read_metrics(f"{config.run_dir}/metrics.jsonl") if row.get("final"))
    assert final["val_rewards/accuracies"] > 0.9 and "val_bits_per_byte" not in final
    assert (tmp_path / "whole" / FILE).exists() == (kind == "full")
    cut = dataclasses.replace(config, run_dir=str(tmp_path / "cut"))
    train(dataclasses.replace(cut, steps=4, optim=dataclasses.replace(config.optim)))
    again = train(cut)
    for name, leaf in leaves(state.params).items():
        np.testing.assert_array_equal(leaves(again.params)[name], leaf, err_msg=name)


@pytest.mark.slow
def test_reference_of_a_continued_adapter_is_the_adapter(base, source, tmp_path):
    first = dpo_config(base, source, tmp_path, "first", steps=2)
    train(first)
    second = dpo_config(base, source, tmp_path, "second", steps=2, init_adapter=first.run_dir)
    train(second)
    rows = [row for row in read_metrics(f"{second.run_dir}/metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    reference = np.load(f"{second.run_dir}/{FILE}")
    cache = build_cache(second.data)
    assert reference.shape == cache.tokens.shape
    # Exactly the tokens that are trained on have one.
    np.testing.assert_array_equal(reference < 0, cache.weights > 0)
    (batch, *_) = held_out_batches(dataclasses.replace(cache, reference=reference), second.data)
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        from gptoss_jax.checkpoints.load import from_pretrained

        found, _ = token_log_probs(from_pretrained(first.run_dir), batch)
    np.testing.assert_allclose(found, batch[REFERENCE_FIELD], rtol=1e-5, atol=1e-5)
    # The reference stays what it was, whatever a resumed run is told.
    again = dataclasses.replace(second, steps=3, init_adapter=None)
    train(again)
    (tmp_path / "second" / FILE).unlink()
    with pytest.raises(
        ValueError, match="is gone: the run needs the log-probabilities of its reference model"
    ):
        train(dataclasses.replace(second, steps=4))


def test_reference_of_an_adapter_that_init_from_names(base, source, tmp_path):
    first = dpo_config(base, source, tmp_path, "first", steps=2)
    train(first)
    second = dpo_config(base, source, tmp_path, "second", steps=1, init_from=first.run_dir)
    train(second)
    rows = [row for row in read_metrics(f"{second.run_dir}/metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (tmp_path / "second" / FILE).exists()


def test_command_line(base, source, tmp_path, capsys):
    assert main.main(["inspect-data", "quickstart_dpo", "--data.source", source.source, "--data.tokenizer",
                      "bpe:300", "--data.cache-dir", source.cache_dir, "--examples", "2"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert (
        "pairs of answers: 60" in said and "It is 0." in said.replace("│", "") and "equal answers 2" in said
    )
