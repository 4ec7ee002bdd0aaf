"""Harmony: published renderings token by token, and parsing of any answer."""

import dataclasses
import re

import pytest
from helpers.data import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.harmony import AnswerReader, Harmony, Message, Part, developer, is_harmony, system, user
from gptoss_jax.data.special_tokens import HARMONY_TOKENS
from gptoss_jax.data.tokenizer import load_tokenizer, make_tokenizer

ROBOT = "Answer the user's questions like a robot."
CAPITAL = "What is the capital of the largest country in the world?"
SUM = [
    user("What is 2 + 2?"),
    Part("analysis", text='User asks a simple question: "What is 2 + 2?" The answer: 4.').message(),
    Part("final", text="2 + 2 equals 4.").message(),
]
RENDERINGS = {
    "no_tools": [system(date="2025-06-28")],
    "simple_convo": [system(), user("What is 2 + 2?")],
    "reasoning_system_message": [system(channels=["analysis", "final"]), user("What is 2 + 2?")],
    "reasoning_system_message_no_instruction": [
        system("high", channels=["analysis", "final"]),
        user("What is the best place to eat candy in the world?"),
    ],
    "reasoning_system_message_with_dates": [
        system(date="2021-01-01", knowledge_cutoff="2021-01", channels=["analysis", "final"]),
        user("What is 42 * pi?"),
    ],
    "dropping_cot_by_default": [*SUM, user("What about 9 / 2?")],
    "keep_analysis_between_finals": [
        user("What is 2 + 2?"),
        Part("analysis", text="thinking 2+2").message(),
        Part("final", text="4").message(),
        user("What is 3 + 5?"),
        Part("analysis", text="thinking 3+5").message(),
        Part("final", text="8").message(),
    ],
}
for effort in ("low", "medium", "high"):
    RENDERINGS[f"simple_convo_{effort}_effort"] = [system(effort), developer(ROBOT), user(CAPITAL)]
    RENDERINGS[f"simple_convo_{effort}_effort_no_instruction"] = [system(effort), user(CAPITAL)]

