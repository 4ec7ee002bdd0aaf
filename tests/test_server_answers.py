"""Answers as deltas: whatever tokens a model writes, nothing is an error and no text is lost."""

import functools
import re

import numpy as np
import pytest
from helpers.scripted_engine import encode_special, tiny_tokenizer

from gptoss_jax.data.harmony import AnswerReader as HarmonyReader
from gptoss_jax.data.harmony import Harmony
from gptoss_jax.inference.sampling_params import Completion
from gptoss_jax.server.answers import AnswerReader, logprob_json

ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tokens_of(tokenizer):
    """(text) -> tokens, with special tokens for their names."""

    return functools.partial(encode_special, tokenizer)


@pytest.fixture(scope="module")
def read(tokenizer, tokens_of):
    """(answer, reason, chunk, functions, stop) -> the reader after the answer, and its deltas."""

    def run(answer, reason="stop", chunk=3, functions=("f", "g"), stop=(), stop_token=None):
        tokens = tokens_of(answer) if isinstance(answer, str) else answer
        reader, deltas = AnswerReader(Harmony(tokenizer), functions, stop), []
        for i in range(0, max(len(tokens), 1), chunk):
            some = tokens[i : i + chunk]
            is_last = i + chunk >= len(tokens)
            logprobs, top = [-float(k % 7) for k in some], [[(k, -1.0)] for k in some]
            part = Completion(some, logprobs, reason if is_last else None, top)
            deltas += reader.feed(part)
        return reader, deltas

    return run


def joined(deltas):
    """(kind, name of the call, text) of each message."""
    found = {}
    for delta in deltas:
        key = (delta.message, delta.kind, delta.call and delta.call.name)
        found[key] = found.get(key, "") + delta.text
    return [(kind, name, text) for (_, kind, name), text in found.items()]


@pytest.mark.parametrize(
    ("answer", "expected", "reason"),
    [
        (f"{ANALYSIS}Hm.{NEXT}{FINAL}Hi.", [("reasoning", None, "Hm."), ("content", None, "Hi.")], "stop"),
        ("Hello world", [("content", None, "Hello world")], "stop"),
        (f"{FINAL}a<|end|>b", [("content", None, "a"), ("content", None, "b")], "stop"),
        (f"{ANALYSIS}cut", [("reasoning", None, "cut")], "stop"),
        (
            "<|channel|>commentary<|message|>I look." + NEXT + "<|channel|>commentary to=functions.f "
            '<|constrain|>json<|message|>{"a":1}',
            [("content", None, "I look."), ("call", "f", '{"a":1}')],
            "tool_calls",
        ),
        ("<|channel|>analysis to=functions.f<|message|>{}", [("call", "f", "{}")], "tool_calls"),
        (" to=functions.f<|channel|>final json<|message|>{}", [("call", "f", "{}")], "tool_calls"),
        ("<|channel|>commentary to=g<|message|>{}", [("call", "g", "{}")], "tool_calls"),
        ("<|channel|>commentary to=functions.new<|message|>{", [("call", "new", "{")], "tool_calls"),
        ("<|channel|>commentary to=other<|message|>{}", [("content", None, "{}")], "stop"),
        ("<|channel|>analysis to=python<|message|>1", [("reasoning", None, "1")], "stop"),
        ("<|channel|>commentary to=functions.f<|message|>", [("call", "f", "")], "tool_calls"),
        ("<|channel|>commentary to=f to=g<|message|>{}",
         [("content", None, "<|channel|>commentary to=f to=g<|message|>{}")], "stop"),
        ("<|channel|>anal", [("content", None, "<|channel|>anal")], "stop"),
    ],
)  # fmt: skip
def test_kinds_of_messages(read, answer, expected, reason):
    for chunk in (1, 4, 1000):
        reader, deltas = read(answer, chunk=chunk)
        assert (joined(deltas), reader.finish_reason) == (expected, reason)


def test_several_calls_have_own_ids_that_come_once(read):
    one = "<|channel|>commentary to=functions.f<|message|>{1}"
    reader, deltas = read(one + NEXT + one.replace("1", "2"), chunk=2)
    assert [(call.index, call.name) for call in reader.calls] == [(0, "f"), (1, "f")]
    assert len({call.id for call in reader.calls}) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", call.id) for call in reader.calls)
    assert [delta.call.index for delta in deltas if delta.is_first] == [0, 1]
    assert len(deltas) > 2


def test_content_streams_while_a_call_could_still_follow(read):
    """Content is not held back for tools."""
    _, deltas = read(f"<|channel|>commentary<|message|>First.{NEXT}{FINAL}Hello", chunk=1)
    assert [delta.text for delta in deltas if delta.text] == [*"First.", "H", "e", "llo"]


def test_without_functions_a_call_is_content(read):
    answer = "<|channel|>commentary to=functions.f<|message|>{}"
    reader, deltas = read(answer, functions=())
    assert (joined(deltas), reader.finish_reason) == ([("content", None, "{}")], "stop")


def test_an_unfinished_call_ends_by_length(read):
    reader, deltas = read('<|channel|>commentary to=functions.f<|message|>{"a', reason="length")
    assert (joined(deltas), reader.finish_reason) == ([("call", "f", '{"a')], "length")


