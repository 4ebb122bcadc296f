"""Clients that hang up: queued, mid-decode, streaming or not; their requests end and the pages come back."""

import asyncio
import json

import pytest
from fakes import PATIENCE_S, FakeEngine, gate_closed, make_app, settled, until


class Client:
    """One raw ASGI request whose `hang_up` the application sees as a disconnect."""

    def __init__(self, app, body):
        self.app = app
        self.sent = []
        self.news = asyncio.Event()
        self._inbox = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        headers = [(b"content-type", b"application/json")]
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
            "headers": headers, "server": ("test", 80), "client": ("test", 1), "state": {},
        }  # fmt: skip
        self.task = asyncio.create_task(app(self._scope, self._receive, self._send))

    async def _receive(self):
        message = await self._inbox.get()
        if message["type"] == "http.disconnect":  # from then on whoever asks is told, as by uvicorn
            self._inbox.put_nowait(message)
        return message

    async def _send(self, message):
        self.sent.append(message)
        self.news.set()

    def hang_up(self):
        self._inbox.put_nowait({"type": "http.disconnect"})


@pytest.mark.parametrize("stream", [False, True])
async def test_mid_decode(stream):
    engine = FakeEngine(hold_after=5)
    app = make_app(engine)
    service = app.state.service
    async with app.router.lifespan_context(app):
        await service.engine.wait_loaded()
        client = Client(app, {"prompt": "x", "max_tokens": 500, "stream": stream})
        await gate_closed(engine)
        client.hang_up()
        await asyncio.wait_for(client.task, PATIENCE_S)
        engine.gate.set()
        await settled(service, engine)
        assert engine.steps <= 6, "one step may have begun before the cancellation; it would take 500 to the end"
        assert b'{finished_reason="abort",model_name="fake"} 1.0' in service.metrics.render()


@pytest.mark.parametrize("stream", [False, True])
async def test_in_the_queue(stream):
    engine = FakeEngine(max_num_seqs=1, hold_after=1)
    app = make_app(engine)
    service = app.state.service
    async with app.router.lifespan_context(app):
        await service.engine.wait_loaded()
        first = Client(app, {"prompt": "x", "max_tokens": 500})
        await gate_closed(engine)
        queued = Client(app, {"prompt": "x", "max_tokens": 500, "stream": stream, "n": 3})
        await until(lambda: service.engine.num_requests == 4)
        engine.hold_after = 3  # between the second step and the third the engine takes them
        engine.gate.set()
        await gate_closed(engine)
        assert engine.stats().num_waiting == 3
        queued.hang_up()
        await asyncio.wait_for(queued.task, PATIENCE_S)
        assert service.engine.num_requests == 1
        first.hang_up()
        await asyncio.wait_for(first.task, PATIENCE_S)
        engine.gate.set()
        await settled(service, engine)
        assert engine.steps <= 4


async def test_before_the_engine_has_answered():
    engine = FakeEngine()
    app = make_app(engine)
    service = app.state.service
    async with app.router.lifespan_context(app):
        await service.engine.wait_loaded()
        engine.gate.clear()
        held = Client(app, {"prompt": "x", "max_tokens": 3})
        await until(lambda: engine.has_work)
        late = Client(app, {"prompt": "x", "max_tokens": 500, "stream": True})
        await until(lambda: service.engine.num_requests == 2)
        late.hang_up()
        await asyncio.wait_for(late.task, PATIENCE_S)
        engine.gate.set()
        await asyncio.wait_for(held.task, PATIENCE_S)
        await settled(service, engine)
        assert engine.steps == 3, "those of the first request: the late one came and went between two steps"


async def test_a_stream_whose_task_is_cancelled():
    """As uvicorn does to what is left when its patience ends."""
    engine = FakeEngine(hold_after=5)
    app = make_app(engine)
    service = app.state.service
    async with app.router.lifespan_context(app):
        await service.engine.wait_loaded()
        client = Client(app, {"prompt": "x", "max_tokens": 500, "stream": True})
        await gate_closed(engine)
        await asyncio.wait_for(client.news.wait(), PATIENCE_S)
        client.task.cancel()
        await asyncio.gather(client.task, return_exceptions=True)
        engine.gate.set()
        await settled(service, engine)
        assert engine.steps <= 6, "one step may have begun before the cancellation; it would take 500 to the end"
