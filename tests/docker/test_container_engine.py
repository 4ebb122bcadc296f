"""The CPU image and compose.yaml by a container engine, with the lines that README.md gives for docker.

Minutes and gigabytes: only `make test-docker` asks for it. The base image is debootstrap's; Prometheus is Debian's in
an image like its own, and in Grafana's place something answers that reads what is provisioned for it (stand_ins/).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import container_engine as engines
import httpx
import pytest
import yaml
from container_engine import Engine
from dockerfile import STAGES
from served import UID, check_answers, check_first_lines, check_status, until, wait_until_ready

from tests.dashboard import CONFIGS, DASHBOARD, PANELS, filled
from tests.documented import COMMANDS

BUILD, RUN = (
    next(line for line in COMMANDS if re.match(rf"docker {word} .*\bcpu\b", line)) for word in ("build", "run")
)
(COMPOSE,) = (line for line in COMMANDS if line.startswith("docker compose "))
SERVICES = yaml.safe_load((CONFIGS / "compose.yaml").read_text(encoding="utf-8"))["services"]
PORTS = {name: int(service["ports"][0].split(":")[1]) for name, service in SERVICES.items()}
USERS = {"server": UID, "prometheus": 65534, "grafana": 472}
pytestmark = [
    pytest.mark.skipif(
        "REPLAY" not in os.environ, reason="takes minutes and gigabytes: `make test-docker` asks for it"
    ),
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    if reason := engines.missing():
        pytest.skip(reason)
    for port in PORTS.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"README's lines publish port {port}, and something else listens there: stop it")
    directory = Path(tempfile.mkdtemp(prefix="dspark-engine-"))
    engine = Engine(directory, os.environ.get("TORCH_INDEX", ""))
    try:
        engine.set_up()
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def image(engine: Engine) -> dict[str, Any]:
    """The built image's settings."""
    engine.run(*engine.command(BUILD), "--build-arg", "TORCH_INDEX")
    settings: dict[str, Any] = engine.inspect("dspark-serve:cpu")
    return {**settings["Config"], "Healthcheck": settings["Healthcheck"]}


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes]  # what was typed; it lasts as long as the container
    container: str
    client: httpx.Client
    log: Path


@contextlib.contextmanager
def running(engine: Engine, name: str) -> Iterator[Started]:
    """README's line while its server is ready; its output is in a file of this name."""
    log = engine.directory / name
    with log.open("wb") as output, httpx.Client(base_url=f"http://127.0.0.1:{PORTS['server']}", timeout=600) as client:
        process = subprocess.Popen(engine.command(RUN), env=engine.environment, stdout=output, stderr=output)
        try:
            wait_until_ready(client, lambda: None if process.poll() is None else log.read_text())
            yield Started(process, engine.run("podman", "ps", "--quiet"), client, log)
        finally:
            engine.run("podman", "rm", "--all", "--force", "--time=0")
            process.wait()


@pytest.fixture(scope="module")
def started(engine: Engine, image: dict[str, Any]) -> Iterator[Started]:
    with running(engine, "first.log") as found:
        yield found


def refused(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=60).close()
    except ConnectionRefusedError:
        return True
    return False


def test_the_image_is_what_the_file_says(image: dict[str, Any]) -> None:
    stage = STAGES["cpu"]
    assert image["User"] == stage.all("USER")[0]
    assert image["Healthcheck"]["Test"] == ["CMD", *stage.health()]
    assert list(image["Volumes"]) == stage.all("VOLUME")
    assert [image["Entrypoint"], image["Cmd"]] == [json.loads(stage.all(name)[0]) for name in ("ENTRYPOINT", "CMD")]


def test_it_runs_as_promised(engine: Engine, started: Started) -> None:
    check_first_lines(started.log.read_text())
    check_status(engine.execute(started.container, "cat", "/proc/1/status").stdout)
    assert engine.execute(started.container, "touch", "/etc/dspark-serve/mine").returncode != 0


def test_it_answers_from_this_machine_only(engine: Engine, started: Started) -> None:
    check_answers(started.client)
    assert not refused("127.0.0.1", PORTS["server"])
    assert refused(engine.gateway("podman"), PORTS["server"])


def test_its_health_check_says_so(engine: Engine, started: Started) -> None:
    engine.run("podman", "healthcheck", "run", started.container)
    assert engine.inspect(started.container)["State"]["Health"]["Status"] == "healthy"


def test_it_stops_when_told_and_finds_its_volume_again(engine: Engine, started: Started) -> None:
    def kept() -> dict[str, str]:  # by their inodes: what is only read is touched, what is written anew is another file
        listed = engine.execute("--latest", "find", "/cache", "-type", "f", "-user", "dspark", "-printf", "%p %i\\n")
        return dict(line.split() for line in listed.stdout.splitlines())

    text, before = check_answers(started.client), kept()
    assert {path.split("/")[2] for path in before} >= {"models", "profiles", "checks"}
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(timeout=600) == 0, started.log.read_text()
    with running(engine, "second.log") as again:
        check_first_lines(again.log.read_text())
        assert check_answers(again.client) == text
        assert before.items() <= kept().items()


