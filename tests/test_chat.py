"""`gptoss chat`: sessions with scripted answers, a real base model, and Ctrl-C at a terminal."""

import dataclasses
import io
import os
import pty
import re
import select
import subprocess
import sys
import time
import types

import pytest

from gptoss_jax.checkpoints import load
from gptoss_jax.checkpoints.export import save_pretrained
from gptoss_jax.cli import main
from gptoss_jax.cli.chat import HELP
from gptoss_jax.cli.chat import Session as ChatSession
from gptoss_jax.config import ModelConfig
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.inference import chat, engine, generate
from gptoss_jax.inference.chat import HarmonyConversation, PlainConversation
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.model.transformer import bind

START = "<|start|>assistant"
THOUGHT, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
USER = "<|start|>user<|message|>"


class Session:
    """A chat session with scripted answers: lists of chunks, each text, bytes, or an exception to raise."""

    def __init__(self, tokenizer, conversation):
        self.tokenizer, self.conversation = tokenizer, conversation
        self.prompts, self.asked, self.out, self.notes = [], [], "", []

    def ids(self, chunk):
        if isinstance(chunk, bytes):
            table = {self.tokenizer.decode_bytes([token]): token for token in range(256)}
            return [table[bytes([byte])] for byte in chunk]
        tokens = []
        for piece in re.split(r"(<\|\w+\|>)", chunk):
            special = self.tokenizer.special_tokens.get(piece)
            tokens += self.tokenizer.encode(piece) if special is None else [special]
        return tokens

    def spell(self, tokens):
        names = {token: name.encode() for name, token in self.tokenizer.special_tokens.items()}
        return b"".join(names.get(one) or self.tokenizer.decode_bytes([one]) for one in tokens).decode()

    def run(self, lines, answers, context=4096, max_new_tokens=1000, seed=0, show_analysis=True):
        """Returns the written text, with dim text in brackets; notes and prompts are recorded separately."""
        answers, params = iter(answers), SamplingParams(max_new_tokens=max_new_tokens, seed=seed)

        def answer(prompt, params):
            self.prompts.append(self.spell(prompt))
            self.asked.append((params.max_new_tokens, params.seed))
            for chunk in next(answers):
                if isinstance(chunk, BaseException):
                    raise chunk
                yield self.ids(chunk)

        def write(text, dim):
            self.out += f"[{text}]" if dim else text

        session = ChatSession(self.conversation, params, context, answer, write, self.notes.append)
        session.show_analysis = show_analysis
        session.run(lines)
        return self.out.replace("][", "")

    def remarks(self):
        """The notes without the speed, which varies."""
        return [re.sub(r"^(\d+ tokens?) · (–|[\d,.]+) tokens/s", r"\1", note) for note in self.notes]


@pytest.fixture
def session(harmony):
    return Session(harmony, HarmonyConversation(harmony, "low", "Be brief.", "2026-01-31"))


@pytest.fixture
def plain():
    tokenizer = make_tokenizer("bytes")
    return Session(tokenizer, PlainConversation(tokenizer))


def test_a_conversation(session):
    answers = [
        [THOUGHT + "2 and", " 2<|end|>", START, FINAL + "4", "."],
        [FINAL + "5"],
    ]
    assert session.run(["2 + 2?", "", "plus 1?"], answers, seed=7) == "[2 and 2]\n\n4.\n5\n"
    first = session.prompts[0]
    assert "Current date: 2026-01-31\n\nReasoning: low\n" in first and "# Instructions\n\nBe brief." in first
    assert first.endswith(f"Be brief.<|end|>{USER}2 + 2?<|end|>{START}")
    assert session.prompts[1] == (
        first.removesuffix(START) + f"{START}{FINAL}4.<|end|>{USER}plus 1?<|end|>{START}"
    )
    assert session.remarks() == ["15 tokens", "4 tokens"]
    assert session.asked == [(1000, 7), (1000, 8)]


