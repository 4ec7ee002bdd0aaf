"""Grammar of a complete Harmony response, for response formats, required tool calls and strict functions.

It includes the control tokens, from the first sampled token on: reasoning is unconstrained, and only the
final message or the tool calls must follow a schema. See `inference.grammar`.
"""

from collections.abc import Callable

from gptoss_jax.data.harmony import FUNCTIONS
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.inference.grammar import GrammarMatcher
from gptoss_jax.server.enforced_schema import Schema, enforced_schema, reason_of
from gptoss_jax.server.errors import bad_request
from gptoss_jax.server.response_format import ANY_OBJECT, ResponseFormat
from gptoss_jax.server.tools import Tools

# A prompt ends with `<|start|>assistant`. openai-harmony puts the recipient of a call before the channel, but
# gpt-oss writes it after, and may call from `analysis` too.
RULES = r"""before: <|channel|> BEFORE <|message|> TEXT <|end|> <|start|> "assistant"
json_type: (" "? <|constrain|> "json" | " json")?
TEXT: /(.|\n)*/"""
CHANNEL = '<|channel|> ("commentary" | "analysis")'


def answer_grammar(
    tokenizer: Tokenizer, vocab_size: int, tools: Tools, response_format: ResponseFormat | None
) -> str | None:
    """Returns the Lark grammar of a response, checked to compile; None if the response is unconstrained.

    Arguments must follow the schema for strict functions and, if a call is required, for all functions whose
    schema can be enforced; otherwise they are unconstrained. Compiling takes milliseconds, for large schemas
    up to seconds.

    Args:
      tokenizer: the model's tokenizer.
      vocab_size: the model's vocabulary size.
      tools: the functions that may be called, and whether one must be.
      response_format: format of the final message; None: text.

    Raises ApiError 400 for a schema that cannot be enforced.
    """
    is_required = tools.mode == "required"
    is_limited = tools.allowed != tools.functions or any(one.strict for one in tools.allowed)
    if response_format is None and not is_required and not is_limited:
        return None
    try:
        grammar = _build(tools, response_format, lambda schema, *_: enforced_schema(schema))
        GrammarMatcher(tokenizer, vocab_size, grammar)
        return grammar
    except ValueError as error:
        reason = reason_of(error)

    def checked(schema: Schema, strict: bool, path: str) -> str:
        try:
            written = enforced_schema(schema)
            GrammarMatcher(tokenizer, vocab_size, f"start: %json {written}")
        except ValueError as error:
            if strict:
                raise bad_request(f"{path} cannot be enforced: {reason_of(error)}", path) from None
            return enforced_schema(ANY_OBJECT)
        return written

    try:
        grammar = _build(tools, response_format, checked)
        GrammarMatcher(tokenizer, vocab_size, grammar)
    except ValueError:  # too large as a whole
        field = "tools" if tools.allowed else "response_format"
        raise bad_request(f"{field} cannot be enforced: {reason}", field) from None
    return grammar


def _build(
    tools: Tools, response_format: ResponseFormat | None, write: Callable[[Schema, bool, str], str]
) -> str:
    """Returns the grammar. `write(schema, is_strict, path)` returns a schema for `%json`."""
    is_required = tools.mode == "required"
    rules, ends = [], []
    if not is_required:
        ends.append("final")
        header, text = '<|channel|> "final"', "TEXT"
        if response_format is not None:
            text = write(response_format.schema, response_format.strict, response_format.path)
            header, text = f"{header} json_type", f"%json {text}"
        rules.append(f"final: {header} <|message|> {text} <|return|>")
    for i, function in enumerate(tools.allowed):
        ends.append(f"call{i}")
        text = "TEXT"
        if function.strict or is_required:
            text = f"%json {write(function.parameters or ANY_OBJECT, function.strict, function.path)}"
        name = f'" to={FUNCTIONS}{function.name}"'
        rules.append(f"call{i}: ({CHANNEL} {name} | {name} {CHANNEL}) json_type <|message|> {text} <|call|>")
    # A preamble counts as content, like the final message: it would precede the JSON.
    before = '"analysis"' if response_format is not None else '("analysis" | "commentary")'
    return "\n".join([f"start: before* ({' | '.join(ends)})", RULES.replace("BEFORE", before), *rules])