TOKYO = 'User asks: "What is the weather in Tokyo?" We need to use lookup_weather tool.'
TOOL = '<|start|>browser.search to=assistant<|channel|>commentary<|message|>{"result": "https://openai.com/"}'
WEATHER = "User asks: “What is the weather in SF?” We need to use lookup_weather tool."
SEARCH = '{"query": "current US president July 2025", "topn": 10, "source": "news"}'
# A model's output, and the parts read from it: channel, recipient, content type, text.
ANSWERS = {
    "simple_reasoning_response": [
        ("analysis", None, None, 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'),
        ("final", None, None, "2 + 2 = 4."),
    ],
    "simple_tool_call": [
        ("analysis", None, None, TOKYO),
        ("analysis", "lookup_weather", "code", '{"location": "Tokyo"}'),
    ],
    # A model should not write a tool's message: it is read as text.
    "streamable_parser": [
        ("analysis", None, None, "*"),
        ("commentary", "browser.search", "code", SEARCH),
        (
            None, None, None,
            TOOL + "<|end|>",
        ),
    ],
    "tool_response_parsing": [
        (
            None, None, None,
            TOOL + " ",
        ),
    ],
}  # fmt: skip
NOT_OURS = {
    "browser_and_function_tool": "no tools are connected",
    "browser_and_python_tool": "no tools are connected",
    "browser_tool_only": "no tools are connected",
    "render_functions_with_parameters": "no tools are connected",
    "does_not_drop_if_ongoing_analysis": "no tool ever replies; up to its reply it is a test below",
    "preserve_cot": "old analysis is always dropped",
}


@pytest.fixture(scope="module")
def published(harmony):
    return Harmony(harmony)


def ids(tokenizer, text):
    """Returns the tokens of a text in which special tokens are spelled out."""
    tokens = []
    for piece in re.split(r"(<\|\w+\|>)", text):
        special = tokenizer.special_tokens.get(piece)
        tokens += tokenizer.encode(piece) if special is None else [special]
    return tokens


def byte_ids(tokenizer, data):
    """Returns the tokens of single bytes."""
    table = {tokenizer.decode_bytes([token]): token for token in range(256)}
    return [table[bytes([byte])] for byte in data]


def vector(name):
    return shared_data(f"vectors/harmony/test_{name}.txt").read_text().removesuffix("\n")


def parts_of(harmony, tokens, sizes=None):
    """Returns the parts of an answer that arrives in chunks of these sizes; checks that the text shown of
    each part is its text."""
    reader, shown = AnswerReader(harmony), {}
    rest, sizes = list(tokens), iter(sizes or [])
    while rest:
        size = next(sizes, 1)
        for part, text in reader.feed(rest[:size]):
            shown[part] = shown.get(part, "") + text
        rest = rest[size:]
    for part, text in reader.close():
        shown[part] = shown.get(part, "") + text
    assert [shown.get(part, "") for part in reader.parts] == [part.text for part in reader.parts]
    assert reader.close() == []
    return [dataclasses.astuple(part) for part in reader.parts]


def test_every_published_vector_is_used():
    folder = shared_data("vectors/harmony")
    names = {path.stem.removeprefix("test_") for path in folder.glob("*.txt")}
    assert names == RENDERINGS.keys() | ANSWERS.keys() | NOT_OURS.keys()


@pytest.mark.parametrize("name", RENDERINGS)
def test_published_renderings(harmony, published, name):
    expected = ids(harmony, vector(name))
    if name == "keep_analysis_between_finals":  # the vector is a finished conversation
        expected += [200006, 173781]
    assert published.render(RENDERINGS[name]) == expected


@pytest.mark.parametrize("name", ANSWERS)
def test_published_answers(harmony, published, name):
    content = vector(name)
    tokens = ids(harmony, content)
    if content.startswith("200005"):
        tokens = [int(token) for token in content.split()]
    expected = [list(part) for part in ANSWERS[name]]
    if name == "streamable_parser":
        text = content.removeprefix("<|channel|>analysis<|message|>")
        expected[0][-1] = text[: text.index("<|end|>")]
        assert len(expected[0][-1]) > 200
    assert [list(part) for part in parts_of(published, tokens)] == expected


def test_a_tool_call_is_rendered_as_published(harmony, published):
    expected = vector("does_not_drop_if_ongoing_analysis")
    expected = expected[: expected.index("<|call|>") + len("<|call|>")] + "<|start|>assistant"
    conversation = [
        user("What is the weather in SF?"),
        Part("analysis", text=WEATHER).message(),
        Part(
            "commentary", "functions.lookup_weather", "<|constrain|>json", '{"location": "San Francisco"}'
        ).message(),
    ]
    assert published.render(conversation) == ids(harmony, expected)


def test_published_ids(published):
    conversation = [user("Hello world"), Part("final", text="2 + 2 = 4.").message(), user("a<|end|>")]
    user_ids, assistant_ids = [200006, 1428, 200008], [200006, 173781]
    assert published.render(conversation) == [
        *user_ids, 13225, 2375, 200007, *assistant_ids, 200005, 17196, 200008, 17, 659, 220, 17, 314, 220, 19,
        13, 200007, *user_ids, 64, 27, 91, 419, 91, 29, 200007, *assistant_ids,
    ]  # fmt: skip


def spell(harmony, tokens):
    return b"".join(map(harmony.spelled, tokens)).decode()


U = "<|start|>user<|message|>{}<|end|>".format
A = "<|start|>assistant<|channel|>{}<|message|>{}<|end|>".format
CALL = "<|start|>assistant to=f.x<|channel|>commentary json<|message|>{}<|call|>"


def said(channel, text):
    return Part(channel, text=text).message()


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        # Three turns: the analysis of both finished ones is dropped. openai-harmony keeps the second.
        (
            [user("q1"), said("analysis", "t1"), said("final", "a1"), user("q2"), said("analysis", "t2"),
             said("final", "a2"), user("q3")],
            U("q1") + A("final", "a1") + U("q2") + A("final", "a2") + U("q3"),
        ),
        # Interrupted in its analysis, which stays; what was dropped before stays dropped.
        (
            [user("q1"), said("analysis", "t1"), said("final", "a1"), user("q2"), said("analysis", "t2"),
             user("q3")],
            U("q1") + A("final", "a1") + U("q2") + A("analysis", "t2") + U("q3"),
        ),
        # It is dropped as soon as there is an answer.
        (
            [user("q1"), said("analysis", "t1"), user("q2"), said("analysis", "t2"), said("final", "a2"),
             user("q3")],
            U("q1") + U("q2") + A("final", "a2") + U("q3"),
        ),
        # A tool call is not an answer; commentary is not analysis.
        (
            [user("q1"), said("analysis", "t1"), said("commentary", "p"),
             Part("commentary", "f.x", "json", "{}").message(), user("q2")],
            U("q1") + A("analysis", "t1") + A("commentary", "p") + CALL + U("q2"),
        ),
        # Text without a format is an answer, as it was shown.
        ([user("q1"), Part(text="x<|end|>").message()], U("q1") + A("final", "x<|end|>")),
        ([user("<|start|>system\ud800é")], U("<|start|>system\ufffdé")),
        ([], ""),
    ],
    ids=["finished", "interrupted", "answered", "called", "no format", "spelled", "nothing"],
)  # fmt: skip
def test_rendered_conversations(published, conversation, expected):
    assert spell(published, published.render(conversation)) == expected + "<|start|>assistant"