def test_a_question_from_python(session, monkeypatch):
    conversation, asked = HarmonyConversation(session.tokenizer), []

    def generate(model, prompts, params):
        asked.append((session.spell(prompts[0]), params.max_new_tokens, params.temperature))
        answer = THOUGHT + "2 and 2<|end|>" + START + FINAL + str(len(asked))
        return [types.SimpleNamespace(tokens=session.ids(answer))]

    monkeypatch.setattr(chat, "generate", generate)
    parts = conversation.ask("model", "a?", max_new_tokens=50, temperature=0.0)
    assert [(part.channel, part.text) for part in parts] == [("analysis", "2 and 2"), ("final", "1")]
    conversation.ask("model", "b?")
    (first, *settings), (second, *defaults) = asked
    assert settings == [50, 0.0] and defaults == [4096, 1.0]
    assert second == first.removesuffix(START) + f"{START}{FINAL}1<|end|>{USER}b?<|end|>{START}"


def test_hidden_analysis(session):
    answers = [
        [THOUGHT + "a<|end|>", START + "<|channel|>commentary<|message|>b<|end|>" + START + FINAL + "c"]
    ]
    assert session.run(["q"], answers, show_analysis=False) == "b\n\nc\n"


def test_ctrl_c_keeps_what_was_said(session):
    stop = KeyboardInterrupt()
    answers = [
        [THOUGHT + "t<|end|>" + START + FINAL + "one tw", stop],
        [THOUGHT + "hm", stop],
        [stop],
        # Within a character, and within a header.
        [FINAL + "a", "é".encode()[:1], stop],
        [FINAL + "b<|end|>" + START + "<|channel|>fi", stop],
        [FINAL + "c"],
    ]
    shown = session.run(list("abcdef"), answers)
    assert shown == "[t]\n\none tw\n[hm]\n\na\ufffd\nb\n\n<|start|>assistant<|channel|>fi\nc\n"
    assert session.remarks()[1:4] == ["4 tokens · stopped", "0 tokens · stopped", "5 tokens · stopped"]
    said = f"{USER}a<|end|>{START}{FINAL}one tw<|end|>{USER}b<|end|>{START}{THOUGHT}hm<|end|>{USER}c<|end|>"
    assert session.prompts[3].endswith(said + f"{USER}d<|end|>{START}")
    assert session.prompts[5].endswith(
        f"{USER}d<|end|>{START}{FINAL}a<|end|>{USER}e<|end|>{START}{FINAL}b<|end|>{USER}f<|end|>{START}"
    )


def test_a_call_is_shown(session):
    header = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    answers = [[THOUGHT + "t<|end|>", START + header + '{"city": "Oslo"}'], [FINAL + "x"]]
    shown = session.run(["q", "r"], answers, show_analysis=False)
    assert shown == '[to functions.weather: ]{"city": "Oslo"}\nx\n'
    assert session.remarks()[0].endswith("tokens · calls functions.weather, but no tools are connected")
    assert '<|constrain|>json<|message|>{"city": "Oslo"}<|call|><|start|>user' in session.prompts[1]


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (["Hello there"], "Hello there\n"),
        ([THOUGHT + "a<|end|>", START + "<|channel|>fin"], "[a]\n\n<|start|>assistant<|channel|>fin\n"),
        (["<|end|><|end|>", "\ufffd<|message|>x"], "<|end|><|end|>\ufffd<|message|>x\n"),
        ([FINAL + "a\n"], "a\n"),
        ([THOUGHT + "a\n\n<|end|>" + START + FINAL + "b"], "[a\n\n]b\n"),
        ([], "\n"),
    ],
)
def test_answers_outside_the_format(session, answer, shown):
    assert session.run(["q", "r"], [answer, [FINAL + "ok"]]) == shown + "ok\n"


def test_an_answer_that_is_cut_off(session):
    answers = [[FINAL + "a b"], [FINAL + "c"]]
    assert session.run(["q", "r"], answers, max_new_tokens=5) == "a b\nc\n"
    assert session.remarks() == ["5 tokens · stopped at --max-new-tokens 5", "4 tokens"]
    assert f"{FINAL}a b<|end|>{USER}r" in session.prompts[1]