def test_tokens_of_reasoning_are_counted_without_their_headers(read, tokens_of):
    reader, _ = read(f"{ANALYSIS}one two{NEXT}{FINAL}three")
    assert reader.num_reasoning_tokens == len(tokens_of("one two"))
    assert reader.num_tokens == len(tokens_of(f"{ANALYSIS}one two{NEXT}{FINAL}three"))


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_stop_strings_end_content_only_and_are_not_in_it(read, tokens_of, chunk):
    answer = f"{ANALYSIS}a STOP b{NEXT}<|channel|>commentary to=functions.f<|message|>STOP{NEXT}{FINAL}"
    reader, deltas = read(f"{answer}x ST STOP y", stop=("STOP",), chunk=chunk)
    assert joined(deltas) == [
        ("reasoning", None, "a STOP b"),
        ("call", "f", "STOP"),
        ("content", None, "x ST "),
    ]
    assert reader.finish_reason == "tool_calls"
    assert reader.num_tokens == len(tokens_of(f"{answer}x ST STOP"))
    reader, deltas = read(f"{FINAL}no ST", stop=("STOP",), chunk=chunk)
    assert (joined(deltas), reader.finish_reason) == ([("content", None, "no ST")], "stop")


@pytest.mark.parametrize("stop", [(), ("wor",), ("é",)])
def test_logprobs_are_those_of_the_tokens_in_content(read, tokenizer, tokens_of, stop):
    text = "Hello é world"
    reader, deltas = read(f"{ANALYSIS}Hm.{NEXT}{FINAL}{text}", stop=stop, chunk=1)
    entries = [logprob_json(Harmony(tokenizer), one) for delta in deltas for one in delta.logprobs]
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    assert content == (text.partition(stop[0])[0] if stop else text)
    tokens = tokens_of(text)
    written = [bytes(entry["bytes"]) for entry in entries]
    assert written == [tokenizer.decode_bytes([token]) for token in tokens[: len(written)]]
    # The last one may be cut by the stop string.
    shorter, covered = (b"".join(part).decode(errors="replace") for part in (written[:-1], written))
    assert covered.startswith(content) and len(shorter) < len(content)
    first = tokens[0]
    assert entries[0] == {
        "token": "H", "bytes": [72], "logprob": -float(first % 7),
        "top_logprobs": [{"token": "H", "bytes": [72], "logprob": -1.0}],
    }  # fmt: skip


def test_a_header_that_is_text_keeps_its_logprobs(read, tokenizer, tokens_of):
    answer = "<|channel|>other<|message|>x"
    _, deltas = read(answer, chunk=1)
    entries = [one.token for delta in deltas for one in delta.logprobs]
    assert entries == tokens_of(answer)


MARKS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"]
PHRASES = [
    *MARKS, "assistant", "analysis", "final", "commentary", " to=functions.f", " to=g", "json", "{}", "STOP",
    ANALYSIS, FINAL, f"{NEXT}{FINAL}",
    f"{NEXT}<|channel|>commentary to=functions.g <|constrain|>json<|message|>",
]  # fmt: skip


def random_answers(number, tokenizer, tokens_of):
    """Yields sequences of random tokens and phrases of the format."""
    rng = np.random.default_rng(number)
    phrases = [tokens_of(phrase) for phrase in PHRASES]
    for _ in range(number):
        weight = rng.random()
        answer = []
        for _ in range(rng.integers(0, 30)):
            if rng.random() < weight:
                answer += phrases[rng.integers(len(phrases))]
            else:
                answer.append(int(rng.integers(tokenizer.vocab_size + 5)))
        yield rng, answer


@pytest.mark.parametrize("number", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_tokens_are_read_without_loss(read, tokenizer, tokens_of, number):
    harmony = Harmony(tokenizer)
    for rng, answer in random_answers(number, tokenizer, tokens_of):
        reference = HarmonyReader(harmony)
        reference.feed(answer)
        reference.close()
        texts = [part.text for part in reference.parts]
        reason = ["stop", "length"][rng.integers(2)]
        reader, deltas = read(answer, reason, chunk=int(rng.integers(1, 9)))
        messages = [(delta.message, delta.text) for delta in deltas]
        assert ["".join(t for m, t in messages if m == i) for i in range(len(texts))] == texts
        assert reader.finish_reason == ("tool_calls" if reader.calls and reason == "stop" else reason)
        assert reader.num_tokens == len(answer)
        for i in {delta.message for delta in deltas if delta.kind == "content"}:
            entries = [one for delta in deltas if delta.message == i for one in delta.logprobs]
            data = b"".join(harmony.spelled(one.token) for one in entries)
            assert data.decode(errors="replace") == texts[i]
        stopped, deltas = read(answer, reason, chunk=int(rng.integers(1, 9)), stop=("STOP",))
        found = [text for kind, _, text in joined(deltas) if kind == "content"]
        assert not any("STOP" in text for text in found)


@pytest.mark.parametrize("number", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_only_headers_of_messages_are_not_text(read, tokenizer, tokens_of, number):
    """Each stretch from a <|start|> to a <|message|> may be missing, as may the names of special tokens."""
    spell, special = Harmony(tokenizer).spelled_text, set(tokenizer.special_tokens.values())
    for _, answer in random_answers(number, tokenizer, tokens_of):
        answer = [token for token in answer if token in special or spell([token]).isascii()]
        text, pattern = spell(answer), ""
        for stretch in text.split("<|start|>"):
            head, mark, rest = stretch.partition("<|message|>")
            is_header = mark and not re.search(r"<\|(end|call|return)\|>", head)
            head, rest = (re.escape(re.sub(r"<\|\w+\|>", "", one)) for one in (head, rest))
            pattern += f"(?:{head})?{rest}" if is_header else head + rest
        _, deltas = read(answer, chunk=5)
        found = re.sub(r"<\|\w+\|>", "", "".join(delta.text for delta in deltas))
        assert re.fullmatch(pattern, found, re.DOTALL), (text, found)
