"""In every locale, text files are UTF-8 and any text can be printed."""

import ast
import io
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tokenizers
from helpers.xla_flags import FAST_COMPILE

from gptoss_jax import startup
from gptoss_jax.config.paths import path_exists, require_utf8, user_path, user_text
from gptoss_jax.data.tokenizer import load_tokenizer
from gptoss_jax.data.tokenizer_json import train_bpe

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [ROOT / "train.py"]
SOURCES += [path for name in ("gptoss_jax", "benchmarks", "configs") for path in (ROOT / name).rglob("*.py")]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
WORDS = [
    "caf\u00e9",
    "Stra\u00dfe",
    "na\u00efve",
    "\u00fcber",
    "\u65e5\u672c",
    "\u043f\u0440\u0438",
    "the",
    "cat",
]
TINY = """
--model.num-hidden-layers 1 --model.hidden-size 16 --model.intermediate-size 16 --model.num-attention-heads 2
--model.num-key-value-heads 1 --model.head-dim 8 --model.num-local-experts 2 --model.num-experts-per-tok 1
--model.vocab-size 512 --model.compute-dtype float32 --data.seq-len 32 --data.batch-size 4
--data.tokenizer bpe:400 --eval.sample-tokens 4 --steps 2 --run-dir run --data.cache-dir cache
--data.source text:book.txt
"""
# Runs train.py and, given a prompt, gptoss. Opening a text file without an encoding is an error.
STRICT = """
import runpy, sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"gptoss_jax(\\.|$)")
prompt, program = sys.argv.pop(1), sys.argv.pop(1)
def gptoss(*words):
    from gptoss_jax.cli import main as cli
    assert cli.main(words) == 0
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as left:
    assert left.code == 0
if prompt:
    gptoss("generate", "run", "--max-new-tokens", "3", "--prompt", prompt)
    gptoss("report", "run")
    gptoss("--help")
"""


def opened_without_encoding(source):
    """Returns the lines of calls that read or write text in the locale's encoding."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        owner = getattr(getattr(call.func, "value", None), "id", "")
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        constants = [getattr(value, "value", None) for value in (*call.args, *keywords.values())]
        binary = any(isinstance(mode, str) and mode in ("rb", "wb", "ab", "r+b", "xb") for mode in constants)
        # A function that is only called read_text reads no file.
        opens = isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text")
        opens = opens or name in ("fdopen", "NamedTemporaryFile", "TextIOWrapper")
        opens = opens or (name == "open" and owner != "os")
        opens = opens or bool(keywords.keys() & {"text", "universal_newlines"} and name in ("run", "Popen"))
        if opens and not binary and "encoding" not in keywords:
            lines.append(call.lineno)
    return lines


def test_calls_without_an_encoding_are_found():
    source = """