def test_a_conversation_that_grows_too_long(session):
    length = len(session.conversation.prompt("q"))
    answers = [[FINAL + "a b"], [FINAL + "c"]]
    lines = ["q", "r", "/new", "q"]
    assert session.run(lines, answers, context=length + 5) == "a b\nc\n"
    limit = length + 5
    assert session.remarks() == [
        f"5 tokens · stopped at the model's limit of {limit} tokens; /new starts over",
        f"not sent: the conversation has {length + 13} tokens with this line; the model's limit is {limit}."
        " /new starts a new one",
        "new conversation",
        "4 tokens",
    ]
    assert session.asked == [(5, 0), (5, 1)]
    assert session.prompts[0] == session.prompts[1]


def test_commands(plain):
    lines = ["/help", " /new ", "/etc/hosts is", "/exit", "never"]
    assert plain.run(lines, [["x"]]) == "x\n"
    assert plain.notes[:2] == [HELP, "new conversation"] and len(plain.notes) == 3
    assert plain.prompts == ["<|endoftext|>/etc/hosts is"]


def test_plain_completion_remembers_nothing(plain):
    assert plain.run(["é ", "b"], [[b"\xc3", b"\xa9\xe2"], ["y"]]) == "é\ufffd\ny\n"
    assert plain.prompts == ["<|endoftext|>é ", "<|endoftext|>b"]
    assert plain.conversation.params.stop_tokens == (256,)


class Stdin(io.TextIOWrapper):
    def __init__(self, data):
        super().__init__(io.BytesIO(data), encoding="utf-8")


@pytest.fixture
def folder(monkeypatch):
    """(tokenizer, config, chunks of each answer) -> a fake folder, and the list of requests."""
    asked = []

    def load_folder(tokenizer, config, answers):
        model = types.SimpleNamespace(config=config)
        monkeypatch.setattr(load, "load_model", lambda folder, adapter, mesh: (model, tokenizer))

        class Engine:
            def __init__(self, model, tokenizer, *, num_slots):
                self.check = lambda prompt, params: asked.append((prompt, params))

        def stream_one(engine, prompt, params):
            asked.append((prompt, params))
            # The first entry of `asked` only checks the settings.
            return iter([Completion(list(chunk), None, None) for chunk in answers[len(asked) - 2]])

        monkeypatch.setattr(engine, "Engine", Engine)
        monkeypatch.setattr(generate, "stream_one", stream_one)
        return asked

    return load_folder


def test_the_command_with_a_chat_model(folder, harmony, session, monkeypatch, capsys):
    chunks = [session.ids(FINAL + "hé")]
    asked = folder(harmony, ModelConfig(vocab_size=201088), [chunks])
    monkeypatch.setattr(sys, "stdin", Stdin(b"a\xff\n"))
    line = ["chat", "x", "--reasoning", "high", "--instructions", "Be kind.", "--top-p", "0.9", "--seed", "3"]
    assert main.main(line) == 0
    captured = capsys.readouterr()
    assert captured.out == "hé\n"
    assert re.fullmatch(r"\d tokens · – tokens/s\n", captured.err)
    prompt, params = asked[1]
    stops = (200002, 199999, 200012)
    assert params == SamplingParams(4096, 1.0, top_p=0.9, seed=3, stop_tokens=stops)
    text = session.spell(prompt)
    assert "Reasoning: high" in text and "Be kind." in text and "a\ufffd<|end|>" in text
    assert re.search(r"Current date: \d{4}-\d\d-\d\d\n", text)


