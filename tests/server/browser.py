"""A real server on a small real engine, and Chromium looking at its page."""

import math
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from tiny_model import byte_tokenizer

from dspark_serve.config import load_config
from dspark_serve.engine.build import build_engine
from dspark_serve.server.app import create_app
from dspark_serve.server.service import Service
from dspark_serve.text import Tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPT = "one two three one two three one two"  # drafts of both kinds are accepted
PATIENCE_MS = 120_000  # nothing is decided by time; this is when to give up


def needs_chromium():
    """Path of the browser; skips the tests where it, or what drives it, is absent."""
    pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return path


class Gate:
    """Lets an engine's steps through: all of them, or after `hold()` as many as `allow()` says, until `release()`."""

    def __init__(self):
        self._changed = threading.Condition()
        self._allowed = math.inf

    def hold(self):
        self._set(lambda _: 0)

    def allow(self, steps):
        self._set(lambda allowed: allowed + steps)

    def release(self):
        self._set(lambda _: math.inf)

    def _set(self, change):
        with self._changed:
            self._allowed = change(self._allowed)
            self._changed.notify()

    def __call__(self, step):
        """The step, behind this gate."""

        def gated():
            with self._changed:
                self._changed.wait_for(lambda: self._allowed > 0)
                self._allowed -= 1
            return step()

        return gated


GATE = Gate()  # before the steps of the server that most tests visit


def golden(gate=None, **options):
    """A trained byte-level target with its head beside prompt lookup: drafts of both are accepted."""
    small = {"kv_cache_gib": 0.01, "max_num_seqs": 4, "threads": 1, "head_self_test": False}
    files = {"model": str(GOLDENS / "target"), "head": str(GOLDENS / "dspark_vanilla"), "method": "portfolio"}

    def load(config):
        engine = build_engine(config)
        engine.step = engine.step if gate is None else gate(engine.step)
        return engine, Tokenizer(byte_tokenizer())

    return Service(load_config({**files, **small, "served_model_name": "golden", **options}), load)


@contextmanager
def served(service):
    """The service behind uvicorn on a port of its own; yields its URL."""
    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            await service.engine.wait_loaded()
            ready.set()

    server = Server(uvicorn.Config(create_app(service), port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(120), "the server did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


class Visit:
    """A tab on the page of one server, and what it complained of and asked for."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE_MS)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def _hear(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def close(self, *allowed):
        """Nothing may have gone elsewhere, and no complaint may have come but of what was `allowed`."""
        self.context.close()
        assert [url for url in self.requests if not url.startswith(f"{self.url}/")] == []
        assert [text for text in self.complaints if not any(part in text for part in allowed)] == []

    # ---- what a user does

    def ask(self, prompt, mode="Side by side", keys="Enter", **settings):
        """Fill in the form and send it; does not wait."""
        page = self.page
        page.get_by_role("radio", name=mode, exact=True).check(force=True)
        for label, value in {"Temperature": 0, "Max tokens": 60, **settings}.items():
            page.get_by_label(label).fill(str(value))
        page.get_by_label("Message").fill(prompt)
        page.get_by_label("Message").press(keys)

    def finish(self):
        """Wait until no answer is being written."""
        self.page.get_by_role("button", name="Send").wait_for()

    def panes(self):
        return self.page.locator(".turn:last-child .pane")

    def tokens(self, pane):
        """(text, source, position, drafter) of the tokens of a pane of the last turn."""
        return pane.locator(".t").evaluate_all(
            "all => all.map(t => [t.textContent, t.dataset.source, t.dataset.position, t.dataset.drafter])"
        )

    def shot(self, name, **options):
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png", **options)
