"""Stop tokens: every command ends answers at the ids named in the files of the model's folder."""

import dataclasses
import io
import json
import sys

import pytest

from gptoss_jax.checkpoints import export
from gptoss_jax.checkpoints.load import from_pretrained
from gptoss_jax.cli import main
from gptoss_jax.config import DataConfig, TrainConfig
from gptoss_jax.data import token_cache
from gptoss_jax.data.tokenizer import load_tokenizer, make_tokenizer
from gptoss_jax.inference.chat import HarmonyConversation
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import bind
from gptoss_jax.training import setup

BYTES = make_tokenizer("bytes")
PROMPT = "the cat"
HARMONY_STOPS = [200002, 199999, 200012]


@pytest.fixture(scope="module")
def config(tiny_config):
    return dataclasses.replace(tiny_config, vocab_size=259)


@pytest.fixture(scope="module")
def model(config, random_params):
    return bind(config, random_params(config))


@pytest.fixture(scope="module")
def answer(model):
    """The continuation of the prompt without stop tokens."""
    prompt = [BYTES.bos_id, *PROMPT.encode()]
    (completion,) = generate(model, [prompt], SamplingParams(max_new_tokens=16))
    return completion.tokens


@pytest.fixture
def folder(model, tmp_path):
    """(file, its eos ids) -> a folder of the model whose file names these ids."""

    def make(name, ids):
        folder = tmp_path / "model"
        export.save_pretrained(model, folder)
        BYTES.export(folder)
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | {"eos_token_id": ids}))
        return folder

    return make


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_id_ends_an_answer(folder, answer, file, monkeypatch, capsys):
    # The last one in the list occurs first in the answer.
    ids = [answer[9], answer[4]]
    end = min(map(answer.index, ids))
    text = BYTES.decode([token for token in answer[:end] if token < 257])
    place = folder(file, ids)
    assert end > 0 and load_tokenizer(place).stop_ids == (*ids, 256)
    greedy = ["--temperature", "0", "--max-new-tokens", "16"]
    assert main.main(["generate", str(place), "--prompt", PROMPT, *greedy]) == 0
    assert capsys.readouterr().out == f"{PROMPT}{text}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert main.main(["chat", str(place), *greedy]) == 0
    assert capsys.readouterr().out == text.removesuffix("\n") + "\n"
    # In Python they are passed explicitly.
    params = SamplingParams(stop_tokens=load_tokenizer(place).stop_ids)
    (completion,) = generate(from_pretrained(place), [[256, *PROMPT.encode()]], params)
    assert completion.tokens == answer[:end]


def test_bad_ids_are_one_line(folder, capsys):
    place = folder("generation_config.json", [97, "b"])
    assert main.main(["generate", str(place), "--prompt", PROMPT]) == 2
    path = place / "generation_config.json"
    expected = f"{path}: eos_token_id is [97, 'b']: must be a token id, or a list of them"
    assert capsys.readouterr().err == f"gptoss: error: {expected}\n"


def test_a_harmony_chat_stops_at_named_ids(harmony):
    assert list(harmony.stop_ids) == HARMONY_STOPS
    named = dataclasses.replace(harmony, _named_stop_ids=(97, 200002))
    assert HarmonyConversation(named).params.stop_tokens == (97, 200002, 199999, 200012)


def test_export_writes_stop_tokens(model, tmp_path, harmony):
    BYTES.save(tmp_path / "bytes")
    export.save_pretrained(model, tmp_path / "a", tokenizer=tmp_path / "bytes")
    written = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    # An existing file is copied; a missing one is written from config.json.
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    export.convert(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"eos_token_id": [3, 4]}'
    (tmp_path / "b" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, 6]}))
    export.convert(tmp_path / "b", tmp_path / "c")
    written = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 256, "eos_token_id": [5, 6], "pad_token_id": 256}
    # Without known stop tokens, no file is written.
    export.save_pretrained(model, tmp_path / "d")
    assert not (tmp_path / "d" / "generation_config.json").exists()
    # gpt-oss's vocabulary: the published values.
    ids = export._token_ids(None, harmony)
    assert ids == {"bos_token_id": 199998, "eos_token_id": 200002, "pad_token_id": 199999}
    assert export._generation_ids(ids, harmony) == ids | {"eos_token_id": HARMONY_STOPS}


def test_a_run_keeps_the_stop_tokens_of_its_initial_weights(folder, tmp_path):
    place, run_dir = folder("generation_config.json", [97, 98]), tmp_path / "run"
    config = TrainConfig(data=DataConfig(tokenizer="bytes"), run_dir=str(run_dir))
    setup.save_tokenizer(config, BYTES)
    assert [path.name for path in run_dir.iterdir()] == ["tokenizer_name.txt"]
    assert setup.stop_tokens(run_dir, BYTES) == (256,)
    setup.save_tokenizer(dataclasses.replace(config, init_from=str(place)), BYTES)
    assert load_tokenizer(run_dir).stop_ids == setup.stop_tokens(run_dir, BYTES) == (97, 98, 256)
    # A new run with random weights in the same folder.
    setup.save_tokenizer(config, BYTES)
    assert load_tokenizer(run_dir).stop_ids == (256,)


@pytest.mark.parametrize("named", [None, 97])
def test_the_end_of_a_turn_survives_training_and_export(folder, model, tmp_path, named):
    # In a chat model's files, eos is the end of a turn, <|im_end|>; <|endoftext|> ends a document.
    place = folder("generation_config.json", named)
    values = json.loads((place / "tokenizer.json").read_text())
    (end,) = values["added_tokens"]
    values["added_tokens"].append(end | {"id": 257, "content": "<|im_end|>"})
    (place / "tokenizer.json").write_text(json.dumps(values))
    (place / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    expected = (257, 256) if named is None else (97, 257, 256)
    assert load_tokenizer(place).stop_ids == expected

    (tmp_path / "book.txt").write_text("the cat sat on the mat. " * 40)
    data = DataConfig(
        source=f"text:{tmp_path}/book.txt",
        tokenizer=f"file:{place}/tokenizer.json",
        cache_dir=str(tmp_path / "cache"),
    )
    run = tmp_path / "run"
    config = TrainConfig(data=data, run_dir=str(run), init_from=str(place))
    for _ in "built", "opened again":
        tokenizer = token_cache.build_cache(data).tokenizer
        assert tokenizer.stop_ids == (257, 256)
    setup.save_tokenizer(config, tokenizer)
    config.save(run / "config.json")
    assert load_tokenizer(run).stop_ids == setup.stop_tokens(run, tokenizer) == expected
    export.save_pretrained(model, tmp_path / "out", tokenizer=run)
    assert load_tokenizer(tmp_path / "out").stop_ids == expected
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(expected)
