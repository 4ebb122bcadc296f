"""What can be said of the Dockerfile without an engine: stages, user, health check, environment, what is copied."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from dockerfile import ROOT, STAGES, allowed

from dspark_serve.config import load_config, unknown_variables
from dspark_serve.server.app import router

IMAGES = ("cpu", "gpu")


def test_the_gpu_image_is_what_a_plain_build_makes() -> None:
    assert list(STAGES)[-1] == "gpu"
    assert set(IMAGES) <= set(STAGES)
    for stage in STAGES.values():
        assert stage.base in STAGES or re.search(r":\d+[\w.-]*$", stage.base), f"{stage.base} is not pinned"
    assert ":13." in STAGES[STAGES["gpu"].base].base  # the CUDA that the torch wheels are built for


@pytest.mark.parametrize("image", IMAGES)
def test_nobody_is_root(image: str) -> None:
    steps = STAGES[image].steps
    (user,) = STAGES[image].all("USER")
    assert user not in ("root", "0")
    assert any(f"useradd --uid 10001 --create-home {user} " in line for line in STAGES[image].all("RUN"))
    assert max(i for i, (name, _) in enumerate(steps) if name == "RUN") < steps.index(("USER", user))


@pytest.mark.parametrize("image", IMAGES)
def test_the_environment_is_made_of_options(image: str) -> None:
    stage = STAGES[image]
    environment = stage.environment()
    assert unknown_variables(environment) == []
    config = load_config(environment=environment)
    assert stage.all("EXPOSE") == [str(config.server.port)]
    assert config.server.host == "0.0.0.0"  # a container's own address, or nobody could reach it
    assert config.model.device == ("cuda" if image == "gpu" else "auto")
    (volume,) = stage.all("VOLUME")
    assert environment["DSPARK_CACHE"] == volume
    assert all(Path(environment[name]).is_relative_to(volume) for name in ("HF_HOME",))
    assert any(f"install -d -o dspark -g dspark {volume}" in line for line in stage.all("RUN"))  # it can write there


@pytest.mark.parametrize("image", IMAGES)
def test_the_command_is_the_servers(image: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    (entry,), (command,) = ([json.loads(line) for line in STAGES[image].all(name)] for name in ("ENTRYPOINT", "CMD"))
    assert entry[0] in scripts
    assert command == ["serve"]


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_asked_for_health_is_a_route(image: str) -> None:
    match = re.search(r"(/\w+)'", STAGES[image].health()[-1])
    assert match
    assert match[1] in {route.path for route in router.routes}  # type: ignore[attr-defined]


class Answer(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_tells_alive_from_dead(image: str, status: int) -> None:
    """The very command of the image, against a server on another port."""
    server = HTTPServer(("127.0.0.1", 0), type("Answering", (Answer,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {**os.environ, "DSPARK_PORT": str(server.server_port)}
        command = [sys.executable, *STAGES[image].health()[1:]]
        command[-1] = command[-1].replace("timeout=4", "timeout=120")  # of a busy machine's patience nothing is asked
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
    finally:
        server.shutdown()
        server.server_close()
    assert (done.returncode == 0) == (status == 200), done.stderr


def test_what_is_copied_is_there_and_nothing_else() -> None:
    sources = {source for stage in STAGES.values() for source in stage.copied()}
    assert {"pyproject.toml", "dspark_serve", "kernels", "configs"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert allowed(source), source
    for other in (".git", ".venv", "tests", "benchmarks", "kernels/dspark_kernels/_cpu_base.so", "model.gguf"):
        assert not allowed(other), other


def test_no_model_travels_in_the_image() -> None:
    """The default model's own draft head does, as part of the package; the models themselves come into the volume."""
    sources = sorted({source for stage in STAGES.values() for source in stage.copied()})
    files = [path for source in sources for path in [ROOT / source, *(ROOT / source).rglob("*")] if path.is_file()]
    weights = [path for path in files if path.suffix in (".safetensors", ".gguf", ".bin", ".pt")]
    assert {path.relative_to(ROOT).parts[:2] for path in weights} <= {("dspark_serve", "heads")}
    assert sum(path.stat().st_size for path in weights) < 64 << 20


@pytest.mark.parametrize("build", ["cpu-build", "gpu-build"])
def test_what_is_installed_is_pinned_as_in_development(build: str) -> None:
    installs = [line for line in STAGES[build].all("RUN") if "pip install" in line][1:]
    assert len(installs) == 2
    assert all("-c constraints.txt" in line for line in installs)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (asked,) = re.findall(r"\.\[([\w,]+)\]", installs[1])
    assert set(asked.split(",")) == ({"gpu", "otel"} if build == "gpu-build" else {"otel"})
    assert {"gpu", "otel"} <= set(extras)


def test_both_images_say_the_same_but_for_the_device() -> None:
    """They are written out twice: an instruction added to one and forgotten in the other is seen here."""
    lines = {image: [step for step in STAGES[image].steps if "--from=" not in step[1]] for image in IMAGES}
    assert [step for step in lines["gpu"] if "DSPARK_DEVICE" not in step[1]] == lines["cpu"]