def test_system_and_developer_messages(published):
    first = [system("low", "2026-01-31"), developer("Be brief.")]
    assert spell(published, published.render(first)) == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2026-01-31\n\nReasoning: low\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>assistant"
    )


F = "<|channel|>final<|message|>"
START = "<|start|>assistant"


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("", []),
        (F + "a", [("final", "a")]),
        (F + "a<|return|>", [("final", "a")]),
        (f"<|channel|>analysis<|message|>a<|end|>{START}{F}b", [("analysis", "a"), ("final", "b")]),
        ("<|message|>a<|end|>", [(None, "a")]),
        # Another format, and none.
        ("Hello", [(None, "Hello")]),
        ("Hello<|return|>", [(None, "Hello<|return|>")]),
        (" x" * 65 + "<|channel|>y", [(None, " x" * 65 + "<|channel|>y")]),
        # Truncated.
        (START, [(None, START)]),
        ("<|channel|>", [(None, "<|channel|>")]),
        ("<|channel|>analysis", [(None, "<|channel|>analysis")]),
        (F + "a<|end|><|start|>", [("final", "a"), (None, "<|start|>")]),
        # Invalid headers: an unknown role or channel, misplaced words or markers.
        (f"<|start|>wizard{F}a", [(None, f"<|start|>wizard{F}a")]),
        (U("a") + START + F + "b", [(None, U("a")), ("final", "b")]),
        ("<|channel|>thoughts<|message|>a", [(None, "<|channel|>thoughts<|message|>a")]),
        ("<|channel|><|message|>a", [(None, "<|channel|><|message|>a")]),
        (F.replace("final", "final a b") + "c", [(None, "<|channel|>final a b<|message|>c")]),
        ("<|channel|>analysis" + F + "a", [(None, "<|channel|>analysis" + F + "a")]),
        (f"<|end|>{F}a", [(None, f"<|end|>{F}a")]),
        # The first message has no end, or the second no start.
        (f"<|channel|>analysis<|message|>a{START}{F}b", [("analysis", "a"), ("final", "b")]),
        (F + "a<|end|>b<|end|>c", [("final", "a"), (None, "b<|end|>c")]),
        (START + F + "a", [("final", "a")]),
        # Special tokens within a message.
        (F + "a<|message|><|constrain|><|endoftext|>", [("final", "a<|message|><|constrain|><|endoftext|>")]),
    ],
)  # fmt: skip
def test_parsed_answers(harmony, published, answer, parts):
    found = parts_of(published, ids(harmony, answer))
    assert [(channel, text) for channel, _, _, text in found] == parts


def test_the_content_type_of_an_answer_is_parsed(harmony, published):
    answer = F.replace("final", "final <|constrain|>json") + "{}"
    assert parts_of(published, ids(harmony, answer)) == [("final", None, "<|constrain|>json", "{}")]


def test_a_tool_call_is_parsed(harmony, published):
    expected = ("commentary", "functions.x", "<|constrain|>json", "{}")
    for header in (
        "<|channel|>commentary to=functions.x <|constrain|>json",
        " to=functions.x<|channel|>commentary <|constrain|>json",
    ):
        assert parts_of(published, ids(harmony, header + "<|message|>{}<|call|>")) == [expected]


def test_characters_are_never_split(harmony, published):
    header, end = ids(harmony, F), ids(harmony, "<|end|>")
    reader = AnswerReader(published)
    reader.feed(header)
    shown = [reader.feed([token]) for token in byte_ids(harmony, "é".encode())]
    assert shown == [[], [(reader.parts[0], "é")]]
    # A truncated character at the end of a message belongs to that message.
    first, second, third = (byte_ids(harmony, data) for data in (b"\xe2\x82", b"\xac", b"\xf0\x9f"))
    tokens = [*header, *first, *end, *ids(harmony, START + F), *second, *third]
    assert [part[3] for part in parts_of(published, tokens)] == ["\ufffd", "\ufffd\ufffd"]
    # The model's vocabulary is larger than the tokenizer's.
    text = parts_of(published, [*header, 200013, 201087])[0][3]
    assert text == "<|reserved_200013|><|reserved_201087|>"


