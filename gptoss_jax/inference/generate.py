"""Generation: prompts to answers, all at once or as a stream."""

from collections.abc import Iterator, Sequence

from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.model.transformer import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (it is frozen)
    *,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Continues each prompt.

    In float32 an answer depends only on its prompt and settings, not on the rest of the batch, unless logits
    tie; in bfloat16 rounding depends on the shapes and may select other experts and tokens.

    Args:
      model: under `jax.set_mesh` its parameters must have the shardings that `parallel.rules` gives them.
      prompts: token ids, of any lengths. A text should start with the tokenizer's bos, as in training.
      params: one for all prompts, or one for each.
      tokenizer: finds the stop strings. Default: the one in the folder that the model was loaded from.

    Raises:
      ValueError: no prompts, an empty prompt, an id outside the vocabulary, a sequence of `params` of
        another length, a prompt and `max_new_tokens` that exceed `max_position_embeddings`, or stop strings
        without a tokenizer.

    Compiles for each number of prompts (rounded up to a power of two) and each length of the cache (256 times
    a power of two, or the context): at most an empty cache, a growth and three prefills, and a decoder for
    each combination of settings used among temperature, top_k, top_p, min_p and logprobs; see
    `engine.max_compilations`. New values of settings, stop tokens, seeds or prompts do not recompile.
    """
    chunks = list(Engine(model, tokenizer).run(prompts, params, streaming=False))
    return [_join(parts) for parts in zip(*chunks, strict=True)]


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (it is frozen)
    *,
    tokenizer: Tokenizer | None = None,
) -> Iterator[list[Completion]]:
    """Yields the answers of `generate` in parts while they are decoded.

    Each item holds what is new for every prompt, possibly nothing: first one token, as soon as it is known,
    then several about every 0.1 s. Invalid arguments raise at the call, not at the first `next`.
    """
    return Engine(model, tokenizer).run(prompts, params, streaming=True)


def _join(parts: Sequence[Completion]) -> Completion:
    tokens = [token for part in parts for token in part.tokens]
    logprobs = None
    if parts[0].logprobs is not None:
        logprobs = [logprob for part in parts for logprob in part.logprobs]
    return Completion(tokens, logprobs, parts[-1].finish_reason)
