"""Streaming detokenization: complete characters, stop strings, and the end of the text."""

from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.inference.detokenizer import StreamingDetokenizer, detokenize

BYTES = make_tokenizer("bytes")


def pieces(text: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({cut for cut in cuts if cut < len(text)})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def through(stops, parts):
    stream = StreamingDetokenizer(BYTES, stops)
    shown = [stream.feed(list(part)) for part in parts]
    return [*shown, stream.close()], stream.stopped


@given(
    st.text("aäb€", max_size=12),
    st.lists(st.text("aäb€", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30)),
)
def test_text_ends_before_the_first_stop_string(text, stops, cuts):
    shown, stopped = through(stops, pieces(text.encode(), cuts))
    ends = [text[:n] for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    assert stopped == bool(ends)
    # If several strings are complete there, the longest counts.
    length = max((len(stop) for stop in stops if ends and ends[0].endswith(stop)), default=0)
    assert "".join(shown) == (ends[0][: len(ends[0]) - length] if ends else text)


def test_possible_stop_strings_are_held_back():
    assert through(["stop", "end"], [b"a s", b"to", b"ry e", b"n"]) == (["a ", "", "story ", "", "en"], False)
    assert through(["stop"], [b"a st", b"op, and", b" more"]) == (["a ", "", "", ""], True)
    assert through([], [b"a\xc3", b"\xb6", b"\xe2"]) == (["a", "ö", "", "\ufffd"], False)


def test_characters_are_never_split():
    text = "aé€\U0001f642z\u0301"
    stream, parts = StreamingDetokenizer(BYTES), []
    for token in BYTES.encode(text):
        parts.append(stream.feed([token]))
        assert text.startswith("".join(parts))
    assert "".join(parts) == text and stream.close() == ""
    # A truncated character, before another one and at the end.
    stream = StreamingDetokenizer(BYTES)
    assert stream.feed([0xE2, 0x82]) == ""
    assert stream.feed([0x41, 0xF0, 0x9F]) == "\ufffdA"
    assert stream.close() == "\ufffd"


def test_a_whole_answer():
    # The tokenizer has no ids from 257 on, and bos (256) is not text.
    assert detokenize(BYTES, [0x61, 256, 300, 0xC3]) == "a\ufffd"
    assert detokenize(BYTES, [*b"one. two"], ["."]) == "one"