@pytest.mark.parametrize("flags", [[], ["--plain"]])
def test_the_command_with_a_base_model(folder, request, monkeypatch, capsys, flags):
    tokenizer = request.getfixturevalue("harmony") if flags else make_tokenizer("bytes")
    config = ModelConfig(vocab_size=tokenizer.vocab_size + 3)
    asked = folder(tokenizer, config, [[tokenizer.encode("b"), [tokenizer.vocab_size]], []])
    monkeypatch.setattr(sys, "stdin", Stdin(b"a\n\nc"))
    assert main.main(["chat", "x", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out == "b\n\n"
    assert captured.err.startswith("plain completion: every line is a separate text to continue\n2 tok")
    assert [prompt for prompt, _ in asked[1:]] == [
        [tokenizer.bos_id, *tokenizer.encode(text)] for text in "ac"
    ]
    stops = (200002, 199999, 200012) if flags else (256,)
    assert asked[1][1] == SamplingParams(200, 0.8, stop_tokens=stops)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instructions", "x"], "instructions is 'x': must be left out for plain completion"),
        (["--temperature", "-1"], "temperature is -1.0: must be 0 (greedy) or more, and fit in float32"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0: must be above 0"),
        (["--seed", "-1"], "seed is -1: must be from 0 to 4294967295"),
    ],
)
def test_invalid_settings_fail_before_the_first_line(monkeypatch, capsys, flags, message):
    model = types.SimpleNamespace(config=ModelConfig(vocab_size=260))
    loaded = (model, make_tokenizer("bytes"))
    monkeypatch.setattr(load, "load_model", lambda folder, adapter, mesh: loaded)
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    assert main.main(["chat", "x", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == f"gptoss: error: {message}"


def test_a_real_base_model(tiny_config, random_params, tmp_path):
    config = dataclasses.replace(tiny_config, vocab_size=259)
    save_pretrained(bind(config, random_params(config)), tmp_path / "model")
    make_tokenizer("bytes").save(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_jax", "chat", str(tmp_path / "model"), "--max-new-tokens", "9",
         "--top-k", "3"],
        input="The cat\n/help\n" + 200 * "x" + "\nThe dog\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Slow work is announced.
    notes = re.sub(r"(?m)^(loading|compiling|reading)\b.*\n", "", done.stderr).splitlines()
    assert notes[0].startswith("plain completion") and notes[2] == HELP
    assert notes[3].startswith("not sent: the conversation has 201 tokens with this line")
    for note in (notes[1], notes[4]):
        assert re.fullmatch(r"9 tokens · [\d.,]+ tokens/s · stopped at --max-new-tokens 9", note)
    assert len(done.stdout) >= 4 and done.stdout.endswith("\n")


AT_A_TERMINAL = """
import fcntl, itertools, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# Whoever started the tests may have told them to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from gptoss_jax.checkpoints import load
from gptoss_jax.cli.main import main
from gptoss_jax.config import ModelConfig
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.inference import chat, engine, generate
from gptoss_jax.inference.sampling_params import Completion

class Model:
    config = ModelConfig(vocab_size=260)

class Engine:
    def __init__(self, model, tokenizer, *, num_slots):
        pass

    def check(self, prompt, params):
        pass

def stream_one(engine, prompt, params):
    for number in itertools.count():
        time.sleep(0.01)
        yield Completion(list(b"%d " % number), None, None)

engine.Engine = Engine
generate.stream_one = stream_one
load.load_model = lambda folder, adapter, mesh: (Model, make_tokenizer("bytes"))
sys.exit(main(["chat", "x", "--max-new-tokens", "10000"]))
"""


def test_ctrl_c_at_a_terminal():
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL], stdin=inside, stdout=inside, stderr=inside,
        start_new_session=True, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(inside)
    seen = b""

    def wait_for(*expected):
        nonlocal seen
        deadline = time.monotonic() + 60
        for word in expected:
            while word not in seen:
                assert select.select([terminal], [], [], max(deadline - time.monotonic(), 0))[0], seen[-1000:]
                seen += os.read(terminal, 4096)
            seen = seen[seen.index(word) + len(word) :]

    def type(text):
        # readline misses signals that arrive while it reads a key.
        time.sleep(0.2)
        os.write(terminal, text)

    try:
        wait_for(b"> ")
        for line in (b"count\n", b"again\n"):
            type(line)
            wait_for(b"0 1 2 3 4 ")
            type(b"\x03")
            wait_for(b"tokens/s", b"stopped", b"> ")
        type(b"half a line")
        wait_for(b"half a line")
        type(b"\x03")
        wait_for(b"> ")
        type(b"\x03")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
