"""Text to tokens and back: `/tokenize`, `/detokenize`, `/tokenizer_info`, and prompts of completions."""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.server.chat_request import read_request
from gptoss_jax.server.fields import Fields
from gptoss_jax.server.sampling_fields import check_tokens
from gptoss_jax.server.service import Service
from gptoss_jax.server.transport import json_response, read_json

Result = TypeVar("Result")
# Longer texts are tokenized on another thread, so that streams go on meanwhile.
ENCODE_INLINE = 4096


def routes() -> list[Route]:
    """Returns the endpoints of this file."""
    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
    ]


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`: the ids of `prompt` as `/v1/completions` reads it, or of a chat's `messages`."""
    service: Service = request.app.state.service
    fields = await read_json(request)
    service.check_model(fields)
    if "messages" in fields:
        tokens = (await read_request(fields, service)).prompt
    else:
        prompt = fields.needed_text("prompt")
        tokens = await encode_prompt(service.tokenizer, prompt, *prompt_options(fields))
    answer = {"count": len(tokens), "max_model_len": service.max_context, "tokens": tokens}
    if fields.boolean("return_token_strs"):
        answer["token_strs"] = list(map(TokenTexts(service.tokenizer).name, tokens))
    return json_response(answer)


async def detokenize(request: Request) -> Response:
    """`POST /detokenize`: the text of `tokens`, with the names of special tokens."""
    service: Service = request.app.state.service
    fields = await read_json(request)
    service.check_model(fields)
    fields.needed("tokens")
    tokens = fields.array("tokens") or []
    check_tokens(tokens, "tokens", service.vocab_size)
    text = await inline_or_thread(len(tokens), lambda: TokenTexts(service.tokenizer).decode(tokens))
    return json_response({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """`GET /tokenizer_info`: names of the special tokens, as lm_eval asks for them."""
    service: Service = request.app.state.service
    tokenizer = service.tokenizer
    return json_response(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokenizer.token_roles,
            "add_bos_token": True,
            "model_max_length": service.max_context,
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": tokenizer.special_tokens,
        }
    )


def prompt_options(fields: Fields) -> tuple[bool, bool]:
    """Returns whether names of special tokens in a prompt's text stand for the tokens, and whether bos is put
    before it: the fields `parse_special` and `add_special_tokens`."""
    return fields.boolean("parse_special", True), fields.boolean("add_special_tokens", True)


async def encode_prompt(tokenizer: Tokenizer, text: str, parse_special: bool, add_bos: bool) -> list[int]:
    """Returns the tokens of a prompt's text, with one bos in front if `add_bos`."""

    def encode() -> list[int]:
        pieces = [text]
        if parse_special:
            names = sorted(tokenizer.special_tokens, key=len, reverse=True)
            pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        # Names of special tokens are the odd pieces.
        encoded = iter(tokenizer.encode_batch(pieces[::2]))
        tokens: list[int] = []
        for i, piece in enumerate(pieces):
            tokens += [tokenizer.special_tokens[piece]] if i % 2 else next(encoded).tolist()
        return tokens if not add_bos or tokens[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *tokens]

    return await inline_or_thread(len(text), encode)


async def inline_or_thread(length: int, function: Callable[[], Result]) -> Result:
    """Calls a function here for a short text, else on another thread."""
    return function() if length <= ENCODE_INLINE else await anyio.to_thread.run_sync(function)


class TokenTexts:
    """A tokenizer whose special tokens, and ids that it does not have, are text: their names.

    A `BytesDecoder` for `StreamingDetokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = 1 << 31
        self._tokenizer = tokenizer
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Returns the bytes of tokens."""
        return b"".join(map(self._spelled, tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def name(self, token: int) -> str:
        """Returns a token's text; for part of a character its bytes as OpenAI spells them: `bytes:\\xe2`."""
        data = self._spelled(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _spelled(self, token: int) -> bytes:
        if token in self._names or token >= self._tokenizer.vocab_size:
            return self._names.get(token, f"<|reserved_{token}|>").encode()
        return self._tokenizer.decode_bytes([token])
