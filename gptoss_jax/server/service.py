"""State of a server: engine, tokenizer, names, limits and defaults, shared by all endpoints."""

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
# Seconds after which a client of a loading or draining server should try again.
RETRY_AFTER = 5
# Names of unknown fields that are logged.
MAX_UNKNOWN = 100


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Sampling settings for requests without them: OpenAI's, or those of generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits and access rules of a server."""

    # Required of every request but /health and the page's file; None: no key.
    api_key: str | None = None
    # Origins of web pages that may call the API; "*" allows any.
    cors_origins: tuple[str, ...] = ()
    # Values of the Host header that are answered; empty: any.
    allowed_hosts: tuple[str, ...] = ()
    # Bytes of a request body.
    max_body: int = 16 << 20
    # Seconds in which a request body must arrive.
    body_timeout: float = 60.0
    # Seconds that a client may leave a stream unread.
    send_timeout: float = 60.0
    # Seconds between comments in a stream that has nothing to send.
    ping_interval: float = 15.0
    # Put bos before prompts of token ids too, unless a request says `add_special_tokens`.
    prepend_bos: bool = False
    # Send a chat's reasoning as `reasoning_content` too.
    reasoning_content: bool = False
    # Choices of one request: prompts times `n`.
    max_choices: int = 1024


@dataclasses.dataclass
class Service:
    """A model that is served."""

    engine: EngineThread
    tokenizer: Tokenizer
    model_id: str
    # None for a base model: chat is refused.
    harmony: Harmony | None = None
    max_context: int = 131072
    vocab_size: int = 201088
    defaults: Defaults = Defaults()
    system_fingerprint: str = "fp_unknown"
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    # Date in the system message, see `system_date`: YYYY-MM-DD or "today"; None leaves it out.
    date: str | None = "today"
    reasoning: Reasoning = "medium"
    settings: Settings = Settings()
    state: State = "ready"
    unknown_fields: set[str] = dataclasses.field(default_factory=set)  # that were logged
    num_requests: int = 0  # that are answered now and may need the engine
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    responses: ResponseStore = dataclasses.field(default_factory=ResponseStore)

    def log_unknown(self, fields: Fields, known: Collection[str]) -> None:
        """Logs the fields of a request that its endpoint does not know, each name once."""
        for name in fields.values.keys() - set(known):
            if len(self.unknown_fields) < MAX_UNKNOWN and name not in self.unknown_fields:
                self.unknown_fields.add(name)
                log.warning("unknown field %s is ignored", shown(name))

    def check_model(self, fields: Fields) -> None:
        """Raises the 404 for a request to another model; a request without `model` is accepted."""
        name = fields.text("model")
        if name not in (None, "", self.model_id):
            raise self.model_not_found(name)

    def model_not_found(self, name: str) -> ApiError:
        """Returns the 404 for a model that is not served."""
        message = f"The model {shown(name)} does not exist; this server has {shown(self.model_id)}."
        return ApiError(404, message, param="model", code="model_not_found")

    def check_ready(self) -> None:
        """Raises the 503 while the server loads, drains, or after the engine failed."""
        if self.engine.failure is not None:
            raise ApiError(503, "The engine has failed; the server's log has the details.")
        if self.state != "ready":
            raise ApiError(503, f"The server is {self.state}.", retry_after=RETRY_AFTER)

    def system_date(self) -> str | None:
        """Returns the date for `harmony.system`. It changes at midnight unless --date fixes it."""
        return datetime.date.today().isoformat() if self.date == "today" else self.date

    def need_harmony(self) -> Harmony:
        """Returns the chat format. Raises the 400 for a base model."""
        if self.harmony is None:
            message = f"{self.model_id} is a base model without a chat format; use /v1/completions."
            raise ApiError(400, message, param="model", code="chat_not_supported")
        return self.harmony


def make_id(prefix: str) -> str:
    """Returns a new id, such as `chatcmpl-…`."""
    return f"{prefix}-{secrets.token_hex(12)}"


def make_usage(prompt: int, completion: int, cached: int, reasoning: int | None = None) -> dict[str, Any]:
    """Returns `usage`: numbers of tokens of the prompt, sampled, found in the prefix cache, of reasoning."""
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
    """Returns a client's x-request-id if it is harmless, else a new one."""
    if given is not None and re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", given):
        return given
    return make_id("req")
