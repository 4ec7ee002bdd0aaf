"""Server state shared by all endpoints: engine, tokenizer, names, limits and defaults."""

import dataclasses
import datetime
import logging
import re
import secrets
import time
from collections.abc import Collection
from typing import Any, Literal

from gptoss_jax.data.harmony import Harmony, Reasoning
from gptoss_jax.data.tokenizer import Tokenizer
from gptoss_jax.server.engine_thread import EngineThread
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.fields import Fields, shown
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.response_store import ResponseStore

log = logging.getLogger(__name__)
State = Literal["loading", "ready", "draining", "stopped"]
# Retry-After in seconds while the server is loading or draining.
RETRY_AFTER = 5
# Maximum number of unknown field names to log.
MAX_UNKNOWN = 100


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Default sampling parameters: OpenAI's, or those of generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits and access rules of a server."""

    # Required for all requests except /health and the chat page itself; None: no key.
    api_key: str | None = None
    # Web origins that may call the API; "*" allows any.
    cors_origins: tuple[str, ...] = ()
    # Allowed values of the Host header; empty: any.
    allowed_hosts: tuple[str, ...] = ()
    # Maximum size of a request body in bytes.
    max_body: int = 16 << 20
    # Seconds to receive a request body.
    body_timeout: float = 60.0
    # Seconds before a stream is closed if the client does not read it.
    send_timeout: float = 60.0
    # Seconds between keep-alive comments in an idle stream.
    ping_interval: float = 15.0
    # Default of `add_special_tokens` for prompts given as token ids: prepend bos.
    prepend_bos: bool = False
    # Also send reasoning as `reasoning_content`.
    reasoning_content: bool = False
    # Maximum choices per request: prompts times `n`.
    max_choices: int = 1024


@dataclasses.dataclass
class Service:
    """The served model and its state."""

    engine: EngineThread
    tokenizer: Tokenizer
    model_id: str
    # None for a base model, which does not support chat.
    harmony: Harmony | None = None
    max_context: int = 131072
    vocab_size: int = 201088
    defaults: Defaults = Defaults()
    system_fingerprint: str = "fp_unknown"
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    # Date in the system message: YYYY-MM-DD or "today"; None omits it. See `system_date`.
    date: str | None = "today"
    reasoning: Reasoning = "medium"
    settings: Settings = Settings()
    state: State = "ready"
    unknown_fields: set[str] = dataclasses.field(default_factory=set)  # already logged
    num_requests: int = 0  # POST requests in progress
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    responses: ResponseStore = dataclasses.field(default_factory=ResponseStore)

    def log_unknown(self, fields: Fields, known: Collection[str]) -> None:
        """Logs the request fields that the endpoint does not know, each name once."""
        for name in fields.values.keys() - set(known):
            if len(self.unknown_fields) < MAX_UNKNOWN and name not in self.unknown_fields:
                self.unknown_fields.add(name)
                log.warning("ignoring unknown field %s", shown(name))

    def check_model(self, fields: Fields) -> None:
        """Raises ApiError 404 if the request names another model; `model` is optional."""
        name = fields.text("model")
        if name not in (None, "", self.model_id):
            raise self.model_not_found(name)

    def model_not_found(self, name: str) -> ApiError:
        """Returns the ApiError 404 for a model that is not served."""
        message = f"The model {shown(name)} does not exist; this server serves {shown(self.model_id)}."
        return ApiError(404, message, param="model", code="model_not_found")

    def check_ready(self) -> None:
        """Raises ApiError 503 while the server is loading or draining, or if the engine has failed."""
        if self.engine.failure is not None:
            raise ApiError(503, "The engine has failed; see the server's log for details.")
        if self.state != "ready":
            raise ApiError(503, f"The server is {self.state}.", retry_after=RETRY_AFTER)

    def system_date(self) -> str | None:
        """Returns the date for `harmony.system`: the current one unless --date fixes it."""
        return datetime.date.today().isoformat() if self.date == "today" else self.date

    def need_harmony(self) -> Harmony:
        """Returns the chat format; raises ApiError 400 for a base model."""
        if self.harmony is None:
            message = f"{self.model_id} is a base model without a chat format; use /v1/completions."
            raise ApiError(400, message, param="model", code="chat_not_supported")
        return self.harmony


def make_id(prefix: str) -> str:
    """Returns a new id, such as `chatcmpl-…`."""
    return f"{prefix}-{secrets.token_hex(12)}"


def make_usage(prompt: int, completion: int, cached: int, reasoning: int | None = None) -> dict[str, Any]:
    """Returns the `usage` object from token counts; `cached` are prompt tokens found in the prefix cache."""
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if reasoning is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return usage


def request_id(given: str | None) -> str:
    """Returns the client's x-request-id if it is well-formed, else a new one."""
    if given is not None and re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", given):
        return given
    return make_id("req")
