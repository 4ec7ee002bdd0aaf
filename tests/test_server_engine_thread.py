"""The engine on its thread: streams, the queue, cancellation and failures."""

import asyncio

import pytest
from helpers.scripted_engine import ScriptedEngine

from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.server.engine_thread import MAX_FAULTS, EngineThread, merge
from gptoss_jax.server.errors import ApiError

PARAMS = SamplingParams(max_new_tokens=1000)


def run(engine, use, max_queue=8):
    """Runs `use(thread)` on an event loop while the engine's thread runs."""

    async def with_thread():
        thread = EngineThread(engine, max_queue)
        thread.start()
        try:
            return await asyncio.wait_for(use(thread), 20)
        finally:
            thread.close()

    return asyncio.run(with_thread())


def test_parts_arrive_in_order():
    async def use(thread):
        stream = thread.stream([1, 2, 3], PARAMS)
        parts = [part async for part in stream]
        assert [token for part in parts for token in part.tokens] == list(range(50))
        assert parts[-1].finish_reason == "stop"
        assert stream.cached_tokens == 2
        assert [part async for part in stream] == []
        assert thread.num_open == 0

    run(ScriptedEngine(range(50), chunk=3, cached_tokens=5), use)


def test_a_slow_reader_gets_longer_parts():
    async def use(thread):
        stream = thread.stream([1], PARAMS)
        first = await anext(stream)
        while thread.num_open:
            await asyncio.sleep(0.01)
        second = await anext(stream)
        assert len(first.tokens) + len(second.tokens) == 100

    run(ScriptedEngine(range(100), chunk=1, step_seconds=0.001), use)


def test_closing_a_stream_cancels_it_once():
    engine = ScriptedEngine([5] * 1000, chunk=1, step_seconds=0.001)

    async def use(thread):
        kept, closed = thread.stream([1], PARAMS), thread.stream([2], PARAMS)
        await anext(closed)
        closed.close()
        closed.close()
        assert [part async for part in closed] == []
        assert len((await kept.completion()).tokens) == 1000
        kept.close()  # finished
        assert thread.num_open == 0

    run(engine, use)
    assert [request.prompt for request in engine.cancelled] == [[2]]


def test_closing_wakes_a_reader():
    async def use(thread):
        stream = thread.stream([1], PARAMS)
        reading = asyncio.ensure_future(stream.completion())
        await asyncio.sleep(0.02)
        stream.close()
        assert await reading == Completion([], None, None)

    run(ScriptedEngine([5] * 1000, step_seconds=0.2), use)


def test_the_queue_is_bounded():
    async def use(thread):
        thread.streams([([1], PARAMS)] * 5)
        for _ in range(200):
            if (thread.num_running, thread.num_waiting) == (1, 4):
                break
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="4 requests are waiting") as caught:
            thread.stream([1], PARAMS)
        assert caught.value.status == 429 and caught.value.headers == {"Retry-After": "2"}

    run(ScriptedEngine([5] * 1000, num_slots=1, step_seconds=0.01), use, max_queue=4)


def test_input_that_the_engine_refuses():
    async def use(thread):
        with pytest.raises(ApiError, match="must leave room") as caught:
            await thread.stream([1] * 5000, PARAMS).completion()
        assert caught.value.status == 400
        assert (await thread.stream([1], PARAMS).completion()).tokens == [7]

    run(ScriptedEngine([7]), use)


def test_a_fault_ends_the_requests_but_not_the_server():
    class Fragile(ScriptedEngine):
        def step(self):
            if any(request.prompt == [0] for request in self._waiting):
                raise RuntimeError("out of memory")
            return super().step()

    async def use(thread):
        for _ in range(MAX_FAULTS):
            streams = thread.streams([([i], PARAMS) for i in range(3)])
            found = await asyncio.gather(*(stream.completion() for stream in streams), return_exceptions=True)
            assert [error.status for error in found] == [500] * 3
            assert (await thread.stream([1], PARAMS).completion()).tokens == [7]
        assert thread.failure is None and thread.num_open == 0

    run(Fragile([7]), use)


def test_repeated_faults_end_the_engine():
    class Broken(ScriptedEngine):
        def step(self):
            if self.num_steps == 3:
                raise RuntimeError("broken")
            return super().step()

    async def use(thread):
        streams = thread.streams([([i], PARAMS) for i in range(6)])
        found = await asyncio.gather(*(stream.completion() for stream in streams), return_exceptions=True)
        assert [error.status for error in found] == [500] * 6
        for _ in range(MAX_FAULTS - 1):
            with pytest.raises(ApiError, match="had an error"):
                await thread.stream([1], PARAMS).completion()
        with pytest.raises(ApiError, match="has stopped"):
            thread.stream([1], PARAMS)
        assert isinstance(thread.failure, RuntimeError) and thread.num_open == 0

    run(Broken([5] * 1000), use)


def test_merged_streams():
    async def use(thread):
        streams = [thread.stream([i] * 10, PARAMS) for i in range(5)]
        found = {}
        async for i, part in merge(streams):
            found.setdefault(i, []).extend(part.tokens)
        assert found == {i: [i] * 10 for i in range(5)}

    run(ScriptedEngine(lambda request: request.prompt, chunk=1), use)


def test_no_part_of_a_closed_stream_is_merged():
    async def use(thread):
        streams, parts = [thread.stream([1], PARAMS)], []
        async for _, part in merge(streams):
            parts.append(part)
            await asyncio.sleep(0.05)  # the next one is on its way
            streams[0].close()
        assert len(parts) == 1

    run(ScriptedEngine([5] * 1000, chunk=1, step_seconds=0.005), use)


def test_merging_goes_on_without_a_stream_that_is_closed():
    async def use(thread):
        streams = [thread.stream([i], PARAMS) for i in range(2)]
        tokens = 0
        async for i, part in merge(streams):
            if i == 0:
                streams[0].close()
            else:
                tokens += len(part.tokens)
        assert tokens == 400

    run(ScriptedEngine([5] * 400, chunk=1), use)
