"""Runs the engine on a separate thread for asyncio: output streams, a bounded queue, cancellation."""

import asyncio
import collections
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, Self

from gptoss_jax.inference.sampling_params import Completion, SamplingParams, join_parts
from gptoss_jax.server.errors import ApiError, bad_request, internal_error

log = logging.getLogger(__name__)
# Retry-After in seconds for rejected requests.
RETRY_AFTER = 2
# Consecutive failed steps after which the engine is considered broken.
MAX_FAULTS = 8


class Engine(Protocol):
    """The interface of `inference.engine.Engine` that the server uses, from one thread only."""

    @property
    def has_work(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def submit(self, prompt: Sequence[int], params: SamplingParams, *, cache_salt: str = "") -> Any: ...
    def step(self) -> list[tuple[Any, Completion]]: ...
    def cancel(self, request: Any) -> None: ...
    def reset(self, *, drop_prefixes: bool = False) -> None: ...


class Observer:
    """Callbacks for request events, called on the engine thread; see `metrics.Metrics`."""

    def on_part(self, stream: "Stream", part: Completion, now: float) -> None:
        """Called for each new part of a completion, before the stream's times and counts are updated."""

    def on_cancel(self, stream: "Stream") -> None:
        """Called once for a request that is cancelled or fails."""


class Stream:
    """Asynchronous iterator over the parts of one completion. Closing it cancels the request.

    Parts that arrive while the consumer is busy are merged, so a slow consumer gets fewer, longer ones.
    Raises ApiError for requests that the engine rejects and for engine errors.
    """

    def __init__(
        self, thread: "EngineThread", prompt: Sequence[int], params: SamplingParams, cache_salt: str
    ) -> None:
        self.prompt, self.params, self.cache_salt = prompt, params, cache_salt
        self.cached_tokens = 0
        self.num_tokens = 0  # sampled so far; written by the engine thread
        self.created = time.monotonic()
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.request: Any = None  # the engine's request; engine thread only
        self.is_closed = False  # closed by the consumer before its end
        self.is_done = False  # finished, failed or cancelled in the engine
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._parts: list[Completion] = []
        self._error: ApiError | None = None
        self._arrived = asyncio.Event()
        self._is_finished = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Completion:
        if self._is_finished:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        if self._is_finished:  # closed while waiting
            raise StopAsyncIteration
        parts, self._parts = self._parts, []
        if self._error is not None:
            self._is_finished = True
            raise self._error
        part = join_parts(parts)
        self._is_finished = part.finish_reason is not None
        return part

    async def completion(self) -> Completion:
        """Returns the complete completion, or the part received so far if the stream is closed meanwhile."""
        parts = [part async for part in self]
        return join_parts(parts) if parts else Completion([], None, None)

    def close(self) -> None:
        """Cancels the request unless it has finished. Idempotent."""
        if not self._is_finished:
            self._is_finished = self.is_closed = True
            self._parts = []
            self._arrived.set()
            self._thread.cancel(self)

    async def aclose(self) -> None:
        """Same as `close`, for `contextlib.aclosing`."""
        self.close()

    def deliver(self, part: Completion | ApiError) -> None:
        """Adds a part or an error; called on the event loop's thread."""
        if self._is_finished:
            return
        if isinstance(part, ApiError):
            self._error = part
        else:
            self._parts.append(part)
        self._arrived.set()


class EngineThread:
    """Owns an engine and its thread. Call `stream` and `cancel` on the event loop's thread."""

    def __init__(self, engine: Engine, max_queue: int = 256) -> None:
        """`max_queue` is the maximum number of requests waiting for a slot."""
        self.engine, self.max_queue = engine, max_queue
        self.failure: BaseException | None = None  # the error that stopped the engine
        self.observer = Observer()
        self._inbox: collections.deque[tuple[str, Stream]] = collections.deque()
        self._condition = threading.Condition()
        self._streams: dict[Any, Stream] = {}  # by engine request
        self._num_faults = 0  # failed steps since the last output
        self._num_open = 0  # accepted, unfinished streams; event loop's thread only
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Stops the thread after the current step; unfinished streams get an error."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def num_open(self) -> int:
        """Number of accepted requests that have not finished."""
        return self._num_open

    @property
    def num_running(self) -> int:
        """Number of requests being decoded."""
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        """Number of requests waiting for a slot."""
        return self.engine.num_waiting + len(self._inbox)

    def stream(self, prompt: Sequence[int], params: SamplingParams, *, cache_salt: str = "") -> Stream:
        """Submits one request. Raises ApiError 429 if the queue is full."""
        return self.streams([(prompt, params)], cache_salt=cache_salt)[0]

    def streams(
        self, requests: Sequence[tuple[Sequence[int], SamplingParams]], *, cache_salt: str = ""
    ) -> list[Stream]:
        """Submits several requests, all or none. Raises ApiError 429 if the queue is full."""
        waiting = self.num_waiting
        if waiting >= self.max_queue:
            message = f"The queue is full: {waiting:,} requests are waiting. Try again later."
            raise ApiError(429, message, code="queue_full", retry_after=RETRY_AFTER)
        streams = [Stream(self, prompt, params, cache_salt) for prompt, params in requests]
        if not self._send([("submit", stream) for stream in streams]):
            raise ApiError(503, "The engine has stopped.", retry_after=RETRY_AFTER)
        self._num_open += len(streams)
        return streams

    def cancel(self, stream: Stream) -> None:
        """Cancels a request; see `Stream.close`."""
        self._send([("cancel", stream)])

    def _send(self, messages: Sequence[tuple[str, Stream]]) -> bool:
        """Sends messages to the engine thread; returns False if it has stopped."""
        with self._condition:
            if not self._is_closed:
                self._inbox.extend(messages)
                self._condition.notify()
            return not self._is_closed

    def _run(self) -> None:
        try:
            while self._wait():
                self._read_inbox()
                if self.engine.has_work:
                    self._step()
        except BaseException as error:
            log.exception("the engine failed")
            self.failure = error
        with self._condition:
            self._is_closed = True
        self._read_inbox(refuse=True)
        self._finish([(stream, self._end_error()) for stream in list(self._streams.values())])

    def _step(self) -> None:
        """Runs one engine step.

        An error, such as running out of memory for a longer cache, fails the engine's current requests, but
        not the server. After MAX_FAULTS consecutive errors it is raised.
        """
        try:
            parts = self.engine.step()
        except Exception:
            self._num_faults += 1
            if self._num_faults >= MAX_FAULTS:
                raise
            log.exception("engine step failed; all its requests get an error")
            self._finish([(stream, internal_error()) for stream in list(self._streams.values())])
            self.engine.reset(drop_prefixes=True)
            return
        if parts:
            self._num_faults = 0
        self._deliver(parts)

    def _end_error(self) -> ApiError:
        """Returns the error for requests that are unfinished when the thread ends."""
        if self.failure is not None:
            return internal_error()
        return ApiError(503, "The server stopped before the response was complete.", retry_after=RETRY_AFTER)

    def _wait(self) -> bool:
        """Waits for work; returns False if the thread should stop."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_closed or self._inbox or self.engine.has_work)
            return not self._is_closed

    def _read_inbox(self, refuse: bool = False) -> None:
        faults: list[tuple[Stream, ApiError | None]] = []
        while self._inbox:
            kind, stream = self._inbox.popleft()
            if refuse:
                faults.append((stream, self._end_error()))
            elif kind == "submit":
                try:
                    request = self.engine.submit(stream.prompt, stream.params, cache_salt=stream.cache_salt)
                except ValueError as error:
                    faults.append((stream, bad_request(str(error))))
                    continue
                stream.request = request
                self._streams[request] = stream
            elif not stream.is_done:
                if stream.request is not None:
                    self.engine.cancel(stream.request)
                faults.append((stream, None))
        self._finish(faults)

    def _deliver(self, parts: Sequence[tuple[Any, Completion]]) -> None:
        now = time.monotonic()
        delivered: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Completion]]] = {}
        for request, part in parts:
            stream = self._streams.get(request)
            if stream is None:
                continue
            stream.cached_tokens = request.cached_tokens or 0
            self.observer.on_part(stream, part, now)
            stream.num_tokens += len(part.tokens)
            if part.tokens:
                stream.first_token, stream.last_token = stream.first_token or now, now
            if part.finish_reason is not None:
                del self._streams[request]
                stream.is_done = True
            delivered.setdefault(stream._loop, []).append((stream, part))
        for loop, items in delivered.items():
            _call(loop, self._deliver_on_loop, items)

    def _deliver_on_loop(self, items: Sequence[tuple[Stream, Completion | ApiError | None]]) -> None:
        for stream, part in items:
            if part is not None:
                stream.deliver(part)
            self._num_open -= stream_ended(part)

    def _finish(self, faults: Sequence[tuple[Stream, ApiError | None]]) -> None:
        """Ends streams with an error; None for cancelled ones."""
        for stream, error in faults:
            if stream.is_done:
                continue
            stream.is_done = True
            self._streams.pop(stream.request, None)
            self.observer.on_cancel(stream)
            _call(stream._loop, self._deliver_on_loop, [(stream, error)])


def stream_ended(part: Completion | ApiError | None) -> bool:
    """Returns True if this ends a stream: a last part, an error, or None for a cancellation."""
    return not isinstance(part, Completion) or part.finish_reason is not None


async def merge(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Completion]]:
    """Yields (stream index, part) from several streams as parts arrive.

    A stream that the consumer has closed yields no further parts.
    """
    if len(streams) == 1:  # the common case needs no task and no queue
        async for part in streams[0]:
            if not streams[0].is_closed:
                yield 0, part
        return
    queue: asyncio.Queue[tuple[int, Completion | BaseException | None]] = asyncio.Queue(maxsize=1)

    async def pump(i: int, stream: Stream) -> None:
        try:
            async for part in stream:
                await queue.put((i, part))
            await queue.put((i, None))
        except Exception as error:
            await queue.put((i, error))

    pumps = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        open_streams = len(streams)
        while open_streams:
            i, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_streams -= 1
            elif not streams[i].is_closed:
                yield i, item
    finally:
        for one in pumps:
            one.cancel()


def _call(loop: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop is closed: no one is waiting
        log.debug("event loop closed")
