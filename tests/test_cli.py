"""The command line: help, errors, and text that arrives in arbitrary chunks."""

import io
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
import tyro
from helpers.checkpoints import random_checkpoint
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints import load
from gptoss_jax.cli import main, train
from gptoss_jax.cli.terminal import Throughput
from gptoss_jax.config import ModelConfig, preset
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.inference import generate as generation
from gptoss_jax.inference.sampling_params import Completion, SamplingParams

ROOT = pathlib.Path(__file__).parents[1]


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--help"], ["usage: gptoss", "chat", "convert", "report", "Generate text", "Plot the training"]),
        (["-h"], ["usage: gptoss", "--version", "gptoss COMMAND --help"]),
        (
            ["generate", "--help"],
            ["FOLDER", "--prompt", "--max-new-tokens", "(default: 200,", "--top-k", "--top-p",
             "--min-p", "--stop-strings", "--seed", "most likely"],
        ),
        (
            ["chat", "--help"],
            ["FOLDER", "--reasoning", "{low,medium,high}", "--instructions", "--analysis", "{show,hide}",
             "--plain", "or 4096", "--temperature", "--seed"],
        ),
        (
            ["eval", "--help"],
            ["FOLDER", "--source", "--task", "(repeatable)", "--context", "--stride", "--batch-size",
             "--max-tokens", "--limit", "--num-fewshot", "--json"],
        ),
        (["convert", "--help"], ["SRC", "DST", "--experts", "{None,bfloat16,float32,mxfp4}", "original/"]),
        (["report", "--help"], ["RUN", "report.png"]),
    ],
)  # fmt: skip
def test_help(capsys, args, words):
    assert exit_code(args) == 0
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == []


def exit_code(args):
    """The exit code of a command line, whether tyro raises it or the command returns it."""
    try:
        return main.main(args)
    except SystemExit as done:
        return done.code


def test_the_overview_has_a_line_for_each_command(capsys):
    assert main.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 90
    shown = [line.split()[0] for line in lines if re.match("  [a-z]", line)]
    assert shown == list(main.COMMANDS) and len(shown) >= 11
    assert set(main.HEADINGS) <= set(shown)


def test_without_a_command_the_overview_is_an_error(capsys):
    assert exit_code([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: gptoss COMMAND")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("generte", "did you mean generate?"), ("--verbose", "gptoss --help lists the commands")],
)
def test_an_unknown_command(capsys, word, hint):
    assert main.main([word]) == 2
    assert capsys.readouterr().err == f"gptoss: error: {word!r} is not a command; {hint}\n"


def test_versions(capsys):
    assert main.main(["--version"]) == 0
    assert re.fullmatch(
        r"gptoss-jax [\d.]+, jax [\d.]+, flax [\d.]+, Python 3[\d.]+\n", capsys.readouterr().out
    )


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", [name for name in main.COMMANDS if name != "train"])
def test_help_ends_with_examples_that_parse(monkeypatch, capsys, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert exit_code([name, "--help"]) == 0
    shown = capsys.readouterr().out
    about, _, examples = shown.partition("\nExamples:\n")
    assert max(len(line) for line in about.splitlines() if not line.startswith("usage")) <= width
    commands = [line.strip() for line in examples.splitlines() if "gptoss " in line]
    assert len(commands) >= 2
    ran = []
    monkeypatch.setattr(main.COMMANDS[name], "run", lambda self: ran.append(self))
    for line in commands:
        words = shlex.split(line.rpartition("| ")[2])
        assert words[:2] == ["gptoss", name]
        assert main.main(words[1:]) == 0, line
    assert len(ran) == len(commands)


@pytest.mark.parametrize("command", ["gptoss train", "python train.py"])
def test_examples_of_train_parse(capsys, command):
    with pytest.raises(SystemExit):
        train.read_arguments(["--help"], command)
    _, _, examples = capsys.readouterr().out.partition("\nExamples:\n")
    commands = [line.strip().partition(f"{command}") for line in examples.splitlines()]
    folders = [train.read_arguments(shlex.split(rest), command).run_dir for _, _, rest in commands]
    assert folders == ["runs/quickstart", "runs/tinystories", "runs/books", "runs/mine"]


def test_no_color(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert exit_code(["report", "--help"]) == 0
    assert "\x1b[" in out.getvalue()
    out.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    assert exit_code(["report", "--help"]) == 0
    assert "Examples:" in out.getvalue() and "\x1b[" not in out.getvalue()


def test_help_does_not_wait_for_jax():
    # With -m, the package itself is the first module imported.
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gptoss_jax", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0 and "usage: gptoss" in run.stdout
    assert "tyro" in run.stderr and " jax\n" not in run.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate x --prompt a --temprature 1", "--temprature: no such option; did you mean --temperature?"),
        ("train --abc 1 --xyz=2", "--abc, --xyz: no such options; see gptoss train --help"),
        ("plan quickstart --model.remt block", "--model.remt: no such option; did you mean --model.remat?"),
        ("merge a b c", "'c': unexpected argument; see gptoss merge --help"),
        ("generate", "missing FOLDER and --prompt TEXT; see gptoss generate --help"),
        ("train --steps", "--steps: needs a value (INT); see gptoss train --help"),
        ("train --steps abc", "--steps is 'abc': must be an integer"),
        ("train --steps 0", "steps is 0: must be above 0"),
        ("train --optim.learning-rate high", "--optim.learning-rate is 'high': must be a number"),
        ("chat x --top-k 1.5", "--top-k is '1.5': must be an integer"),
        ("chat x --reasoning hi", "--reasoning is 'hi': must be low, medium or high"),
        ("convert a b --experts int4", "--experts is 'int4': must be bfloat16, float32, mxfp4 or None"),
    ],
)
def test_bad_arguments_are_one_line(capsys, line, said):
    assert exit_code(line.split()) == 2
    assert capsys.readouterr() == ("", f"gptoss: error: {said}\n")


def test_bad_arguments_without_the_private_hook_of_tyro(capsys, monkeypatch):
    monkeypatch.delattr(tyro._errors, "on_parse_error")
    assert exit_code(["train", "--steps", "abc"]) == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["report"]])
