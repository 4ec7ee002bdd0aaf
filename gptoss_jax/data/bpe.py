"""Training of a byte-level BPE vocabulary, for `bpe:SIZE`."""

from collections.abc import Iterator

import tokenizers

from gptoss_jax.data.special_tokens import END_OF_TEXT

TRAINING_BYTES = 64 << 20

# What the trained tokenizer never merges across. Suits code as well as prose: runs of spaces stay whole, a
# name keeps the space, dot or underscore before it, numbers go three digits at a time.
WORDS = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # letters, and one sign or space before them
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",  # operators and punctuation
        r"\s*[\r\n]+",  # blank lines and the end of a line
        r"\s+(?!\S)",  # spaces, but for one that goes to the word after them
        r"\s+",
    )
)


def train_bpe(size: int, texts: Iterator[str]) -> str:
    """Trains a byte-level BPE vocabulary of at most `size` tokens; returns its tokenizer.json."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_first_bytes(texts, TRAINING_BYTES), trainer)
    return model.to_str()


def _first_bytes(texts: Iterator[str], room: int) -> Iterator[str]:
    """The first `room` UTF-8 bytes of a stream of texts."""
    for text in texts:
        data = text.encode()[:room]
        yield data.decode(errors="ignore")
        room -= len(data)
        if room == 0:
            return
