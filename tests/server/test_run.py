"""The server process: start-up lines, signals, drain, failures; and openai's own client talking to it."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
from fakes import PATIENCE_S, FakeEngine, byte_tokenizer, make_service
from watched import eventually, listening_port

from dspark_serve.server.run import StartupError, bind, startup_lines

HERE = Path(__file__).parent
HI = [{"role": "user", "content": "hi"}]


class Server:
    """A scripted server in a process of its own; `lines` are its output until it was ready, `url` where it listens.

    `hold`: a file; see scripted_server.py.
    """

    def __init__(self, hold="", text=False, failure=None, **options):
        script = HERE / "scripted_server.py"
        command = [sys.executable, script, json.dumps({"port": 0, **options}), str(hold), str(int(text))]
        self.process = subprocess.Popen(
            [*command, failure] if failure else command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines, self.url = [], None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("curl "):
                break
            if line.startswith("ready"):
                self.url = re.search(r"http://\S+(?=/v1)", line)[0]

    def finish(self):
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server():
    with Server(text=True) as server:
        yield server
        server.process.send_signal(signal.SIGINT)
        code, errors = server.finish()
        assert code == 0
        assert "cut off" not in errors  # idle: there is nothing to wait for


@pytest.fixture
def hold(tmp_path):
    """The file that keeps a server's engine at its work."""
    path = tmp_path / "hold"
    path.touch()
    return path


def test_startup_lines_tell_what_runs_and_the_curl_line_works(server):
    text = "\n".join(server.lines)
    for expected in ["4,096 tokens", "8.0 requests at the full length of 512", "script, up to 1 draft", "bitwise"]:
        assert expected in text
    answer = subprocess.run(
        ["bash", "-c", server.lines[-1] + " -s"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "Hello" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_openai_client(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.create(model="fake", messages=HI, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == "Hello"
    assert answer._request_id
    with client.chat.completions.create(
        model="fake", messages=HI, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, wörl"
    assert chunks[-1].usage.completion_tokens == 12
    text = client.completions.create(model="fake", prompt="x", max_tokens=3, temperature=0, extra_body={"top_k": 5})
    assert text.choices[0].text == "Hel"
    assert client.models.list().data[0].id == "fake"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="fake", messages=HI, temperature=1000)
    assert caught.value.param == "temperature"


async def test_openai_async_client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def stream(n):
            text = ""
            async for chunk in await client.chat.completions.create(
                model="fake", messages=HI, max_tokens=n, temperature=0, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
            return text

        texts = await asyncio.gather(*(stream(n) for n in range(1, 7)))
        assert texts == ["H", "He", "Hel", "Hell", "Hello", "Hello,"]


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_gives_the_pages_back(hold, stream):
    """As many as are asked for at once are running when the connection is closed, and it is noticed while they are."""
    with Server(hold) as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        body = json.dumps({"prompt": [1], "max_tokens": 500, "n": 4, "stream": stream}).encode()
        with socket.create_connection(client.base_url.netloc.decode().split(":")) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            eventually(lambda: metric(client, "num_requests_running"), lambda number: number == 4)
        eventually(lambda: metric(client, 'request_success_total{finished_reason="abort"'), lambda number: number == 4)
        generated = metric(client, "generation_tokens_total")
        hold.unlink()
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            eventually(lambda name=name: metric(client, name), lambda number: number == 0)
        assert metric(client, "generation_tokens_total") == generated


def metric(client, name):
    """The one sample whose name, and labels as far as they are given, are these."""
    head, _, labels = name.partition("{")
    pattern = rf"^dspark:{head}{{(?=.*{re.escape(labels)}).*}} (.*)$"
    return float(re.search(pattern, client.get("/metrics").text, re.MULTILINE)[1])


def test_large_body_is_answered_before_it_is_read(server):
    response = httpx.post(f"{server.url}/v1/completions", content=b" " * 10_000_000, timeout=PATIENCE_S)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "content_too_large"


def drains(client):
    """Wait until the server has taken a signal."""
    eventually(lambda: client.get("/ready").status_code, lambda status: status == 503)


def test_sigterm_drains(hold):
    with Server(hold) as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        result = {}

        def generate():
            body = {"prompt": [1], "max_tokens": 200, "temperature": 0}
            result["answer"] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S)

        generating = threading.Thread(target=generate)
        generating.start()
        eventually(lambda: metric(client, "num_requests_running"), lambda number: number == 1)
        server.process.send_signal(signal.SIGTERM)
        drains(client)
        assert client.get("/health").status_code == 200
        refused = client.post("/v1/completions", json={"prompt": [1]})
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        hold.unlink()
        generating.join()
        assert result["answer"].json()["usage"]["completion_tokens"] == 200
        assert server.finish()[0] == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_drain_ends_at_its_timeout_or_at_a_second_signal(hold, signals):
    with (
        Server(hold, shutdown_timeout=0.3 if signals == 1 else 600) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        body = {"prompt": [1], "max_tokens": 500, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            if signals == 2:
                drains(client)  # two signals that are pending at once are one
                server.process.send_signal(signal.SIGTERM)
            else:
                rest = "\n".join(lines)
                assert "shutting down" in rest
                assert rest.rstrip().endswith("[DONE]")
            hold.unlink()  # either way the server waits for the step that it is in
            code, _ = server.finish()
        assert code == (0 if signals == 1 else 1)


def test_loading_failure_is_one_sentence():
    with Server(failure="the model is made of cheese") as server:
        code, errors = server.finish()
    assert (code, errors) == (1, "dspark-serve: the model is made of cheese\n")


def test_a_signal_while_loading_ends_it_quietly():
    command = [sys.executable, HERE / "scripted_server.py", json.dumps({"port": 0}), "", "0", "slow"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        port = listening_port(process.pid)
        eventually(lambda: answers(f"http://127.0.0.1:{port}/health"), bool)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        assert "Traceback" not in errors
        assert "stopped while" not in errors


def answers(url):
    try:
        return httpx.get(url, timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False


def test_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} on 127.0.0.1 is in use; choose another with --port"):
            bind("127.0.0.1", port)
    with pytest.raises(StartupError, match="cannot listen on"):
        bind("no.such.host", 0)


@pytest.mark.parametrize("tokenizer", [None, "byte"])
def test_lines_of_a_server_with_a_key(tokenizer):
    service = make_service(tokenizer=tokenizer, api_key="sesame")
    service.tokenizer = byte_tokenizer() if tokenizer else None
    lines = startup_lines(FakeEngine().info, service, "0.0.0.0", 80)
    assert "sesame" not in "\n".join(lines)
    assert "-H 'Authorization: Bearer '$KEY" in lines[-1]
    assert ("/v1/chat/completions" if tokenizer else "/v1/completions") in lines[-1]
    assert lines[-2].endswith("http://127.0.0.1:80/v1")
    assert lines[-3] == "live page    http://127.0.0.1:80/"
    without = make_service(tokenizer=tokenizer, ui=False)
    assert "live page" not in "\n".join(startup_lines(FakeEngine().info, without, "0.0.0.0", 80))
