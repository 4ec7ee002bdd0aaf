"""Generation: prompts to answers, all at once or as a stream."""

from collections.abc import Iterator, Sequence

from gptoss_jax.config import require
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.prefill import next_power_of_two
from gptoss_jax.inference.request import Request
from gptoss_jax.inference.sampling_params import Completion, SamplingParams, join_parts
from gptoss_jax.model.transformer import Transformer

# Most prompts that decode together; more wait for a slot.
MAX_SLOTS = 256


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (it is frozen)
    *,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Continues each prompt.

    In float32 an answer depends only on its prompt and settings, not on the other prompts, unless logits tie;
    on CPU with at most 8 prompts, models of 128 hidden units or more and a C++ compiler it has the same bits.
    In bfloat16 rounding depends on the shapes and may select other experts and tokens.

    Args:
      model: under `jax.set_mesh` its parameters must have the shardings that `parallel.rules` gives them.
      prompts: token ids, of any lengths. A text should start with the tokenizer's bos, as in training.
      params: one for all prompts, or one for each.
      tokenizer: finds the stop strings. Default: the one in the folder that the model was loaded from.

    Raises:
      ValueError: no prompts, an empty prompt, an id outside the vocabulary, a sequence of `params` of
        another length, a prompt and `max_new_tokens` that exceed `max_position_embeddings`, or stop strings
        or a grammar without a tokenizer.

    Compiles for each number of prompts (rounded up to a power of two) and each length of the cache (256 times
    a power of two, or the context); see `prefill.max_compilations`. New values of settings, stop tokens,
    seeds or prompts do not recompile.
    """
    parts = list(_run(model, prompts, params, tokenizer, streaming=False))
    return [join_parts(one) for one in zip(*parts, strict=True)]


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (it is frozen)
    *,
    tokenizer: Tokenizer | None = None,
) -> Iterator[list[Completion]]:
    """Yields the answers of `generate` in parts while they are decoded.

    Each item holds what is new for every prompt, possibly nothing: first one token, as soon as it is known,
    then several about every 0.05 s. Invalid arguments raise at the call, not at the first `next`.
    """
    return _run(model, prompts, params, tokenizer, streaming=True)


def stream_one(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Iterator[Completion]:
    """Yields the answer of an engine to one prompt in parts. Closing the iterator cancels the request.

    Invalid arguments raise at the call.
    """
    request = engine.submit(prompt, params)

    def parts():
        try:
            while not request.is_done:
                yield from (part for owner, part in engine.step() if owner is request)
        except KeyboardInterrupt:
            engine.reset()  # Ctrl-C may have come in the middle of a step
            raise
        finally:
            engine.cancel(request)

    return parts()


def _run(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    tokenizer: Tokenizer | None,
    *,
    streaming: bool,
) -> Iterator[list[Completion]]:
    prompts = list(prompts)
    require(len(prompts) > 0, "prompts", prompts, "must hold at least one prompt")
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    allowed = f"must be one for all prompts, or {len(prompts)}, one for each"
    require(len(params) == len(prompts), "number of sampling params", len(params), allowed)
    engine = Engine(
        model,
        tokenizer,
        num_slots=min(next_power_of_two(len(prompts)), MAX_SLOTS),
        prefix_reuse="off",
        streaming=streaming or any(one.stop_strings for one in params),
    )
    for i, pair in enumerate(zip(prompts, params, strict=True)):
        engine.check(*pair, name=f"prompts[{i}]")
    return _parts(engine, [engine.submit(*pair) for pair in zip(prompts, params, strict=True)])


def _parts(engine: Engine, requests: Sequence[Request]) -> Iterator[list[Completion]]:
    while engine.has_work:
        new = dict(engine.step())
        if new:
            yield [new.get(request) or _nothing(request) for request in requests]


def _nothing(request: Request) -> Completion:
    return Completion([], [] if request.params.logprobs else None, request.finish_reason)
