"""Runs that train adapters: their checkpoints, base models, resuming, exporting and merging."""

import dataclasses
import json
import re
import shutil
import warnings

import jax
import numpy as np
import pytest
from helpers.adapters import FILES, random_adapter
from helpers.bases import base_maker
from helpers.stories import stories_config
from helpers.weights import BFLOAT16, leaves, logits, tensors_of
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints.adapters import export_adapter, read_adapter, write_adapter
from gptoss_jax.checkpoints.export import convert, save_pretrained
from gptoss_jax.checkpoints.load import from_pretrained, load_model
from gptoss_jax.checkpoints.merge import merge
from gptoss_jax.checkpoints.readers import describe_base
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.checkpoints.run_params import read_checkpoint
from gptoss_jax.cli import main
from gptoss_jax.config import (
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.transformer import bind, get_params, init_params
from gptoss_jax.training.base_weights import check_base, find_adapter
from gptoss_jax.training.loop import train
from gptoss_jax.training.metrics import read_metrics

MODEL = ModelConfig(
    vocab_size=263, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, num_local_experts=5, num_experts_per_tok=2, sliding_window=9,
    max_position_embeddings=128, rope_theta=1000.0, rope_scaling=None, initializer_range=0.1,
    layer_types=("full_attention",) * 2,
)  # fmt: skip
LORA = LoraConfig(rank=4, alpha=8.0)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """(form) -> a base model in a Hugging Face format, with the tokenizer of bytes."""
    return base_maker(tmp_path_factory.mktemp("base"), MODEL)


@pytest.fixture(scope="module")
def make_config(base_folder, tmp_path_factory):
    """(run_dir, form, changes) -> a run of six steps that saves at every second one."""
    data = stories_config(tmp_path_factory.mktemp("text"))

    def make(run_dir, form="float32", **changes):
        values = {
            "model": dataclasses.replace(MODEL, lora=LORA),
            "data": data,
            "optim": OptimConfig(learning_rate=3e-3, warmup_steps=0, schedule="constant"),
            "checkpoint": CheckpointConfig(every=2, keep=9),
            "eval": EvalConfig(every=3, batches=1, sample_tokens=0),
            "steps": 6,
            "run_dir": str(run_dir),
            "init_from": str(base_folder(form)),
        }
        return TrainConfig(**(values | changes))

    return make


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A complete run on a float32 base: (config, final state)."""
    config = make_config(tmp_path_factory.mktemp("runs") / "whole")
    return config, train(config)


@pytest.fixture
def copied(finished, tmp_path):
    """The config of a copy of the finished run."""
    shutil.copytree(finished[0].run_dir, tmp_path / "copy")
    return dataclasses.replace(finished[0], run_dir=str(tmp_path / "copy"))


def results(config):
    """What must be bit-identical in two equivalent runs."""
    names = ("step", "loss", "grad_norm", "val_loss", "tokens_seen")
    rows = read_metrics(f"{config.run_dir}/metrics.jsonl")
    return [{name: row.get(name) for name in names} for row in rows]


def assert_same_params(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_checkpoints_hold_what_was_trained(finished, base_folder):
    config, state = finished
    _, base, params = read_checkpoint(config.run_dir)
    trained = {name: leaf for name, leaf in leaves(state.params).items() if "lora" in name}
    assert len(trained) == 2 * 6
    checkpoints = Checkpoints(config.run_dir, read_only=True)
    assert checkpoints.steps == [2, 3, 4, 6]
    assert leaves(params).keys() == trained.keys()
    if checkpoints.best_step == 6:
        assert_same_params(leaves(params), trained)
    assert (base.folder, base.step) == (str(base_folder("float32")), None)
    assert checkpoints.record(6)["base"] == dataclasses.asdict(base)
    checkpoints.close()
    # Everything that had tokens has changed.
    assert all(np.asarray(leaf).any() for leaf in trained.values())


def test_run_is_loaded_with_its_base(finished, base_folder):
    config, state = finished
    model, tokenizer = load_model(config.run_dir)
    assert tokenizer.name == "bytes" and model.config.lora == LORA
    found, base = (leaves(get_params(one)) for one in (model, from_pretrained(base_folder("float32"))))
    assert_same_params({name: found[name] for name in base}, base)
    expected = read_adapter(config.run_dir, MODEL)
    again = from_pretrained(base_folder("float32"), adapter=config.run_dir)
    np.testing.assert_array_equal(logits(again, TOKENS), logits(model, TOKENS))
    down = expected.tensors["moe.down_lora_b", 1].array
    np.testing.assert_array_equal(found["blocks.0.moe.down_lora_b"][1], down)
    wide = from_pretrained(config.run_dir, dtype="bfloat16")
    assert wide.blocks[0].moe.down.get_value().dtype == BFLOAT16
    assert wide.blocks[0].moe.down_lora_a.get_value().dtype == np.float32


def test_resumed_run_gives_the_same_losses(finished, copied, capsys):
    """As after kill -9: the last two checkpoints are not there, the metrics are."""
    for step in (4, 6):
        shutil.rmtree(f"{copied.run_dir}/checkpoints/{step}")
    state = train(copied)
    assert "Resuming from step 3" in capsys.readouterr().out
    assert results(copied) == results(finished[0])
    assert_same_params(leaves(state.params), leaves(finished[1].params))
    assert_same_params(
        leaves(read_checkpoint(copied.run_dir, 6)[2]), leaves(read_checkpoint(finished[0].run_dir, 6)[2])
    )


def test_base_that_is_gone_or_has_changed(finished, copied, make_config, base_folder, tmp_path):
    moved = shutil.copytree(base_folder("float32"), tmp_path / "moved")
    folder = shutil.copytree(copied.run_dir, tmp_path / "run")

    def pointing_to(path):
        """Changes where the checkpoints say that the base is."""
        for record in folder.glob("checkpoints/*/record/metadata"):
            values = json.loads(record.read_text())
            values["base"]["folder"] = values["config"]["init_from"] = str(path)
            record.write_text(json.dumps(values))
        return dataclasses.replace(copied, run_dir=str(folder), init_from=str(path), steps=8)

    gone = pointing_to(tmp_path / "gone")
    message = f"^{folder}: holds an adapter, and its base model {tmp_path}/gone is gone; continue"
    with pytest.raises(ValueError, match=message):
        train(gone)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        merge(folder, tmp_path / "out")
    # What needs no base still works, and a copy of the base will do.
    export_adapter(folder, tmp_path / "adapter")
    assert from_pretrained(moved, adapter=folder).config.lora
    again = dataclasses.replace(gone, init_from=str(moved), steps=6)
    assert int(train(again).step) == 6
    changed = shutil.copytree(moved, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj"] *= 1.25
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"init_from is '{changed}': not the base model of the run in"):
        train(dataclasses.replace(gone, init_from=str(changed)))
    with pytest.raises(ValueError, match=f"^{folder}: .* its base model {changed} has changed since the run"):
        from_pretrained(pointing_to(changed).run_dir)


def test_adapter_of_a_run_round_trips_through_peft(finished, base_folder, tmp_path, capsys):
    config, _ = finished
    assert main.main(["export-adapter", config.run_dir, str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().out
    assert "adapter of rank 4 (2 in each expert) on q, k, v, out, gate_up, down, 0.03 MB" in said
    values = json.loads((tmp_path / "adapter" / FILES[1]).read_text())
    assert values["base_model_name_or_path"] == str(base_folder("float32"))
    expected = logits(from_pretrained(config.run_dir), TOKENS)
    found = logits(from_pretrained(base_folder("float32"), adapter=tmp_path / "adapter"), TOKENS)
    np.testing.assert_array_equal(found, expected)
    merge(config.run_dir, tmp_path / "merged")
    merged = logits(from_pretrained(tmp_path / "merged"), TOKENS)
    assert np.abs(merged - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(logits(from_pretrained(base_folder("float32")), TOKENS) - expected).max() > 1e-2
    assert (tmp_path / "merged/tokenizer.json").is_file()


def test_commands_take_an_adapter(finished, base_folder, tmp_path, capsys):
    config, _ = finished
    said = []
    for folder, *adapter in ([config.run_dir], [str(base_folder("float32")), "--adapter", config.run_dir]):
        flags = ["--prompt", "Story", "--max-new-tokens", "8", "--temperature", "0"]
        assert main.main(["generate", folder, *adapter, *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main.main(["generate", config.run_dir, "--adapter", config.run_dir, "--prompt", "S"]) == 2
    assert "already has an adapter; name its base model instead" in capsys.readouterr().err
    assert main.main(["convert", config.run_dir, str(tmp_path / "out")]) == 2
    assert "use gptoss merge to write a model with merged weights" in capsys.readouterr().err
    assert main.main(["export-adapter", str(base_folder("float32")), str(tmp_path / "out")]) == 2
    assert "must be a run folder that trained adapters" in capsys.readouterr().err


def test_adapter_on_another_base(finished, make_config, base_folder, tmp_path):
    run, base, other = finished[0].run_dir, base_folder("float32"), tmp_path / "other"
    save_pretrained(bind(MODEL, init_params(MODEL, jax.random.key(4))), other, "float32", tokenizer=base)
    message = f"^{run}: trained on the weights of {base}, which differ from those of {other}$"
    with pytest.warns(UserWarning, match=message):
        merge(other, tmp_path / "merged", run)
    with pytest.warns(UserWarning, match=message):
        check_base(make_config(tmp_path / "x", init_from=str(other), init_adapter=run), print)
    export_adapter(run, tmp_path / "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained(base, adapter=run)
        # PEFT's files do not say what they were trained on.
        from_pretrained(other, adapter=tmp_path / "peft")


def test_runs_without_an_adapter_and_without_lora(finished, make_config, tmp_path):
    run, plain = finished[0].run_dir, tmp_path / "plain"
    message = f"^init_from is '{run}': holds an adapter of rank 4; add --model.lora.rank 4 to"
    with pytest.raises(ValueError, match=message):
        train(make_config(tmp_path / "x", model=MODEL, init_from=run))
    plain.mkdir()
    make_config(plain, model=MODEL, init_from=None).save(plain / "config.json")
    with pytest.raises(ValueError, match=f"^init_adapter is '{plain}': must be a run that trained"):
        find_adapter(make_config(tmp_path / "x", init_adapter=str(plain)))
    with pytest.raises(ValueError, match=f"^RUN is '{plain}': must be a run that trained"):
        export_adapter(plain, tmp_path / "x")
    (plain / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{plain}/config.json: not JSON"):
        export_adapter(plain, tmp_path / "x")


def test_nan_in_an_adapter_names_its_folder(base_folder, tmp_path):
    adapter = random_adapter(MODEL, LORA)
    adapter.tensors["attention.k_lora_b", 1].array[2] = np.nan
    write_adapter(adapter, MODEL, tmp_path / "a")
    message = f"^{tmp_path}/a: contains NaN or infinite values in .*layers.1.self_attn.k_proj.lora_B.weight$"
    with pytest.warns(UserWarning, match=message):
        from_pretrained(base_folder("float32"), adapter=tmp_path / "a")


def test_qlora_run(make_config, base_folder, tmp_path, capsys):
    model = dataclasses.replace(MODEL, lora=LORA, expert_format="mxfp4")
    config = make_config(tmp_path / "run", "mxfp4", model=model, steps=3)
    state = train(config)
    said = capsys.readouterr().out
    assert re.search("  lora .* parameters are trained: .*; experts packed in MXFP4\n", said)
    train(make_config(tmp_path / "unpacked", "mxfp4", steps=1))
    said = capsys.readouterr().out
    assert re.search("; experts unpacked, in float32\n", said)
    assert re.search("packed in MXFP4 and are unpacked in this run; --model.expert-format mxfp4 keeps", said)
    loaded = from_pretrained(config.run_dir)
    assert loaded.config.expert_format == "mxfp4" and loaded.config.lora
    unpacked = from_pretrained(config.run_dir, experts="float32")
    assert unpacked.config.expert_format == "plain"
    expected = logits(loaded, TOKENS)
    assert np.abs(logits(unpacked, TOKENS) - expected).max() < 1e-4 * np.abs(expected).max()
    assert "moe.down_blocks" in "".join(leaves(state.params))
    survival = merge(config.run_dir, tmp_path / "merged")
    assert tensors_of(tmp_path / "merged")["model.layers.0.mlp.experts.down_proj_blocks"].dtype == np.uint8
    assert survival["gate_up"].share < 0.5 < survival["q"].share
    with pytest.raises(ValueError, match="its experts are not in MXFP4"):
        train(make_config(tmp_path / "other", model=model))


def test_continuing_an_adapter(finished, make_config, base_folder, tmp_path):
    """From PEFT's files, or from a run, which is the same: a lower first loss than that of a new one."""
    config, _ = finished
    export_adapter(config.run_dir, tmp_path / "adapter")
    short = {"steps": 1, "eval": EvalConfig(every=9, batches=1, sample_tokens=0)}
    again = make_config(tmp_path / "run", init_adapter=str(tmp_path / "adapter"), **short)
    train(again)
    assert results(again)[0]["loss"] < results(config)[0]["loss"]
    adapter, same, third = map(find_adapter, (
        again, make_config(tmp_path / "x", init_from=config.run_dir),
        make_config(tmp_path / "x", init_adapter=config.run_dir),
    ))  # fmt: skip
    assert adapter.lora == same.lora == third.lora == dataclasses.replace(LORA, expert_rank=2)
    for place, tensor in adapter.tensors.items():
        np.testing.assert_array_equal(tensor.array, same.tensors[place].array)
        np.testing.assert_array_equal(tensor.array, third.tensors[place].array)
    # The base model of a run that continues a run is that of the first.
    assert describe_base(config.run_dir) == read_checkpoint(tmp_path / "run")[1]
    assert describe_base(config.run_dir).folder == str(base_folder("float32"))
    for lora, message in {
        dataclasses.replace(LORA, rank=6): "model.lora.targets|rank of q is 6, theirs 4",
        dataclasses.replace(LORA, alpha=4.0): "model.lora.alpha is 4.0, theirs 8.0",
        dataclasses.replace(LORA, targets=("q",)): r"model.lora.targets is \('q',\), theirs \('down', ",
    }.items():
        model = dataclasses.replace(MODEL, lora=lora)
        with pytest.raises(ValueError, match=f"init_from is .*: an adapter with other settings: .*{message}"):
            train(make_config(tmp_path / "bad", model=model, init_from=config.run_dir))
    message = (
        f"init_adapter is '{tmp_path}/adapter': {config.run_dir} .init_from. already has an adapter; name"
    )
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(again, init_from=config.run_dir, run_dir=str(tmp_path / "bad")))
    with pytest.raises(ValueError, match="init_adapter is 'x': needs model.lora: add --model.lora.rank"):
        make_config(tmp_path / "bad", model=MODEL, init_adapter="x")


