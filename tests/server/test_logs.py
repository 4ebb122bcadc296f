"""What the server logs, in which shape, and what it does not log."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys

import httpx
import pytest
import structlog
from fakes import PATIENCE_S, FakeEngine, until
from test_run import Server

from dspark_serve.server.run import log_stats

SECRET = "the rain in Spain"


def talk():
    """Requests to a server process that logs where nobody looks on: its answers by name, and its lines as JSON."""
    with Server(text=True, log_level="debug") as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
            body = {"prompt": SECRET, "max_tokens": 6, "temperature": 0}
            answers = {
                "whole": client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"}),
                "chat": client.post(
                    "/v1/chat/completions",
                    json={"messages": [{"role": "user", "content": SECRET}], "stream": True, "max_tokens": 4},
                    headers={"X-Request-Id": "mine-2"},
                ),
                "refused": client.post("/v1/completions", json={**body, "temperature": SECRET}),
                "strange": client.post("/v1/completions", json={**body, "max_tokens": 1, "flavour": SECRET}),
                "health": client.get("/health"),
            }
        server.process.send_signal(signal.SIGTERM)
        code, errors = server.finish()
    assert code == 0
    return answers, [json.loads(line) for line in errors.splitlines()]


def test_lines_are_json_with_the_request_id_and_without_text():
    answers, lines = talk()
    assert SECRET not in json.dumps(lines)
    assert all({"event", "level", "timestamp"} <= set(line) for line in lines)
    generated = {line["request_id"]: line for line in lines if line["event"] == "generated"}
    usage = answers["whole"].json()["usage"]
    report = answers["whole"].json()["metrics"]["speculative_decoding"]
    line = generated["mine-1"]
    assert (line["prompt_tokens"], line["tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"]) == (17, 6)
    assert (line["drafted"], line["accepted"]) == (report["num_draft_tokens"], report["num_accepted_draft_tokens"])
    assert line["finish_reasons"] == ["length"]
    assert line["seconds"] > 0
    assert generated["mine-2"]["tokens"] == 4
    assert len(generated) == 3
    answered = {line["request_id"]: line for line in lines if line["event"] == "answered"}
    by_name = {name: answered[answer.headers["x-request-id"]] for name, answer in answers.items()}
    assert {name: line["status"] for name, line in by_name.items()} == {
        name: answer.status_code for name, answer in answers.items()
    }
    assert {name for name, line in by_name.items() if line["level"] == "info"} == {"refused"}
    (warned,) = [line for line in lines if line["event"] == "unknown request field ignored"]
    assert warned["request_id"] == answers["strange"].headers["x-request-id"]


async def test_prompts_are_logged_for_who_asks(serve):
    for asked in (True, False):
        async with serve(log_prompts=asked) as client:
            with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
                body = {"prompt": [SECRET, "again"], "max_tokens": 2}
                await client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
        prompts = [(line["request_id"], line["prompts"]) for line in lines if line["event"] == "prompts"]
        assert prompts == ([("mine", [SECRET, "again"])] if asked else [])
        assert (SECRET in str(lines)) == asked


SAY = """
import logging, sys, structlog
from dspark_serve.server.logs import configure_logging
configure_logging("info", sys.argv[1])
structlog.get_logger().info("ours", number=1)
structlog.get_logger().debug("too much")
try:
    prompt = "secret text"
    1 / 0
except ZeroDivisionError:
    structlog.get_logger().exception("ours failed")
logging.getLogger("a.library").warning("theirs %d", 2)
logging.getLogger("a.library").info("too much")
"""


def said(log_format, terminal):
    """What a process writes to stderr, which is a terminal or a pipe."""
    command = [sys.executable, "-c", SAY, log_format]
    if not terminal:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr
    reader, writer = pty.openpty()
    try:
        subprocess.run(command, stderr=writer, timeout=60, check=True)
        os.close(writer)
        text = b""
        while True:
            try:
                part = os.read(reader, 65536)
            except OSError:  # how a terminal without writers ends
                break
            if not part:
                break
            text += part
        return text.decode()
    finally:
        os.close(reader)


@pytest.mark.parametrize(("log_format", "terminal", "for_people"), [
    ("auto", False, False), ("auto", True, True), ("json", True, False), ("console", False, True),
])  # fmt: skip
def test_terminals_get_lines_for_people(log_format, terminal, for_people):
    text = said(log_format, terminal)
    assert "too much" not in text
    assert "secret text" not in text.replace('prompt = "secret text"', "")
    assert ("\x1b[" in text) == (for_people and terminal)
    if for_people:
        assert "Traceback (most recent call last)" in text
        assert "theirs 2" in text
        with pytest.raises(json.JSONDecodeError):
            json.loads(text.splitlines()[0])
    else:
        first, failed, theirs = map(json.loads, text.splitlines())
        assert (first["event"], first["number"], first["level"]) == ("ours", 1, "info")
        assert "ZeroDivisionError" in failed["exception"]
        assert (theirs["event"], theirs["logger"], theirs["level"]) == ("theirs 2", "a.library", "warning")


async def test_a_line_of_figures_while_busy_and_none_while_idle(serve):
    async with serve(FakeEngine(burst=3, delay_s=0.01)) as client:
        with structlog.testing.capture_logs() as lines:
            chore = asyncio.create_task(log_stats(client.service, every_s=0.01))
            await asyncio.sleep(0.1)
            # Another server of this process may be asked for its metrics meanwhile.
            assert [line for line in lines if line["event"] == "serving"] == []
            answer = await client.post("/v1/completions", json={"prompt": "x" * 40, "max_tokens": 90})
            assert answer.status_code == 200
            # What follows the prompt's own token may still be to be told of, all of it.
            await until(lambda: any(line["event"] == "serving" and line["draft_tokens_per_s"] for line in lines))
            chore.cancel()
    busy = [line for line in lines if line["event"] == "serving"]
    assert all(line["running"] + line["waiting"] <= 1 and 0 <= line["kv_cache_usage"] <= 1 for line in busy)
    # This engine accepts whatever it drafts; a line about prompt tokens alone has no rate.
    assert {line["acceptance_rate"] for line in busy} <= {1.0, None}
    assert any(line["acceptance_rate"] == 1.0 and line["draft_tokens_per_s"] > 0 for line in busy)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_is_logged_with_the_id_its_client_got(serve, stream):
    engine = FakeEngine()
    async with serve(engine, check=False) as client:
        engine.fail_at = engine.steps + 2
        body = {"prompt": SECRET, "max_tokens": 50, "stream": stream}
        with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
            answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == (200 if stream else 500)
        request_id = answer.headers["x-request-id"]
        assert request_id in answer.text
        (generated,) = [line for line in lines if line["event"] == "generated"]
        assert (generated["request_id"], generated["finish_reasons"]) == (request_id, ["abort"])
        assert any(line["event"] == "the engine failed" for line in lines)
        failed = [line["request_id"] for line in lines if line["event"] == "stream failed"]
        assert failed == ([request_id] if stream else [])