def test_a_folder_without_a_run(capsys, tmp_path, command):
    assert main.main([command[0], str(tmp_path / "none"), *command[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gptoss: error: ") and captured.err.count("\n") == 1
    assert str(tmp_path / "none") in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("one\n  two"), 2), (OSError("one two"), 1), (FileNotFoundError("one two"), 1)],
)
def test_errors_are_one_line(capsys, monkeypatch, error, code):
    def fail(run, adapter, mesh):
        raise error

    monkeypatch.setattr(load, "load_model", fail)
    assert main.main(["generate", "run", "--prompt", "a"]) == code
    assert capsys.readouterr() == ("", "gptoss: error: one two\n")


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(run, adapter, mesh):
        raise TypeError("a fault of ours")

    monkeypatch.setattr(load, "load_model", fail)
    with pytest.raises(TypeError):
        main.main(["generate", "run", "--prompt", "a"])


@pytest.fixture
def run(monkeypatch):
    """A fake run, and an engine that answers with the given chunks of bytes."""
    seen = types.SimpleNamespace(chunks=[], tokenizer=make_tokenizer("bytes"))
    seen.model = types.SimpleNamespace(config=ModelConfig(vocab_size=260))
    monkeypatch.setattr(load, "load_model", lambda folder, adapter, mesh: (seen.model, seen.tokenizer))

    def stream(model, prompts, params, *, tokenizer):
        assert model is seen.model and tokenizer is seen.tokenizer
        seen.prompts, seen.params = prompts, params
        for chunk in seen.chunks:
            if isinstance(chunk, BaseException):
                raise chunk
            yield [Completion(list(chunk), None, None)]

    monkeypatch.setattr(generation, "stream", stream)
    return seen


