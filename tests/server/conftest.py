"""An in-process client on a scripted engine; a real Prometheus; a real browser on a real small engine."""

from contextlib import asynccontextmanager

import httpx
import pytest
import structlog
import watched as watched_server
from browser import GATE, Visit, golden, needs_chromium, served
from fakes import FakeEngine, make_app, settled


@pytest.fixture(autouse=True, scope="session")
def plain_logs():
    """Rich tracebacks take seconds to draw."""
    renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, renderer])


@pytest.fixture
def serve():
    """`async with serve(engine, **options) as client`: the application, its life cycle and a client on it.

    On the way out, the engine must be whole and every page free.
    """

    @asynccontextmanager
    async def run(engine=None, check=True, **options):
        engine = engine or FakeEngine()
        app = make_app(engine, **options)
        service = app.state.service
        async with app.router.lifespan_context(app):
            await service.engine.wait_loaded()
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20) as client:
                client.app, client.service, client.engine = app, service, engine
                yield client
            if check:
                await settled(service, engine)

    return run


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """A real Prometheus, after it has watched a scripted server answer; shared, so only to be asked."""
    if reason := watched_server.missing():
        pytest.skip(reason)
    with watched_server.watched(tmp_path_factory.mktemp("prometheus")) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    """Chromium. Of a module and not of the session: what drives it holds an event loop."""
    path = needs_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def url(browser):
    """A server that verifies every draft, and tells all of speculation in every answer."""
    with served(golden(GATE, budget="full", per_request_spec_decode_metrics="detailed")) as url:
        yield url


@pytest.fixture
def visit(browser, url):
    visit = Visit(browser, url)
    yield visit
    GATE.release()  # whatever became of the test
    visit.close()