open(path)
(folder / name).read_text()
path.write_text("x")
subprocess.run(command, text=True)
open(path, "rb"), os.open(path, 0), open(path, encoding="utf-8"), path.read_text(encoding="utf-8")
read_text(message)
"""
    assert opened_without_encoding(source) == [2, 3, 4, 5]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_with_an_encoding(path):
    assert opened_without_encoding(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"\xc3\xa9 ? =\n"),
        ("iso-8859-1", b"\xc3\xa9 \xdf =\n"),
        ("utf-8", b"\xc3\xa9 \xc3\x9f \xe2\x94\x81\n"),
    ],
)
def test_any_text_can_be_printed(monkeypatch, encoding, printed):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    # The first character is how Python represents a file name that the locale cannot decode.
    assert startup.run(lambda: print("\udcc3\udca9 \u00df \u2501"), "x") == 0
    assert startup.run(lambda: user_path("~\u2501", "run_dir"), "x") == 2
    out.flush()
    assert out.buffer.getvalue() == printed
    assert err.buffer.getvalue().startswith(b"x: error: run_dir is ")


def test_undecodable_command_line_text_is_utf8():
    assert user_text("a\udcc3\udca9") == "a\u00e9" and user_text("\u00df") == "\u00df"
    assert user_text("\udcff") == "\ufffd"


def test_paths_outside_the_locales_encoding(monkeypatch):
    require_utf8("/runs/\u00e9", "run_dir")
    with pytest.raises(ValueError, match="run_dir is '/runs/.udcff': checkpoints need a path in UTF-8"):
        require_utf8("/runs/\udcff", "run_dir")
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("iso-8859-1", "surrogateescape"))
    assert user_path("/runs/\u00e9", "run_dir").name == "\u00e9"
    with pytest.raises(ValueError, match="run_dir is .*: checkpoints need a path in UTF-8"):
        require_utf8("/runs/\u00e9", "run_dir")
    with pytest.raises(ValueError, match="run_dir is .*: the locale's encoding, .*, cannot represent it"):
        user_path("/runs/\u65e5", "run_dir")


def test_invalid_paths_do_not_exist(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("")
    (tmp_path / "link").symlink_to("gone")
    assert path_exists(f"{tmp_path}/a", "x") and path_exists(f"{tmp_path}/link", "x")
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("ascii", "surrogateescape"))
    for text in (f"{tmp_path}/b", "", "a\0b", "~nobody-here/a", f"{tmp_path}/\u65e5"):
        assert not path_exists(text, "x")


def latin_locale(folder):
    """The environment of an ISO-8859-1 locale, which is created here; skips the test if it cannot be."""
    name = "en_US.ISO-8859-1"
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / name)]
    if not shutil.which("localedef"):
        pytest.skip("needs localedef to make a locale in ISO-8859-1")
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        pytest.skip(f"localedef makes no {name}: {done.stderr.decode(errors='replace').strip()}")
    return {"LOCPATH": str(folder), "LC_ALL": name, "PYTHONUTF8": "0"}


@pytest.fixture
def run(tmp_path):
    """(locale, prompt, options) -> the output of train.py and, given a prompt, of gptoss."""
    text = "\n<|endoftext|>\n".join(" ".join(WORDS[i % 7 :] + WORDS) + "." for i in range(80))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")

    def start(locale, prompt, *options):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
        kept |= {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": FAST_COMPILE,
            "COLUMNS": "100",
        }
        python = [sys.executable, "-X", "warn_default_encoding", "-W", "ignore::EncodingWarning"]
        command = [*python, "-c", STRICT, prompt, str(ROOT / "train.py"), *TINY.split(), *options]
        done = subprocess.run(command, cwd=tmp_path, env=kept | locale, capture_output=True)
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
        return done.stdout

    return start


@pytest.mark.slow
def test_a_run_in_the_c_locale(tmp_path, run):
    # The locale cannot encode the name of the eos token.
    model = tokenizers.Tokenizer.from_str(train_bpe(400, [" ".join(WORDS)]))
    model.add_special_tokens(["<\uff5cfin\uff5c>"])
    (tmp_path / "words.json").write_text(model.to_str(), encoding="utf-8")
    spec = "file:words.json#eos=<\uff5cfin\uff5c>"
    printed = run(C_LOCALE, "Stra\u00dfe \u65e5\u672c", "--data.tokenizer", spec)
    assert b"xz -9" in printed and b"\nStra?e ??" in printed
    assert b"\nrun/report.png\n" in printed and b"gpt-oss in JAX" in printed
    # The spec is printed with the bytes given on the command line.
    assert printed.replace(spec.encode(), b"").isascii()
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.eos_id == tokenizer.special_tokens["<\uff5cfin\uff5c>"]


@pytest.mark.slow
def test_a_run_resumes_in_another_locale(tmp_path, run):
    assert b"xz -9" in run(latin_locale(tmp_path), "")
    (made,) = tmp_path.glob("cache/*/tokenizer.json")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == made.read_bytes()
    # Resuming requires that the checkpoint's record and the run folder have the same tokenizer.
    printed = run(C_LOCALE, "Stra\u00dfe \u65e5\u672c")
    assert b"This run is finished" in printed and b"\nStra?e ??" in printed and printed.isascii()
