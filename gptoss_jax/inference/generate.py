"""Prompts to answers: ragged batches, each prompt with its own settings, at once or as a stream. The work is
done by `engine.py`."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptoss_jax.checkpoints.readers import find_tokenizer
from gptoss_jax.config import ModelConfig, require
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference import engine
from gptoss_jax.inference.sampling_params import Request, requests
from gptoss_jax.model.transformer import Transformer, get_params


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int] = 32,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | None | Sequence[int | None] = None,
    top_p: float | None | Sequence[float | None] = None,
    min_p: float | None | Sequence[float | None] = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    stop_strings: str | Sequence[str] | Sequence[Sequence[str]] = (),
    seed: int | Sequence[int] = 0,
    *,
    log_probs: bool = False,
    tokenizer: Tokenizer | None = None,
) -> list[list[int]] | tuple[list[list[int]], list[list[float]]]:
    """Continues each prompt; returns the new tokens only.

    Every setting is one value for all prompts, or a list with one for each; of stop tokens and strings, one
    sequence, or a list of them.

    Args:
      model: under `jax.set_mesh` its parameters must lie where the path table places them.
      prompts: token ids, of any lengths. Text that was trained on starts with the tokenizer's bos.
      max_new_tokens: most tokens that a prompt is continued by.
      temperature, top_k, top_p, min_p: see `sampling.sample`. The default is greedy.
      stop_tokens: any of these ends its sequence and is not part of the answer. None by default; those of a
        model's folder are `load_tokenizer(folder).stop_ids`.
      stop_strings: an answer ends with the token in which one of these is complete, the last of the answer:
        cut the text where the string begins (`StreamingDetokenizer` does). Looked for between the calls of the decoder,
        so a few tokens more may be computed than are returned.
      seed: 0 … 2^32 - 1. Token t of a prompt is drawn with fold_in(key(seed), t), alone and in any batch:
        in float32 so are the answers, but for ties; in bfloat16 rounding can choose other experts and tokens.
        Prompts that are the same need seeds of their own to get other answers.
      log_probs: whether to return, beside the tokens, the log of the probability that the model gave each of
        them, before temperature and filters.
      tokenizer: what stop strings are looked for with; default: that of the folder the model came from.

    Raises:
      ValueError: no prompts, an empty one, an id outside the vocabulary, a setting outside its range, or a
        prompt that leaves too little of `max_position_embeddings`.

    What compiles, for each number of prompts, rounded up to a power of two, and each length of the cache,
    which is 256 times a power of two or the whole context: an empty cache, or the growth to that length; a
    prefill for each size of a piece, 32, 128 and 512 tokens; a decoder for each choice of what is asked for
    among temperature, top_k, top_p, min_p and log_probs. So a context of 131,072, ten lengths, takes at most
    10 * (2 + 3) programs and 10 decoders for each such choice, whatever the prompts are
    (`engine.max_compilations`).
    The values of the settings, seeds and prompts recompile nothing; more than 8 stop tokens do, at 16, 32, ….
    """
    settings = max_new_tokens, temperature, top_k, top_p, min_p, stop_tokens, stop_strings, seed
    return generate_with_params(
        model.config, get_params(model), prompts, *settings, log_probs=log_probs, tokenizer=tokenizer,
        origin=model.origin,
    )  # fmt: skip


def stream(
    model: Transformer, prompts: Sequence[Sequence[int]], *args, **kwargs
) -> Iterator[list[list[int]]]:
    """The same answers as `generate`, whose arguments it takes, while they are being decoded.

    Yields a list with a list for each prompt, the tokens that are new to it, possibly none (with `log_probs`
    a pair of such lists): the first token alone and as soon as it is there, later ones about every 0.1 s.
    Errors in the arguments are raised by the call, not by the first `next`.
    """
    return stream_with_params(model.config, get_params(model), prompts, *args, origin=model.origin, **kwargs)


def generate_with_params(
    config: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], *args, **kwargs
) -> list[list[int]] | tuple[list[list[int]], list[list[float]]]:
    """`generate` for a config and its parameters as a plain tree; the other arguments are the same. `origin`
    is the folder whose tokenizer looks for stop strings where none is given."""
    asked = _Asked.of(config, prompts, *args, **kwargs)
    # Nothing is to be looked at before the end, unless it is for stop strings.
    steady = any(one.stop_strings for one in asked.requests)
    parts = list(engine.chunks(config, params, *asked, steady))
    joined = [
        [[one for part in row for one in part] for row in zip(*column, strict=True)]
        for column in zip(*parts, strict=True)
    ]
    return tuple(joined) if asked.log_probs else joined[0]


def stream_with_params(
    config: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], *args, **kwargs
) -> Iterator[list[list[int]]]:
    """`stream` for a config and its parameters as a plain tree; the other arguments are those of
    `generate_with_params`."""
    asked = _Asked.of(config, prompts, *args, **kwargs)
    chunks = engine.chunks(config, params, *asked, True)
    return chunks if asked.log_probs else (tokens for tokens, _ in chunks)


class _Asked(NamedTuple):
    """The arguments of `generate`, checked."""

    requests: list[Request]
    log_probs: bool
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, config, prompts, *args, log_probs=False, tokenizer=None, origin=None, **kwargs):
        found = requests(config, prompts, *args, **kwargs)
        strings = next((one.stop_strings for one in found if one.stop_strings), ())
        if strings and tokenizer is None and origin is not None:
            tokenizer = find_tokenizer(pathlib.Path(origin))
        require(
            not strings or tokenizer is not None,
            "stop_strings",
            list(strings),
            "must come with the tokenizer that they are looked for with, tokenizer=…",
        )
        return cls(found, log_probs, tokenizer)
