"""Server lifecycle: bind, load, warm up, serve, drain, stop."""

import asyncio
import contextlib
import errno
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.server.app import create_app
from gptoss_jax.server.chat_page import page_response
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.service import RETRY_AFTER, Service
from gptoss_jax.server.transport import error_response

# Keep-alive timeout in seconds: longer than the clients', which could otherwise reuse a connection just as
# the server closes it.
KEEP_ALIVE = 65
# Seconds for responses to finish after the engine has stopped.
LAST_SECONDS = 5
# Sampling parameters to compile for with --warmup.
WARMUP = (
    SamplingParams(max_new_tokens=4),
    SamplingParams(max_new_tokens=4, temperature=1.0),
    SamplingParams(max_new_tokens=4, temperature=1.0, top_p=0.9),
    SamplingParams(max_new_tokens=4, temperature=1.0, logprobs=True),
)
WARMUP_PROMPT = 700  # tokens: a chunk of each size


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address; port 0 picks a free port. Raises ValueError on failure."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        is_used = getattr(error, "errno", None) == errno.EADDRINUSE
        hint = "; choose another --port, or 0 for a free one" if is_used else ""
        raise ValueError(
            f"host is {host!r} and port is {port}: cannot listen there ({reason.lower()}){hint}"
        ) from None
    bound.set_inheritable(True)
    return bound


class LateApp:
    """ASGI application that returns 503 until `app` is set; the chat page is served and polls for it."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # `serve` starts and stops the engine.
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/":
            await page_response()(scope, receive, send)
        elif scope["type"] == "http":
            error = ApiError(503, "The server is loading the model.", retry_after=RETRY_AFTER)
            await error_response(error)(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn server that leaves signal handling to `serve`."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
        )
        self.on_signal: Callable[[int], None] = lambda number: None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Calls `on_signal` on SIGINT and SIGTERM."""
        numbers = (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ()
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.on_signal(number)


def serve(
    load: Callable[[], Service],
    bound: socket.socket,
    *,
    drain: float,
    warmup: bool,
    on_ready: Callable[[Service], None],
) -> None:
    """Loads a service and serves it until SIGTERM or Ctrl-C; then drains.

    While draining, /health and new requests return 503, and accepted requests have up to `drain` seconds to
    finish; a second signal stops immediately. Raises the errors of `load`, KeyboardInterrupt for a signal
    during loading or warmup, and OSError if the engine keeps failing.
    """
    asyncio.run(_serve(load, bound, drain, warmup, on_ready))


async def _serve(
    load: Callable[[], Service],
    bound: socket.socket,
    drain: float,
    warmup: bool,
    on_ready: Callable[[Service], None],
) -> None:
    app, loop = LateApp(), asyncio.get_running_loop()
    server, signalled = Server(app), asyncio.Event()
    num_signals = 0

    def on_signal(number: int) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:
            server.force_exit = server.should_exit = True
        loop.call_soon_threadsafe(signalled.set)

    server.on_signal = on_signal
    serving = asyncio.ensure_future(server.serve(sockets=[bound]))
    signal_seen = asyncio.ensure_future(signalled.wait())
    service = None
    try:
        loaded = _in_daemon(load)
        await asyncio.wait((loaded, serving, signal_seen), return_when=asyncio.FIRST_COMPLETED)
        if not loaded.done():
            raise KeyboardInterrupt
        service = loaded.result()
        service.engine.start()
        app.app = create_app(service)
        if warmup:
            warming = asyncio.ensure_future(warm_up(service))
            await asyncio.wait((warming, serving, signal_seen), return_when=asyncio.FIRST_COMPLETED)
            if not warming.done():
                raise KeyboardInterrupt
            warming.result()
        service.metrics.watch(service.engine)
        service.state = "ready"
        on_ready(service)
        failed = asyncio.ensure_future(_until(lambda: service.engine.failure is not None, math.inf, server))
        await asyncio.wait((serving, signal_seen, failed), return_when=asyncio.FIRST_COMPLETED)
        failed.cancel()
        if service.engine.failure is not None:
            raise OSError("the engine failed repeatedly; see the log above")
        await _drain(service, server, drain)
    finally:
        if service is not None:
            service.state = "stopped"
            await asyncio.to_thread(service.engine.close)
            # Let streams send their last events before the connections close.
            await _until(lambda: service.num_requests == 0, LAST_SECONDS, server)
        server.should_exit = True
        signal_seen.cancel()
        await serving


async def warm_up(service: Service) -> None:
    """Compiles the programs of typical requests."""
    length = min(WARMUP_PROMPT, service.max_context - WARMUP[0].max_new_tokens)
    for params in WARMUP:
        # A separate salt, so that no other prompt matches this one in the prefix cache.
        prompt = [token % service.vocab_size for token in range(length)]
        await service.engine.stream(prompt, params, cache_salt="warmup").completion()


async def _drain(service: Service, server: Server, seconds: float) -> None:
    service.state = "draining"
    if service.num_requests:
        count = service.num_requests
        message = f"finishing {count:,} request{'s' * (count > 1)}, for up to {seconds:g} s"
        print(f"gptoss: {message}; press Ctrl-C again to stop now", file=sys.stderr, flush=True)
    await _until(lambda: service.num_requests == 0, seconds, server)


async def _until(condition: Callable[[], bool], seconds: float, server: Server) -> None:
    """Waits for a condition, a timeout, or a second signal."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end and not server.force_exit:
        await asyncio.sleep(0.05)


def _in_daemon(function: Callable[[], Service]) -> "asyncio.Future[Service]":
    """Calls a function on a daemon thread, which does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Service] = loop.create_future()

    def finish(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        outcome: tuple[Callable[[Any], None], object]
        try:
            outcome = future.set_result, function()
        except BaseException as error:
            outcome = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, *outcome)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