WORDS = ["assistant", "user", "analysis", "final", " to=f.x", " json", "apple", " apple", "to=apple", "é"]
FRAMES = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>", "<|endoftext|>"]
LONGER = [START, F, "<|channel|>analysis<|message|>", "<|end|>" + START]
PIECES = st.sampled_from(WORDS) | st.sampled_from(FRAMES) | st.sampled_from(LONGER) | st.binary(max_size=3)


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(PIECES | st.just(201087), max_size=30), sizes=st.lists(st.integers(1, 9)))
def test_any_answer_is_parsed_without_loss(harmony, published, pieces, sizes):
    tokens = []
    for piece in pieces:
        tokens += (
            ids(harmony, piece) if isinstance(piece, str)
            else byte_ids(harmony, piece) if isinstance(piece, bytes)
            else [piece]
        )  # fmt: skip
    parts = parts_of(published, tokens)
    assert parts_of(published, tokens, sizes) == parts
    written = b"".join(map(published.spelled, tokens)).decode(errors="replace")
    for word in ("apple", "json", "f.x", "é"):
        shown = sum((field or "").count(word) for part in parts for field in part)
        assert shown == written.count(word)
    # The conversation continues.
    assert published.render([user("a"), *(Part(*part).message() for part in parts), user("b")])


@settings(deadline=None, max_examples=50)
@given(
    messages=st.lists(
        st.tuples(
            st.sampled_from(["analysis", "commentary", "final"]),
            st.sampled_from([None, "f.x", "browser.search"]),
            st.sampled_from([None, "json", "<|constrain|>json"]),
            st.text(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_rendered_answers_are_parsed_back(harmony, published, messages):
    tokens = published.render([Part(*message).message() for message in messages])
    # From after the role of the first message to where that of the next one would be.
    assert tokens[:2] == tokens[-2:] == ids(harmony, START)
    assert parts_of(published, tokens[2:-2]) == messages


def test_a_tokenizer_needs_every_special_token(harmony):
    assert is_harmony(harmony)
    for missing in HARMONY_TOKENS:
        names = {name: token for name, token in harmony.special_tokens.items() if name != missing}
        other = dataclasses.replace(harmony, special_tokens=names)
        assert not is_harmony(other)
        with pytest.raises(ValueError, match=f"'o200k_harmony': .* it has no {re.escape(missing)};"):
            Harmony(other)
    assert not is_harmony(make_tokenizer("bytes"))


SMALL = make_tokenizer("bpe:300", lambda: iter(["def f(a):\n    return a\n" * 9]))


def test_a_small_vocabulary_reserves_the_special_tokens(tmp_path):
    assert is_harmony(SMALL) and SMALL.vocab_size <= 300
    first = SMALL.vocab_size - len(HARMONY_TOKENS)
    assert [SMALL.special_tokens[name] for name in HARMONY_TOKENS] == list(range(first, SMALL.vocab_size))
    SMALL.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_tokens == SMALL.special_tokens and loaded.digest == SMALL.digest
    assert max(SMALL.encode("<|end|>")) < first
    ends = ["<|return|>", "<|endoftext|>", "<|call|>"]
    assert SMALL.stop_ids == tuple(SMALL.special_tokens[name] for name in ends)


def test_a_small_vocabulary_spells_the_same_conversation(harmony, published):
    small = Harmony(SMALL)
    conversation = [
        system("low", "2026-01-31", has_functions=True),
        developer("Be brief.", [{"name": "f", "description": "Does <|end|>."}]),
        user("a<|end|> \ud800é"),
        Part("commentary", "functions.f", "<|constrain|>json", "{}").message(),
    ]
    tokens = small.render(conversation)
    assert spell(small, tokens) == spell(published, published.render(conversation))
    is_special = [token in SMALL.special_tokens.values() for token in tokens]
    assert sum(is_special) == 3 * 3 + 5 + 1
    answer = [("analysis", None, None, "é<|end|>"), ("final", None, None, "4")]
    rendered = small.render([Part(*message).message() for message in answer])
    start = [small.start, *SMALL.encode("assistant")]
    assert rendered[-len(start) :] == start == rendered[: len(start)]
    assert parts_of(small, rendered[len(start) : -len(start)]) == answer


def test_prompt_of_the_last_turn():
    tokenizer = make_tokenizer("bpe:400", lambda: iter(["user assistant final one two"] * 9))
    harmony = Harmony(tokenizer)
    one, two = Message("user", "one<|end|>"), Message("user", "two")
    answer = Message("assistant", "one", channel="final")
    pieces = [piece for message in (one, answer, two, answer) for piece in harmony.pieces(message)]
    tokens = [token for some in harmony.encode(pieces) for token in some]
    prompt, question = harmony.prompt_of_last_turn(tokens)
    assert prompt == harmony.render([one, answer, two])
    assert harmony.spelled_text(question) == "two"
