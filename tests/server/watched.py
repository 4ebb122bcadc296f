"""A scripted server under load, and a real Prometheus that scrapes it with the project's own configuration."""

import asyncio
import contextlib
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import uvicorn
import yaml
from fakes import PATIENCE_S, FakeEngine, gate_closed, make_app, until

from dspark_serve.types import BudgetReport, RowResult

CONFIGS = Path(__file__).parents[2] / "configs"
PHASE_MS = {"plan": 0.25, "propose": 1.5, "build": 0.5, "forward": 16.0, "verify": 0.5, "commit": 0.25}
NEEDS = "needs the Debian package `prometheus` (prometheus and promtool on the PATH): apt-get install prometheus"


def missing():
    """Why tests with a real Prometheus cannot run, or None."""
    return None if shutil.which("prometheus") and shutil.which("promtool") else NEEDS


class Speculating(FakeEngine):
    """Drafts five, keeps up to three, accepts by turns; says what a budget would. `reports`: all it ever reported."""

    def __init__(self, **options):
        super().__init__(burst=6, **options)
        self.reports = []

    def step(self):
        report = super().step()
        if report.num_tokens:
            skipped = {("cost", "acceptance")[self.steps % 2]: 1}
            budget = BudgetReport(15.0, 2.0, 14.0, 14.0 / max(1, len(report.rows)), skipped, 0.0625)
            report = replace(report, phase_ms=PHASE_MS, budget=budget)
            self.reports.append(report)
        return report

    def _result(self, row):
        if not row.samples:
            return RowResult()
        kept = min(row.max_drafts, 3)
        accepted = (row.start + row.request.seed) % (kept + 1)
        known = row.request.num_generated
        tokens = tuple(self.token(row.request, known + i) for i in range(accepted + 1))
        return RowResult(tokens, row.max_drafts, kept, drafter="script" if row.max_drafts else "")

    def total(self, of):
        """A sum over every row that was reported."""
        return sum(of(row) for report in self.reports for row in report.rows)


@contextlib.contextmanager
def listening(app):
    """The application on a free port of this machine, in a thread; yields its host:port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield "{}:{}".format(*listener.getsockname())
        finally:
            server.should_exit = True
            thread.join()


def eventually(read, right):
    """What `read()` gives once `right` says so of it; AssertionError with the last when that never happens."""
    end = time.monotonic() + PATIENCE_S
    while True:
        found = read()
        if right(found):
            return found
        assert time.monotonic() < end, f"still {found}"
        time.sleep(0.05)


def listening_port(pid):
    """The TCP port that a process listens on, once it does: one it was told to choose, so that nobody else took it."""

    def ports():
        connections = psutil.Process(pid).net_connections("tcp")
        return [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]

    return eventually(ports, bool)[0]


class Prometheus:
    """A process on configs/prometheus, with another target and scrapes four times a second."""

    def __init__(self, directory, target):
        shutil.copytree(CONFIGS / "prometheus", directory, dirs_exist_ok=True)
        config = directory / "prometheus.yml"
        text = config.read_text()
        for old, new in (("server:8000", target), ("15s", "250ms")):
            assert old in text
            text = text.replace(old, new)
        config.write_text(text)
        self.log = directory / "log"
        flags = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["prometheus", *flags, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=subprocess.STDOUT
            )
        self.at = None  # seconds since 1970 that queries are about; None: now
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{listening_port(self.process.pid)}", timeout=60)
        eventually(self._ready, bool)

    def _ready(self):
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/-/ready").status_code == 200
        return False

    def query(self, expression):
        """The instant vector of an expression, as (labels, value) pairs; AssertionError when it is not one."""
        at = {} if self.at is None else {"time": self.at}
        answer = self.client.get("/api/v1/query", params={"query": expression, **at}).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        assert answer["data"]["resultType"] == "vector"
        return [(one["metric"], float(one["value"][1])) for one in answer["data"]["result"]]

    def value(self, expression):
        """The only value of an expression; None when there is nothing yet."""
        found = self.query(expression)
        assert len(found) <= 1, f"{expression}: {found}"
        return found[0][1] if found else None

    def get(self, path, **params):
        return self.client.get(f"/api/v1/{path}", params=params).json()["data"]

    def close(self):
        self.client.close()
        self.process.terminate()
        self.process.wait()


def all_seen(prometheus):
    """A time at which all rules have seen what was scraped by now. Later, when rates of minutes may have passed by it,
    questions are still about that time."""
    scraped = time.time()
    groups = yaml.safe_load((CONFIGS / "prometheus" / "recording.yml").read_text())["groups"]
    for rule in [rule["record"] for group in groups for rule in group["rules"]]:
        eventually(lambda rule=rule: prometheus.value(f"min(timestamp({rule}))"), lambda at: at and at > scraped)
    return time.time()


@dataclass(frozen=True)
class Watched:
    engine: Speculating
    prometheus: Prometheus
    answers: list  # the bodies of all answers


async def generate(address, number, door, engine):
    """Answers to so many requests at once, of different length, after one that hung up.

    The engine is held back from the second step on until the server (its `door`) knows of the hang-up, and then of all
    requests.
    """
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=300) as client:
        body = {"prompt": "x" * 30, "max_tokens": 200, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                break
            await gate_closed(engine)
        await until(lambda: door.num_requests == 0)

        async def one(index):
            prompt = "the same beginning of every prompt, and then " + str(index)
            body = {"prompt": prompt, "max_tokens": 30 + 7 * index, "seed": index}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return response.json()

        answers = asyncio.gather(*map(one, range(number)))
        await until(lambda: door.num_requests == number or answers.done())
        engine.gate.set()
        return await answers


@contextlib.contextmanager
def watched(directory):
    """A server that has answered, and a Prometheus that saw it before, while and after it did."""
    # A third of the pages that eight requests at once grow to: whatever the order, some wait and some are preempted.
    engine = Speculating(pages=20, max_num_seqs=8, delay_s=0.03, hold_after=2)
    app = make_app(engine, metrics_compat="vllm")
    with listening(app) as address:
        eventually(lambda: httpx.get(f"http://{address}/ready", timeout=60).status_code, lambda status: status == 200)
        prometheus = Prometheus(directory, address)
        try:
            eventually(lambda: prometheus.value("dspark:generation_tokens_total"), lambda value: value == 0)
            answers = asyncio.run(generate(address, 12, app.state.service.engine, engine))
            eventually(lambda: engine.has_work, lambda work: not work)
            plain_s = sum(report.plain_ms for report in engine.reports) / 1e3
            metric = "dspark:step_seconds_without_speculation_total"
            eventually(lambda: prometheus.value(metric), lambda value: value and abs(value - plain_s) < 1e-6)
            prometheus.at = all_seen(prometheus)
            yield Watched(engine, prometheus, answers)
        finally:
            prometheus.close()