def test_generate_to_a_file(run, capsys):
    # 259 is only in the model's vocabulary, not in the tokenizer's.
    run.chunks = [b"w", b"\xc3", [0xB6, 259], b"rld \x1b[31m", b"\xe2"]
    assert main.main(["generate", "folder", "--prompt", "héllo ", "--top-k", "7", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "héllo wörld \x1b[31m\ufffd\n"
    assert captured.err.startswith("14 tokens · ") and captured.err.endswith(" tokens/s\n")
    assert run.prompts == [[256, *"héllo ".encode()]]
    assert run.params == SamplingParams(200, 0.8, top_k=7, seed=3, stop_tokens=(256,))


@pytest.mark.parametrize(("args", "most"), [([], 59), (["--max-new-tokens", "70"], 70)])
def test_the_default_number_of_tokens_fits_the_context(run, args, most):
    run.model.config = ModelConfig(vocab_size=260, max_position_embeddings=64, rope_scaling=None)
    run.chunks = [b"a"]
    assert main.main(["generate", "folder", "--prompt", "abcd", *args]) == 0
    assert run.params.max_new_tokens == most


def test_generate_until_a_string(run, capsys):
    run.chunks = [b"one, t", b"w", b"o. Three"]
    stops = ["--stop-strings", "two.", "--stop-strings", "Three"]
    assert main.main(["generate", "folder", "--prompt", "", *stops]) == 0
    assert capsys.readouterr().out == "one, \n"
    assert run.params.stop_strings == ("two.", "Three")


def test_generate_at_a_terminal(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    run.chunks = [b"a\n", b"\x1b[2Jb"]
    assert main.main(["generate", "folder", "--prompt", "Hi"]) == 0
    assert out.getvalue() == "\x1b[2mHi\x1b[0ma\n\\x1b[2Jb\n"
    assert err.getvalue().startswith("\x1b[2m7 tokens · ") and err.getvalue().endswith("\x1b[0m")


def test_an_empty_answer(run, capsys):
    run.chunks = [b""]
    assert main.main(["generate", "folder", "--prompt", ""]) == 0
    assert capsys.readouterr() == ("\n", "0 tokens · – tokens/s\n")


def test_throughput_of_one_chunk_is_unknown():
    speed = Throughput()
    list(speed.count([[7, 8], []]))
    assert str(speed) == "2 tokens · – tokens/s"


def test_an_interruption_ends_the_line(run, capsys):
    run.chunks = [b"wor", KeyboardInterrupt()]
    assert main.main(["generate", "folder", "--prompt", "the "]) == 130
    assert capsys.readouterr() == ("the wor\n", "gptoss: interrupted\n")


def test_broken_pipe(tmp_path):
    # The reader closes the pipe without reading anything.
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-c", "import dataclasses, sys; from gptoss_jax.cli import main\n"
         "@dataclasses.dataclass\nclass Talk:\n"
         "    def run(self): print('x' * 100_000, flush=True)\n"
         "main.COMMANDS['talk'] = Talk\nsys.exit(main.main(['talk']))"],
        stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert (run.returncode, run.stderr) == (1, "")


def test_convert(tmp_path, capsys):
    checkpoint = random_checkpoint(tmp_path / "packed", experts_per_token=2, form="mxfp4")
    assert main.main(["convert", str(checkpoint), str(tmp_path / "same")]) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(r".*/same: 950 kB written in \d+ s, peak memory [\d.]+ GB\n", shown.out)
    assert shown.err == ""
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "same"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert main.main(["convert", str(checkpoint), str(tmp_path / "plain"), "--experts", "bfloat16"]) == 0
    config, plain = (
        ModelConfig.from_hf(tmp_path / "plain"),
        load_file(tmp_path / "plain" / "model.safetensors"),
    )
    assert plain["model.layers.3.mlp.experts.down_proj"].shape == (
        config.num_local_experts, config.intermediate_size, config.hidden_size,
    )  # fmt: skip
    capsys.readouterr()
    assert main.main(["convert", str(checkpoint), str(tmp_path / "same")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_warning_is_one_line(tmp_path, capsys):
    checkpoint = random_checkpoint(tmp_path / "in", experts_per_token=1, form="float32")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.router.bias"][0] = np.nan
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert main.main(["convert", str(checkpoint), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert said.startswith("gptoss: warning: ") and said.count("\n") == 1
    assert "contains NaN or infinite values in model.layers.1.mlp.router.bias" in said


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--model.rope-scaling", "None"], ["model.rope-scaling=None"]),
        (["--model.remat=block", "--devices", "2"], ["model.remat=block"]),
        (["--model.layer-types", "full_attention", "sliding_attention"],
         ["model.layer-types=full_attention sliding_attention"]),
        (["--optim.beta1", "0.5", "--set", "steps=3"], ["optim.beta1=0.5", "steps=3"]),
    ],
)  # fmt: skip
def test_plan_takes_the_flags_of_train(words, settings, monkeypatch):
    read = []
    monkeypatch.setattr(preset, "read_preset", lambda path, flags, prog: read.append(flags) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main(["plan", "configs/quickstart.py", *words])
    expected = [setting.partition("=") for setting in settings]
    assert read == [[word for name, _, value in expected for word in (f"--{name}", *value.split())]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["generate", "NONE", "--prompt", "a"],
            "NONE: no such folder; name a run, a model folder or hf:OWNER/NAME",
        ),
        (["generate", "EMPTY", "--prompt", "a"], "EMPTY is not a model or a run: it has no config.json"),
        (["plan", "gpt_oss_20c"], "(did you mean gpt_oss_20b?); the presets are"),
    ],
)
def test_errors_say_the_next_step(tmp_path, capsys, args, words):
    (tmp_path / "EMPTY").mkdir()
    places = {name: str(tmp_path / name) for name in ("NONE", "EMPTY")}
    assert main.main([places.get(word, word) for word in args]) == 2
    said = capsys.readouterr().err
    assert words in said.replace(f"{tmp_path}/", "") and said.count("\n") == 1


def test_errors_of_the_system_name_the_file(monkeypatch, capsys):
    def fail(run, adapter, mesh):
        raise PermissionError(13, "Permission denied", "/x/y")

    monkeypatch.setattr(load, "load_model", fail)
    assert main.main(["generate", "run", "--prompt", "a"]) == 1
    assert capsys.readouterr().err == "gptoss: error: /x/y: permission denied\n"


def test_no_color_turns_off_dimmed_text(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    run.chunks = [b"a"]
    assert main.main(["generate", "folder", "--prompt", "Hi"]) == 0
    assert out.getvalue() == "Hia\n"
