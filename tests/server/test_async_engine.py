"""The door to the engine: order, cancellation, failure, drain. A scripted engine in the real thread."""

import asyncio
import threading

import pytest
from fakes import PATIENCE_S, FakeEngine, gate_closed, settled, until

from dspark_serve.server.async_engine import AsyncEngine, RequestFailed
from dspark_serve.types import EngineBusy, EngineDead, InvalidRequest, Request, SamplingParams


def request(name="r", prompt=(1, 2, 3), **params):
    return Request(name, tuple(prompt), SamplingParams(**{"max_tokens": 5, "temperature": 0.0, **params}), seed=0)


class Recorder:
    def __init__(self):
        self.loaded, self.submitted, self.rejected, self.ended, self.steps = [], [], [], [], []

    def on_loaded(self, info, stats):
        self.loaded.append(info)

    def on_submit(self, request):
        self.submitted.append(request.request_id)

    def on_reject(self, request_id):
        self.rejected.append(request_id)

    def on_end(self, request_id, reason):
        self.ended.append((request_id, reason))

    def on_step(self, report, stats, started_s):
        self.steps.append((report, stats))


class Running:
    """`async with Running(engine) as door`; nothing may be left on the way out."""

    def __init__(self, engine=None, whole=True):
        self.engine, self.whole = engine or FakeEngine(), whole
        self.recorder = Recorder()
        self.door = AsyncEngine(lambda: self.engine, self.recorder)

    async def __aenter__(self):
        self.door.start()
        await self.door.wait_loaded()
        return self.door

    async def __aexit__(self, *error):
        if self.whole and not any(error):
            await settled(type("Service", (), {"engine": self.door}), self.engine)
        await self.door.stop()
        assert not self.door.thread_alive


async def tokens_of(stream):
    return [token async for delta in stream for token in delta.token_ids]


async def test_tokens_come_in_order_and_the_stream_ends():
    async with Running(FakeEngine(burst=2)) as door:
        stream = await door.submit(request(max_tokens=7))
        assert bytes(await tokens_of(stream)) == b"Hello, "
        assert [delta async for delta in stream] == []
        stream.close()


async def test_several_requests_share_a_stream():
    async with Running() as door:
        stream = await door.submit(request("a", max_tokens=3), request("b", max_tokens=5))
        got = {"a": [], "b": []}
        async for delta in stream:
            got[delta.request_id] += delta.token_ids
        assert bytes(got["a"]) == b"Hel"
        assert bytes(got["b"]) == b"Hello"


async def test_submission_is_all_or_none():
    running = Running()
    async with running as door:
        with pytest.raises(InvalidRequest, match="do not fit"):
            await door.submit(request("a"), request("b", max_tokens=100_000))
        assert door.num_requests == 0
        assert running.recorder.rejected == ["a", "b"]
        assert await tokens_of(await door.submit(request("a")))  # the id is free again


async def test_full_queue_is_busy():
    engine = FakeEngine(max_queue=2, max_num_seqs=1)
    async with Running(engine) as door:
        engine.gate.clear()
        first = await door.submit(request("a"))  # the thread goes on to its first step, and is held there
        submissions = [asyncio.create_task(door.submit(request(str(i)))) for i in range(4)]
        await until(lambda: door.num_requests == 5)
        engine.gate.set()
        results = await asyncio.gather(*submissions, return_exceptions=True)
        busy = [result for result in results if isinstance(result, EngineBusy)]
        assert len(busy) == 2
        for stream in [first, *(result for result in results if result not in busy)]:
            await tokens_of(stream)


async def test_cancel_running_and_queued():
    engine = FakeEngine(max_num_seqs=1, hold_after=2)
    running = Running(engine)
    async with running as door:
        engine.gate.clear()
        first = await door.submit(request("first", max_tokens=300))
        submission = asyncio.create_task(door.submit(request("queued", max_tokens=300)))
        await until(lambda: door.num_requests == 2)
        engine.gate.set()
        queued = await submission
        await gate_closed(engine)
        await anext(first)
        queued.close()
        first.close()
        first.close()
        engine.gate.set()
    assert running.recorder.ended == [("queued", "abort"), ("first", "abort")]


async def test_cancelled_submission_leaves_nothing():
    engine = FakeEngine()
    async with Running(engine) as door:
        engine.gate.clear()
        blocker = await door.submit(request("blocker"))
        late = asyncio.create_task(door.submit(request("late", max_tokens=400)))
        await until(lambda: door.num_requests == 2)
        late.cancel()
        engine.gate.set()
        assert len(await tokens_of(blocker)) == 5
        with pytest.raises(asyncio.CancelledError):
            await late


