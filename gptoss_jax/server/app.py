"""ASGI application: routes, access control, errors in OpenAI's format, request ids."""

import contextlib
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss_jax.server import chat, completions, responses, tokenization
from gptoss_jax.server.chat_page import chat_page
from gptoss_jax.server.errors import ApiError, internal_error
from gptoss_jax.server.fields import shown
from gptoss_jax.server.service import Service, Settings, request_id
from gptoss_jax.server.transport import error_response, json_response
from gptoss_jax.terminal import printable

log = logging.getLogger(__name__)
# Served without an API key.
OPEN_PATHS = ("/", "/health")
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: Service) -> Starlette:
    """Returns the ASGI application for a model, with the access rules of `service.settings`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.close()

    settings = service.settings
    middleware: list[Middleware] = []
    if settings.cors_origins:
        cors: dict[str, Any] = {
            "allow_origins": list(settings.cors_origins),
            "allow_methods": ["GET", "POST", "DELETE"],
            "allow_headers": ["*"],
            "expose_headers": ["x-request-id"],
        }
        middleware.append(Middleware(CORSMiddleware, **cors))
    middleware.append(Middleware(Guard, service=service))
    handlers: dict[Any, Callable[..., Any]] = {ApiError: _on_api_error, HTTPException: _on_http_error}
    app = Starlette(
        routes=make_routes(), middleware=middleware, exception_handlers=handlers, lifespan=lifespan
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def make_routes() -> list[BaseRoute]:
    """Returns all routes."""
    return [
        Route("/", chat_page),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        *chat.routes(),
        *completions.routes(),
        *responses.routes(),
        *tokenization.routes(),
    ]


async def health(request: Request) -> Response:
    """`GET /health`: 200 if the server accepts requests, else 503."""
    service: Service = request.app.state.service
    service.check_ready()
    return json_response({"status": "ok"})


async def metrics(request: Request) -> Response:
    """`GET /metrics`: metrics in Prometheus's text format."""
    return Response(request.app.state.service.metrics.render(), media_type=METRICS_TYPE)


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    return json_response({"object": "list", "data": [_model_card(request.app.state.service)]})


async def model(request: Request) -> Response:
    """`GET /v1/models/ID`."""
    service: Service = request.app.state.service
    name = request.path_params["model"]
    if name != service.model_id:
        raise service.model_not_found(name)
    return json_response(_model_card(service))


def _model_card(service: Service) -> Mapping[str, object]:
    return {
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "gptoss-jax",
        "max_model_len": service.max_context,
        # For the chat page.
        "kind": "completion" if service.harmony is None else "chat",
    }


class Guard:
    """Outermost middleware: access control, errors, request ids, and a log line per request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["request_id"] = name = request_id(headers.get("x-request-id"))
        status, began = 0, time.monotonic()
        needs_engine = scope["method"] == "POST"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                added["x-request-id"] = name
                added["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._service.num_requests += needs_engine
            try:
                self._check(scope, headers)
                await self._app(scope, receive, send_with_headers)
            except ApiError as error:
                await error_response(error)(scope, receive, send_with_headers)
            except Exception:
                log.exception("%s failed", name)
                if not status:  # otherwise the response has already started
                    await error_response(internal_error())(scope, receive, send_with_headers)
        finally:
            self._service.num_requests -= needs_engine
            handler = getattr(scope.get("route"), "path", "other")
            self._service.metrics.on_response(scope["method"], handler, status)
            seconds = time.monotonic() - began
            log.info("%s %s %s %d %.3f s", name, scope["method"], safe_path(scope["path"]), status, seconds)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError for a request that must be rejected."""
        settings, path = self._service.settings, scope["path"]
        check_host(settings, headers)
        if path != "/":  # links from other sites to the chat page are fine
            check_origin(settings, headers)
        if path not in OPEN_PATHS:
            check_key(settings, headers)
        if scope["method"] == "POST":
            self._service.check_ready()


def check_key(settings: Settings, headers: Headers) -> None:
    """Raises ApiError 401 for a missing or invalid API key."""
    if settings.api_key is None:
        return
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    # Headers are decoded as Latin-1: encode them back to the original bytes.
    if not hmac.compare_digest(given.encode("latin-1"), settings.api_key.encode()):
        message = "The API key is missing or invalid: send it as `Authorization: Bearer KEY`."
        raise ApiError(401, message, code="invalid_api_key")


def check_host(settings: Settings, headers: Headers) -> None:
    """Raises ApiError 403 for a Host header that is not allowed, to prevent DNS rebinding: a web page's own
    host name could resolve to 127.0.0.1 and make it same-origin.
    """
    host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
    if settings.allowed_hosts and host not in settings.allowed_hosts:
        allowed = f"must be one of {', '.join(settings.allowed_hosts)}, or the server needs an API key"
        raise ApiError(403, f"The Host header is {shown(host)}: {allowed}.")


def check_origin(settings: Settings, headers: Headers) -> None:
    """Raises ApiError 403 for cross-origin requests from a browser.

    Without CORS headers a page cannot read the response, but it could still start a request.
    """
    is_allowed = not {"*", headers.get("origin")}.isdisjoint(settings.cors_origins)
    # Another port on localhost is same-site but cross-origin.
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_allowed:
        raise ApiError(403, "Cross-origin requests are not allowed; see --cors-origins.")


def safe_path(path: str) -> str:
    """Returns a path that is safe to log: control characters escaped, one line, at most 100 characters."""
    return printable(path[:100]).replace("\n", "\\n")


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """Converts the router's 404 and 405."""
    path = safe_path(request.url.path)
    message = (
        f"{request.method} is not supported for {path}."
        if error.status_code == 405
        else f"{path} does not exist."
    )
    return json_response(ApiError(error.status_code, message).body(), error.status_code, error.headers)
