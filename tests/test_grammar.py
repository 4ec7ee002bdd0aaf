"""Masks of grammars, with tokenizers of each kind."""

import numpy as np
import pytest

from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.inference import grammar
from gptoss_jax.inference.grammar import GrammarMatcher
from gptoss_jax.inference.sampling import num_mask_words

ANSWER = 'start: <|channel|> "final" <|message|> /[ab]+/ <|return|>'


@pytest.fixture(scope="module")
def tiny():
    return make_tokenizer("bpe:300", lambda: iter(["ab abab final answer"] * 3))


def allowed(matcher, vocab_size):
    row = np.full(num_mask_words(vocab_size), -1, np.int32)
    matcher.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def starts_of(tokenizer, texts):
    """The ids whose bytes are one of the texts."""
    ids = range(tokenizer.vocab_size)
    return {i for i in ids if tokenizer.decode_bytes([i]) in {text.encode() for text in texts}}


@pytest.mark.parametrize("kind", ["tiny", "harmony"])
def test_masks_over_an_answer_with_control_tokens(kind, request):
    tokenizer = request.getfixturevalue(kind)
    vocab_size = tokenizer.vocab_size + 1069  # rows of the embedding without a token
    special = tokenizer.special_tokens
    matcher = GrammarMatcher(tokenizer, vocab_size, ANSWER)
    assert allowed(matcher, vocab_size) == {special["<|channel|>"]}
    for token in [special["<|channel|>"], *tokenizer.encode("final"), special["<|message|>"]]:
        assert token in allowed(matcher, vocab_size)
        matcher.accept(token)
    found = allowed(matcher, vocab_size)
    text = {tokenizer.decode_bytes([token]).decode() for token in found}
    assert {"a", "b", "ab"} <= text and set("".join(text)) == {"a", "b"}
    matcher.accept(*tokenizer.encode("a"))
    assert allowed(matcher, vocab_size) == found | {special["<|return|>"]}
    assert not matcher.is_finished
    matcher.accept(special["<|return|>"])
    assert matcher.is_finished
    assert allowed(matcher, vocab_size) == set(tokenizer.stop_ids)


def test_text_of_a_special_token_is_not_the_token(tiny):
    matcher = GrammarMatcher(tiny, 300, 'start: "<|end|>" <|end|>')
    assert allowed(matcher, 300) == starts_of(tiny, ["<"])
    for token in tiny.encode("<|end|>"):
        matcher.accept(token)
    assert allowed(matcher, 300) == {tiny.special_tokens["<|end|>"]}


def test_a_grammar_that_may_end_allows_the_stop_tokens():
    tokenizer = make_tokenizer("bytes")
    matcher = GrammarMatcher(tokenizer, 257, "start: /é*/")
    assert allowed(matcher, 257) == {0xC3, 256}
    matcher.accept(0xC3)
    assert allowed(matcher, 257) == {0xA9}
    assert matcher.failure is None
    matcher.accept(97)
    assert "doesn't satisfy the grammar" in matcher.failure and matcher.is_finished


def test_a_grammar_that_becomes_too_complex_ends_the_answer(monkeypatch):
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 12)
    tokenizer = make_tokenizer("bytes")
    matcher = GrammarMatcher(tokenizer, 257, 'start: %json {"type": "object", "title": "Small"}')
    for token in tokenizer.encode('{"a"'):
        allowed(matcher, 257)
        matcher.accept(token)
    assert "too many states" in matcher.failure and matcher.is_finished
    assert allowed(matcher, 257) == {256}


def test_matchers_of_one_grammar_are_independent(tiny):
    one, other = (GrammarMatcher(tiny, 300, 'start: "a" /[xy]/ | "b"') for _ in range(2))
    one.accept(*tiny.encode("a"))
    assert allowed(one, 300) == starts_of(tiny, ["x", "y"])
    assert allowed(other, 300) == starts_of(tiny, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("start: other", 'unknown name: "other"'),
        ('start: "a" <|nope|>', 'unknown special token: "<|nope|>"'),
        ('start: "a', "lexer error"),
        ('start: %json{"type": "string", "pattern": "(("}', "regex parse error: unclosed group"),
        ('start: %json{"type": "string", "format": "poem"}', "Unknown format: poem"),
    ],
)
def test_bad_grammars_are_one_line(tiny, text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        GrammarMatcher(tiny, 300, text)
    assert str(caught.value).startswith("grammar: ") and "\n" not in str(caught.value)


def test_the_vocabulary_has_room_for_the_tokenizer():
    with pytest.raises(ValueError, match="vocab_size is 256: must be at least the tokenizer's 257"):
        GrammarMatcher(make_tokenizer("bytes"), 256, 'start: "a"')