@pytest.fixture(scope="module")
def composed(engine: Engine, image: dict[str, Any]) -> Iterator[dict[str, httpx.Client]]:
    """The services of compose.yaml, by name; each has answered that it is ready."""
    for name in ("prometheus", "grafana"):
        engine.stand_in(name, SERVICES[name]["image"])
    line = engine.command(COMPOSE)
    try:
        engine.run(*line, "--detach")
        with contextlib.ExitStack() as stack:
            clients = {
                name: stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600))
                for name, port in PORTS.items()
            }
            for name, ready in (("server", "/ready"), ("prometheus", "/-/ready"), ("grafana", "/api/health")):
                wait_until_ready(clients[name], functools.partial(ended, engine, name), ready)
            yield clients
    finally:
        engine.run(*line[: line.index("up")], "down", "--volumes")


def container(engine: Engine, service: str) -> str:
    label = f"label=com.docker.compose.service={service}"
    return engine.run("podman", "ps", "--all", "--quiet", f"--filter={label}")


def ended(engine: Engine, service: str) -> str | None:
    """A service's log, if it runs no more."""
    name = container(engine, service)
    if engine.inspect(name)["State"]["Running"]:
        return None
    return f"{service}: {engine.run('podman', 'logs', name)}"


def test_services_run_as_nobody_in_particular(engine: Engine, composed: dict[str, httpx.Client]) -> None:
    for service, user in USERS.items():
        assert engine.execute(container(engine, service), "id", "-u").stdout == f"{user}\n"


def test_services_keep_what_is_theirs_and_change_nothing_else(
    engine: Engine, composed: dict[str, httpx.Client]
) -> None:
    for service, kept in (("server", "profiles"), ("prometheus", "wal"), ("grafana", "grafana.db")):
        for volume in SERVICES[service]["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                done = engine.execute(container(engine, service), "touch", f"{target}/mine")
                assert "Read-only file system" in done.stderr
            else:
                assert kept in engine.execute(container(engine, service), "ls", target).stdout.split()


def test_services_answer_this_machine_only(engine: Engine, composed: dict[str, httpx.Client]) -> None:
    (network,) = engine.inspect(container(engine, "server"))["NetworkSettings"]["Networks"]
    for port in PORTS.values():
        assert not refused("127.0.0.1", port)
        assert refused(engine.gateway(network), port)


def test_prometheus_finds_the_server_and_its_rules(composed: dict[str, httpx.Client]) -> None:
    (target,) = until(lambda: asked(composed["prometheus"], "targets")["activeTargets"], scraped)
    assert target["scrapeUrl"] == "http://server:8000/metrics"
    groups = asked(composed["prometheus"], "rules")["groups"]
    files = [yaml.safe_load((CONFIGS / "prometheus" / name).read_text()) for name in ("recording.yml", "alerts.yml")]
    assert {group["name"] for group in groups} == {group["name"] for file in files for group in file["groups"]}
    rules = until(
        lambda: [rule for group in asked(composed["prometheus"], "rules")["groups"] for rule in group["rules"]],
        lambda rules: all(rule["health"] != "unknown" for rule in rules),
    )
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_every_panel_has_data_by_the_source_that_grafana_is_given(composed: dict[str, httpx.Client]) -> None:
    grafana = composed["grafana"]
    assert grafana.get("/api/dashboards/home").json()["dashboard"]["title"] == DASHBOARD["title"]
    panels = grafana.get(f"/api/dashboards/uid/{DASHBOARD['uid']}").json()["dashboard"]["panels"]
    queries = [target for panel in panels if panel["type"] != "row" for target in panel["targets"]]
    assert len(queries) == sum(len(panel["targets"]) for panel in PANELS) > 0
    until(lambda: asked(composed["prometheus"], "targets")["activeTargets"], scraped)  # from zero on, rates are known
    check_answers(composed["server"])

    def without_data() -> list[str]:
        return [
            query["expr"]
            for query in queries
            if not asked(grafana, f"query?{urlencode({'query': filled(query['expr'])})}", query["datasource"]["uid"])[
                "result"
            ]
        ]

    until(without_data, lambda expressions: not expressions)


def asked(client: httpx.Client, path: str, source: str = "") -> Any:
    """What Prometheus says, or Grafana's data source of that uid."""
    proxy = f"/api/datasources/proxy/uid/{source}" if source else ""
    answer = client.get(f"{proxy}/api/v1/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def scraped(targets: list[dict[str, Any]]) -> bool:
    return bool(targets) and all(target["health"] == "up" for target in targets)