async def test_end_reports_the_reason_and_drops_later_tokens():
    engine = FakeEngine(hold_after=10)
    running = Running(engine)
    async with running as door:
        stream = await door.submit(request(max_tokens=400))
        await anext(stream)
        await gate_closed(engine)  # nine tokens more
        stream.end("r", "stop")
        assert await tokens_of(stream) == []
        engine.gate.set()
    assert running.recorder.ended == [("r", "stop")]


async def test_one_wake_up_per_step():
    engine = FakeEngine(burst=4)
    running = Running(engine)
    async with running as door:
        engine.gate.clear()  # no step before all of them are submitted
        submissions = [asyncio.create_task(door.submit(request(str(i), max_tokens=40))) for i in range(8)]
        await until(lambda: door.num_requests == 8)
        engine.gate.set()
        for submission in submissions:
            assert len(await tokens_of(await submission)) == 40
        assert len(running.recorder.steps) == engine.steps


async def test_idle_engine_sleeps():
    class Asked(FakeEngine):
        """Counts how often it is asked for work, which a door does that looks again and again."""

        asked = 0

        @property
        def has_work(self):
            self.asked += 1
            return super().has_work

    async with Running(Asked()) as door:
        await tokens_of(await door.submit(request()))
        before = await door.call(lambda engine: engine.asked)
        await asyncio.sleep(0.2)
        after = await door.call(lambda engine: engine.asked)
        assert after - before <= 2  # after the first of these calls, on the way to sleep


async def test_engine_works_in_its_own_thread_while_the_loop_runs():
    engine = FakeEngine()
    async with Running(engine) as door:
        thread = await door.call(lambda engine: threading.current_thread())
        assert thread is not threading.current_thread()
        engine.gate.clear()
        stream = await door.submit(request(max_tokens=4))
        consumer = asyncio.create_task(tokens_of(stream))
        for _ in range(100):  # while the engine is in its first step
            await asyncio.sleep(0)
        assert not consumer.done()
        engine.gate.set()
        assert len(await consumer) == 4


async def test_a_failing_step_fails_its_requests_and_is_remembered():
    engine = FakeEngine()
    engine.fail_at = 2  # set before anything runs: a running engine may step past a number chosen from its own
    running = Running(engine, whole=False)
    async with running as door:
        stream = await door.submit(request(max_tokens=400))
        with pytest.raises(RequestFailed):
            await tokens_of(stream)
        stream.close()
        assert door.state == "dead"
        assert "scripted" in str(door.failure)
        with pytest.raises(EngineDead):
            await door.submit(request("next"))
        with pytest.raises(EngineDead):
            await door.call(lambda engine: None)
    assert running.recorder.ended == [("r", "error")]


async def test_a_function_that_raises_harms_nothing():
    async with Running() as door:
        with pytest.raises(ZeroDivisionError):
            await door.call(lambda engine: 1 // 0)
        assert await tokens_of(await door.submit(request()))


async def test_loading_failure_is_reported():
    def load():
        raise ValueError("no such model")

    door = AsyncEngine(load)
    door.start()
    assert door.state == "loading"
    with pytest.raises(EngineBusy, match="loading"):
        await door.submit(request())
    with pytest.raises(ValueError, match="no such model"):
        await door.wait_loaded()
    assert door.state == "dead"
    await door.stop()


async def test_stop_while_loading_returns_at_once():
    release = threading.Event()
    door = AsyncEngine(lambda: release.wait() and FakeEngine())
    door.start()
    await asyncio.wait_for(door.stop(), PATIENCE_S)
    assert door.thread_alive
    release.set()


async def test_drain_lets_requests_finish_and_takes_no_more():
    engine = FakeEngine()
    async with Running(engine) as door:
        engine.gate.clear()
        stream = await door.submit(request(max_tokens=20))
        consumer = asyncio.create_task(tokens_of(stream))
        drain = asyncio.create_task(door.drain(PATIENCE_S))
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="shutting down"):
            await door.submit(request("late"))
        engine.gate.set()
        assert await drain
        assert len(await consumer) == 20


async def test_drain_cuts_off_after_its_time():
    engine = FakeEngine()
    async with Running(engine) as door:
        engine.gate.clear()
        stream = await door.submit(request(max_tokens=500))
        assert not await door.drain(0.05)
        with pytest.raises(EngineBusy, match="shutting down"):
            await tokens_of(stream)
        engine.gate.set()


async def test_start_again_after_stop():
    door = AsyncEngine(FakeEngine)
    for _ in range(2):
        door.start()
        await door.wait_loaded()
        assert len(await tokens_of(await door.submit(request()))) == 5
        await door.stop()
        with pytest.raises(EngineBusy):
            await door.submit(request())