def test_base_that_is_a_run(make_config, tmp_path, capsys):
    pretrained = make_config(tmp_path / "base", model=MODEL, init_from=None)
    (tmp_path / "base").mkdir()
    pretrained.save(tmp_path / "base/config.json")
    make_tokenizer("bytes").save(tmp_path / "base")

    def save(step):
        checkpoints = Checkpoints(pretrained.run_dir, keep=9)
        params = init_params(MODEL, jax.random.key(step))
        checkpoints.save(step, params, {"step": np.array(step)}, {"step": step})
        checkpoints.close()

    save(4)
    config = make_config(tmp_path / "run", init_from=pretrained.run_dir, steps=2)
    state = train(config)
    _, base, _ = read_checkpoint(config.run_dir)
    assert (base.folder, base.step) == (pretrained.run_dir, 4)
    model = from_pretrained(config.run_dir)
    found = leaves(get_params(model))
    assert_same_params(found, {name: leaf for name, leaf in leaves(state.params).items()})
    merge(config.run_dir, tmp_path / "merged")
    assert main.main(["export-adapter", config.run_dir, str(tmp_path / "adapter")]) == 0
    said = f"which PEFT and vLLM cannot load; convert it: gptoss convert {pretrained.run_dir} OUT\n"
    assert capsys.readouterr().out.endswith(f"The base model is a run, {said}")
    expected = logits(model, TOKENS)
    assert np.abs(logits(from_pretrained(tmp_path / "merged"), TOKENS) - expected).max() < 1e-4
    # The base is trained further; its checkpoint of step 4 stays the base of the adapter.
    save(5)
    np.testing.assert_array_equal(logits(from_pretrained(config.run_dir), TOKENS), expected)
    shutil.rmtree(tmp_path / "base/checkpoints/4")
    with pytest.raises(ValueError, match=f"its base model step 4 of {tmp_path}/base is gone"):
        from_pretrained(config.run_dir)


