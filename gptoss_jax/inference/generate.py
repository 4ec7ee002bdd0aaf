"""Text generation from prompts, complete or streamed."""

from collections.abc import Iterator, Sequence

from gptoss_jax.config import require
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.prefill import next_power_of_two
from gptoss_jax.inference.request import Request
from gptoss_jax.inference.sampling_params import Completion, SamplingParams, join_parts
from gptoss_jax.model.transformer import Transformer

# Maximum number of prompts decoded together; others wait for a slot.
MAX_SLOTS = 256


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (it is frozen)
    *,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Generates a completion for each prompt.

    In float32, a completion depends only on its prompt and sampling parameters, not on the rest of the batch,
    unless logits tie. On CPU it is even bitwise identical with at most 8 prompts, a hidden size of at least
    128 and a C++ compiler. In bfloat16, rounding depends on the shapes and may change the selected experts
    and tokens.

    Args:
      model: under `jax.set_mesh`, its parameters must be sharded as `parallel.rules` specifies.
      prompts: token ids, of any lengths. A text should start with the tokenizer's bos, as in training.
      params: one for all prompts, or one for each.
      tokenizer: needed for stop strings. Default: the one in the folder that the model was loaded from.

    Raises:
      ValueError: no prompts, an empty prompt, an id outside the vocabulary, fewer or more `params` than
        prompts, a prompt plus `max_new_tokens` longer than `max_position_embeddings`, or stop strings or a
        grammar without a tokenizer.

    Recompiles for a new number of prompts (rounded up to a power of two) and a new cache length (256 times a
    power of two, or the full context); see `prefill.max_compilations`. New prompts, sampling parameters, stop
    tokens and seeds do not recompile.
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
    """Yields the completions of `generate` in parts as they are decoded.

    Each item has one part per prompt with its new tokens, possibly none: the first token as soon as it is
    sampled, then several about every 0.05 s. Invalid arguments raise at the call, not at the first `next`.
    """
    return _run(model, prompts, params, tokenizer, streaming=True)


def stream_one(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Iterator[Completion]:
    """Streams the completion of one prompt from an engine. Closing the iterator cancels the request.

    Invalid arguments raise at the call, not at the first `next`.
    """
    request = engine.submit(prompt, params)

    def parts():
        try:
            while not request.is_done:
                yield from (part for owner, part in engine.step() if owner is request)
        except KeyboardInterrupt:
            engine.reset()  # Ctrl-C may have interrupted a step halfway
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
            yield [new.get(request) or _empty_part(request) for request in requests]


def _empty_part(request: Request) -> Completion:
    return Completion([], [] if request.params.logprobs else None, request.finish_reason)
