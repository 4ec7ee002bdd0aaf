"""`gptoss serve`: an OpenAI-compatible API, and a chat page."""

import dataclasses
import datetime
import ipaddress
import os
import re
import sys
from typing import TYPE_CHECKING, Literal

import tyro

from gptoss_jax.cli.arguments import Folder, OptionalFloat, OptionalInt, OptionalText, Texts
from gptoss_jax.config import require

if TYPE_CHECKING:
    from gptoss_jax.server.load import ServeConfig
    from gptoss_jax.server.service import Service, Settings

INSTALL_SERVE = "pip install 'gptoss-jax[serve]'"
KEY_VARIABLE = "GPTOSS_API_KEY"
# Packages of the extra `serve`, by the names that are imported.
EXTRA = ("starlette", "uvicorn", "prometheus_client", "llguidance")


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a model with an OpenAI-compatible API and a chat page.

    The API is at /v1, the chat page at /, metrics for Prometheus at /metrics. On Ctrl-C or SIGTERM the server
    refuses new requests and lets running ones finish; see --drain. Needs the extra "serve".

    Examples:
      gptoss serve runs/quickstart-sft
      gptoss serve hf:openai/gpt-oss-20b --host 0.0.0.0 --api-key "$KEY" --warmup
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """

    # Model: a run folder, a Hugging Face folder, or hf:OWNER/NAME to download one from the Hugging Face Hub.
    folder: Folder
    # Address to listen on. Use 0.0.0.0 to let other machines connect, together with --api-key.
    host: str = "127.0.0.1"
    # Port to listen on; 0 picks a free port and prints it.
    port: int = 8000
    # Key that clients must send. (default: the environment variable GPTOSS_API_KEY, or no key)
    api_key: OptionalText = None
    # LoRA adapter to apply: a PEFT folder, or a run that trained adapters.
    adapter: OptionalText = None
    # Mesh of devices to split the model over, such as tensor=2. (default: one device)
    mesh: OptionalText = None
    # Name of the model in the API. (default: the name of the folder)
    model_name: OptionalText = None
    # Number of requests decoded together. (default: 8 on CPU; elsewhere as many as fit in memory, up to 16)
    slots: OptionalInt = None
    # Maximum tokens of a prompt and its answer together. (default: the model's limit)
    context: OptionalInt = None
    # Reuse the KV cache of prompts that start the same way. "exact" does so only where the answer stays
    # bit-identical.
    prefix_reuse: Literal["any", "exact", "off"] = "any"
    # Memory for reusable prompt prefixes, in GB. (default: 1.07 (1 GiB))
    prefix_cache: OptionalFloat = None
    # Compile before reporting ready, so that the first requests do not wait for it.
    warmup: tyro.conf.FlagCreatePairsOff[bool] = False
    # Maximum number of waiting requests; further ones get status 429.
    max_queue: int = 256
    # Maximum size of a request body, in MB.
    max_body: float = 16.0
    # Seconds that running requests have to finish after Ctrl-C or SIGTERM.
    drain: float = 30.0
    # Origin of web pages that may call the API, such as https://example.com, or "*" for any.
    cors_origins: Texts = ()
    # Reasoning effort of requests that do not set one.
    reasoning: Literal["low", "medium", "high"] = "medium"
    # Date in the system message of a chat, as YYYY-MM-DD. (default: today, or none if the model was trained
    # without one)
    date: OptionalText = None
    # Serve a chat model as a base model, with completions only.
    plain: tyro.conf.FlagCreatePairsOff[bool] = False
    # Prepend the beginning-of-text token to prompts given as token ids, as gptoss eval does. Text prompts
    # always start with it.
    prepend_bos: tyro.conf.FlagCreatePairsOff[bool] = False
    # Also send reasoning under the name reasoning_content, for clients that only know that one.
    reasoning_content: tyro.conf.FlagCreatePairsOff[bool] = False
    # Log a line for each request.
    log_requests: tyro.conf.FlagCreatePairsOff[bool] = False

    def run(self) -> None:
        self._check()
        _check_extra()
        from gptoss_jax.server import lifecycle

        settings = self._settings()
        bound = lifecycle.bind(self.host, self.port)
        _log_to_stderr(self.log_requests)
        port = bound.getsockname()[1]

        def load() -> "Service":
            from gptoss_jax.server.load import load_service
            from gptoss_jax.terminal import printable

            then = " and compiling" if self.warmup else ""
            print(f"loading {printable(self.folder)}{then} …", file=sys.stderr, flush=True)
            return load_service(self._config(settings))

        lifecycle.serve(
            load,
            bound,
            drain=self.drain,
            warmup=self.warmup,
            on_ready=lambda service: print(self._banner(service, port), flush=True),
        )

    def _check(self) -> None:
        """Raises ValueError for a setting that is out of range, before anything is loaded."""
        for name in ("slots", "max_queue"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= 1 << 20, name, value, "must be from 1 to 1048576")
        for name in ("drain", "prefix_cache"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1e6, name, value, "must be 0 or more")
        require(0 < self.max_body <= 1024, "max_body", self.max_body, "must be above 0 and at most 1024 (MB)")
        require(0 <= self.port < 1 << 16, "port", self.port, "must be from 0 to 65535")
        require(self.date is None or _is_date(self.date), "date", self.date, "must be YYYY-MM-DD")
        for origin in self.cors_origins:
            # Browsers send it so; in another form it would match nothing.
            is_origin = origin == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin)
            require(bool(is_origin), "cors_origins", origin, 'must be like https://example.com, or "*"')
        key = self._key()
        is_plain = key is None or (key.isascii() and key.isprintable() and key.strip() == key != "")
        # The key itself is not printed.
        require(is_plain, "api_key", "…", "must be printable ASCII without spaces around it")

    def _key(self) -> str | None:
        return self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE)

    def _settings(self) -> "Settings":
        from gptoss_jax.server.service import Settings

        hosts: tuple[str, ...] = ()
        if _is_loopback(self.host) and self._key() is None:
            hosts = tuple(dict.fromkeys(("localhost", "127.0.0.1", "[::1]", self.host.lower())))
        return Settings(
            api_key=self._key(),
            cors_origins=self.cors_origins,
            allowed_hosts=hosts,
            max_body=int(self.max_body * 1e6),
            prepend_bos=self.prepend_bos,
            reasoning_content=self.reasoning_content,
        )

    def _config(self, settings: "Settings") -> "ServeConfig":
        from gptoss_jax.server.load import ServeConfig

        return ServeConfig(
            folder=self.folder,
            adapter=self.adapter,
            mesh=self.mesh,
            model_name=self.model_name,
            slots=self.slots,
            context=self.context,
            prefix_reuse=self.prefix_reuse,
            prefix_cache_bytes=None if self.prefix_cache is None else int(self.prefix_cache * 1e9),
            max_queue=self.max_queue,
            plain=self.plain,
            date=self.date,
            reasoning=self.reasoning,
            settings=settings,
        )

    def _banner(self, service: "Service", port: int) -> str:
        from gptoss_jax.terminal import printable

        host = f"[{self.host}]" if ":" in self.host else self.host
        kind = "chat model" if service.harmony is not None else "base model"
        slots = service.engine.engine.num_slots
        key = "needed" if service.settings.api_key else "none"
        if key == "none" and not _is_loopback(self.host):
            key = "none: everyone who can reach this machine can use the model; see --api-key"
        model = [
            printable(service.model_id),
            kind,
            f"{service.max_context:,} tokens",
            f"{slots} slot{'s' * (slots != 1)}",
        ]
        rows = {
            "model": " · ".join(model),
            "page": f"http://{host}:{port}/",
            "API": f"http://{host}:{port}/v1",
            "key": key,
        }
        return "\n".join(f"{name:<7}{value}" for name, value in rows.items())


def _check_extra() -> None:
    """Raises ValueError if a package of the extra `serve` is missing."""
    import importlib.util

    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"gptoss serve needs {', '.join(missing)}: {INSTALL_SERVE}")


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_to_stderr(requests: bool) -> None:
    """Prints the server's log on stderr, harmless to a terminal whatever clients send."""
    import logging

    from gptoss_jax.terminal import printable

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            # Lines of a traceback are indented: no message can look like another line of the log.
            return printable(super().format(record)).replace("\n", "\n  ")

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (
        ("gptoss_jax.server", logging.INFO if requests else logging.WARNING),
        ("uvicorn", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