@pytest.mark.slow
def test_other_parameters_than_adapters(make_config, tmp_path):
    def with_norms(path):
        return is_adapter(path) or path[-1] == "scale"

    config = make_config(tmp_path / "run", steps=2)
    state = train(config, is_trainable=with_norms)
    model = from_pretrained(config.run_dir)
    assert_same_params(leaves(get_params(model)), leaves(state.params))
    message = "also trained attention_norm.scale, final_norm.scale, moe_norm.scale, not only adapters"
    with pytest.raises(ValueError, match=message):
        export_adapter(config.run_dir, tmp_path / "adapter")
    merge(config.run_dir, tmp_path / "merged")
    name = "model.layers.1.input_layernorm.weight"
    scales = leaves(state.params)["blocks.0.attention_norm.scale"]
    np.testing.assert_array_equal(tensors_of(tmp_path / "merged")[name], scales[1])
    message = r"of step 2 is of a run that trained other parameters \(it also has .* the same is_trainable"
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, steps=4))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["2"]


@pytest.mark.slow
def test_frozen_adapters_are_in_checkpoints(make_config, tmp_path):
    """Only B of k is trained: A, and the adapters of q, must stay what they were."""

    def is_trainable(path):
        return path[-1] == "k_lora_b"

    model = dataclasses.replace(MODEL, lora=LoraConfig(rank=4, targets=("q", "k")))
    whole, halves = (make_config(tmp_path / name, model=model, steps=4) for name in ("whole", "halves"))
    state = train(whole, is_trainable=is_trainable)
    assert_same_params(leaves(get_params(from_pretrained(whole.run_dir))), leaves(state.params))
    train(dataclasses.replace(halves, steps=2), is_trainable=is_trainable)
    again = train(halves, is_trainable=is_trainable)
    assert_same_params(leaves(again.params), leaves(state.params))
    assert leaves(read_checkpoint(whole.run_dir)[2]).keys() == {
        f"blocks.0.attention.{name}_lora_{part}" for name in "qk" for part in "ab"
    }
    export_adapter(whole.run_dir, tmp_path / "adapter")
    assert not read_adapter(tmp_path / "adapter", MODEL).tensors["attention.q_lora_b", 1].array.any()


