"""Prometheus metrics under vLLM's names, so that its dashboards work."""

import functools
from typing import Any, TypeVar

import prometheus_client as prometheus

from gptoss_jax.inference.sampling_params import Completion
from gptoss_jax.server.engine_thread import EngineThread, Observer, Stream

Metric = TypeVar("Metric", prometheus.Counter, prometheus.Histogram)
# Histogram bucket bounds, in seconds and tokens.
FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
BETWEEN_TOKENS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
WHOLE_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
# Clients can send any word as the method; all others share one label to bound the number of time series.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class Metrics(Observer):
    """Counters and histograms of one server, in a separate registry."""

    def __init__(self, model_id: str = "model") -> None:
        self.registry = prometheus.CollectorRegistry()
        self._engine: EngineThread | None = None
        self._labels = {"model_name": model_id, "engine": "0"}
        self._prompt_tokens = self._make(prometheus.Counter, "prompt_tokens", "Prompt tokens processed.")
        self._tokens = self._make(prometheus.Counter, "generation_tokens", "Generated tokens.")
        self._queries = self._make(
            prometheus.Counter, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._hits = self._make(
            prometheus.Counter, "prefix_cache_hits", "Prompt tokens found in the prefix cache."
        )
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Seconds to the first token.", FIRST_TOKEN
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds",
            "Seconds between consecutive tokens of a completion.",
            BETWEEN_TOKENS,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Seconds from arrival to completion of a request.", WHOLE_REQUEST
        )
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens per request.", TOKENS)
        self._request_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens per request.", TOKENS
        )
        names = [*self._labels, "finished_reason"]
        self._finished = prometheus.Counter(
            "vllm:request_success", "Finished requests.", names, registry=self.registry
        )
        self._http = prometheus.Counter(
            "http_requests", "HTTP responses.", ["method", "handler", "status"], registry=self.registry
        )

    def watch(self, engine: EngineThread) -> None:
        """Starts observing the requests of an engine."""
        engine.observer = self
        if self._engine is engine:
            return
        self._engine = engine
        for name, about in (("running", "being decoded"), ("waiting", "waiting for a slot")):
            gauge = prometheus.Gauge(
                f"vllm:num_requests_{name}", f"Requests {about}.", list(self._labels), registry=self.registry
            )
            gauge.labels(**self._labels).set_function(functools.partial(getattr, engine, f"num_{name}"))

    def on_part(self, stream: Stream, part: Completion, now: float) -> None:
        if part.tokens:
            self._tokens.inc(len(part.tokens))
            if stream.first_token is None:
                self._ttft.observe(now - stream.created)
            elif stream.last_token is not None:
                self._itl.observe((now - stream.last_token) / len(part.tokens))
        if part.finish_reason is not None:
            self._finish(stream, len(part.tokens), now, part.finish_reason)

    def on_cancel(self, stream: Stream) -> None:
        import time

        self._finish(stream, 0, time.monotonic(), "abort")

    def on_response(self, method: str, handler: str, status: int) -> None:
        """Counts an HTTP response; `handler` is the path of its route."""
        method = method if method in METHODS else "other"
        self._http.labels(method, handler, f"{status // 100}xx").inc()

    def render(self) -> bytes:
        """Returns the metrics in Prometheus's text format."""
        return prometheus.generate_latest(self.registry)

    def _finish(self, stream: Stream, new_tokens: int, now: float, reason: str) -> None:
        self._finished.labels(**self._labels, finished_reason=reason).inc()
        self._prompt_tokens.inc(len(stream.prompt))
        self._queries.inc(len(stream.prompt))
        self._hits.inc(stream.cached_tokens)
        self._e2e.observe(now - stream.created)
        self._request_prompt.observe(len(stream.prompt))
        self._request_tokens.observe(stream.num_tokens + new_tokens)

    def _make(self, kind: type[Metric], name: str, about: str, **settings: Any) -> Metric:
        metric = kind(f"vllm:{name}", about, list(self._labels), registry=self.registry, **settings)
        return metric.labels(**self._labels)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> prometheus.Histogram:
        return self._make(prometheus.Histogram, name, about, buckets=buckets)
