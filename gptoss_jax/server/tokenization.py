"""Tokenization: `/tokenize`, `/detokenize`, `/tokenizer_info`, and the prompts of `/v1/completions`."""

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
# Longer texts are tokenized on another thread to keep the event loop responsive.
ENCODE_INLINE = 4096


def routes() -> list[Route]:
    """Returns the routes of this module."""
    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
    ]


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`: token ids of `prompt`, as for `/v1/completions`, or of a chat's `messages`."""
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
    """`POST /detokenize`: text of `tokens`, with special tokens by name."""
    service: Service = request.app.state.service
    fields = await read_json(request)
    service.check_model(fields)
    fields.needed("tokens")
    tokens = fields.array("tokens") or []
    check_tokens(tokens, "tokens", service.vocab_size)
    text = await inline_or_thread(len(tokens), lambda: TokenTexts(service.tokenizer).decode(tokens))
    return json_response({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """`GET /tokenizer_info`: names of the special tokens, in the format that lm_eval expects."""
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
    """Returns `parse_special`, whether to parse names of special tokens in a text prompt as tokens, and
    `add_special_tokens`, whether to prepend bos."""
    return fields.boolean("parse_special", True), fields.boolean("add_special_tokens", True)


async def encode_prompt(tokenizer: Tokenizer, text: str, parse_special: bool, add_bos: bool) -> list[int]:
    """Tokenizes a text prompt; with `add_bos`, it starts with exactly one added or existing bos."""

    def encode() -> list[int]:
        pieces = [text]
        if parse_special:
            names = sorted(tokenizer.special_tokens, key=len, reverse=True)
            pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        # The odd pieces are names of special tokens.
        encoded = iter(tokenizer.encode_batch(pieces[::2]))
        tokens: list[int] = []
        for i, piece in enumerate(pieces):
            tokens += [tokenizer.special_tokens[piece]] if i % 2 else next(encoded).tolist()
        return tokens if not add_bos or tokens[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *tokens]

    return await inline_or_thread(len(text), encode)


async def inline_or_thread(length: int, function: Callable[[], Result]) -> Result:
    """Calls a function inline for short texts, and on another thread for long ones."""
    return function() if length <= ENCODE_INLINE else await anyio.to_thread.run_sync(function)


class TokenTexts:
    """Wraps a tokenizer to decode special tokens, and ids outside its vocabulary, to their names.

    A `BytesDecoder` for `StreamingDetokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = 1 << 31
        self._tokenizer = tokenizer
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Decodes tokens to bytes."""
        return b"".join(map(self._spelled, tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """Decodes tokens to text, with U+FFFD for invalid UTF-8."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def name(self, token: int) -> str:
        """Returns a token's text; for an incomplete character, its bytes as `bytes:\\xe2`, like OpenAI."""
        data = self._spelled(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _spelled(self, token: int) -> bytes:
        if token in self._names or token >= self._tokenizer.vocab_size:
            return self._names.get(token, f"<|reserved_{token}|>").encode()
        return self._tokenizer.decode_bytes([token])