def test_adapter_of_the_head_alone(make_config, base_folder, tmp_path):
    model = dataclasses.replace(MODEL, lora=LoraConfig(rank=4, targets=("head",)))
    config = make_config(tmp_path / "run", model=model, steps=1)
    train(config)
    assert read_adapter(config.run_dir, MODEL).tensors.keys() == {("head.lora_a", -1), ("head.lora_b", -1)}
    expected = logits(from_pretrained(config.run_dir), TOKENS)
    found = from_pretrained(base_folder("float32"), adapter=config.run_dir)
    np.testing.assert_array_equal(logits(found, TOKENS), expected)


def test_adapter_of_a_run_for_another_model(finished, tmp_path):
    other = dataclasses.replace(MODEL, hidden_size=96)
    with pytest.raises(ValueError, match=r"for another model: .*_lora_a of layer 0 has shape \[64, 4\]"):
        read_adapter(finished[0].run_dir, other)
    with pytest.raises(ValueError, match="the adapter is for another model: 2 layers"):
        read_adapter(finished[0].run_dir, dataclasses.replace(MODEL, num_hidden_layers=3, layer_types=None))
    write_adapter(random_adapter(MODEL, LORA), MODEL, tmp_path / "a")
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight has shape \[4, 64\], expected \[4, 96\]"):
        read_adapter(tmp_path / "a", other)
    with pytest.raises(ValueError, match="has an unmerged adapter: use gptoss merge"):
        convert(finished[0].run_dir, tmp_path / "new")
