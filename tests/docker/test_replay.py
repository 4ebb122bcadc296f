"""The CPU image is built by its Dockerfile's own instructions, served from as it would be, and asked a question.

Minutes and gigabytes: only `make test-docker` asks for it. No registry is needed, the base is of debootstrap's; torch
comes from TORCH_INDEX of the environment (empty: where pip looks here), the model from the cache of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from dockerfile import ROOT
from replay import Image, build, missing
from served import MODEL, UID, check_answers, check_first_lines, check_status, wait_until_ready

from dspark_serve.models.loader import resolve

pytestmark = [
    pytest.mark.skipif(
        "REPLAY" not in os.environ, reason="takes minutes and gigabytes: `make test-docker` asks for it"
    ),
    pytest.mark.timeout(3600),
]


@dataclass(frozen=True)
class Started:
    image: Image
    process: subprocess.Popen[bytes]
    client: httpx.Client
    port: int
    volume: Path
    log: Path

    @property
    def server(self) -> int:
        """The process id, seen from here, of the one that is 1 in there."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """What `docker exec` would do."""
        enter = [
            "nsenter",
            f"--target={self.server}",
            "--mount",
            "--pid",
            "--root",
            f"--setuid={UID}",
            f"--setgid={UID}",
        ]
        variables = [f"{name}={value}" for name, value in self.image.environment.items()]
        line = [
            *enter,
            "/usr/bin/env",
            "-i",
            "-C",
            self.image.directory,
            *variables,
            f"DSPARK_PORT={self.port}",
            *command,
        ]
        return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    if reason := missing():
        pytest.skip(reason)
    scratch = Path(tempfile.mkdtemp(prefix="dspark-replay-"))
    try:
        yield build("cpu", scratch, {"TORCH_INDEX": os.environ.get("TORCH_INDEX", "")})
    finally:
        shutil.rmtree(scratch)


@pytest.fixture(scope="module")
def started(image: Image) -> Iterator[Started]:
    """The server as the image starts it, with a new volume: it belongs to whom the image's directory belongs to."""
    volume, log = image.scratch / "volume", image.scratch / "server.log"
    model = resolve(MODEL).path
    (volume / "models" / model.name).mkdir(parents=True)
    owner = image.find("/cache").stat()
    for directory in (volume, volume / "models"):
        os.chown(directory, owner.st_uid, owner.st_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"DSPARK_PORT": str(port)}
    if "OMP_NUM_THREADS" in os.environ:
        given["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    command = image.inside(
        [*image.entrypoint, *image.command], {"/cache": volume, f"/cache/models/{model.name}": model}, **given
    )
    with log.open("wb") as output, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        found = Started(image, process, client, port, volume, log)
        try:
            wait_until_ready(client, lambda: None if process.poll() is None else log.read_text())
            yield found
        finally:
            if process.poll() is None:
                os.kill(found.server, signal.SIGKILL)  # the first of its name space, which ends with it
            process.wait()


def test_no_weights_travel_in_the_image(image: Image) -> None:
    large = [
        path
        for layer in image.layers
        for path in layer.rglob("*")
        if path.suffix in (".safetensors", ".gguf", ".pt", ".bin") and not path.is_symlink()
        if path.stat().st_size > 1 << 20
    ]
    assert large
    assert {path.parent.parent.name for path in large} == {"heads"}  # the draft head that is part of the package
    assert not list(image.find("/cache").iterdir())


def test_it_starts_as_promised(started: Started) -> None:
    check_first_lines(started.log.read_text())
    check_status(Path(f"/proc/{started.server}/status").read_text())


def test_it_answers_alike_with_and_without_drafts(started: Started) -> None:
    check_answers(started.client)


def test_its_health_check_says_so(started: Started) -> None:
    done = started.execute(*started.image.health)
    assert done.returncode == 0, done.stderr
    elsewhere = ["/usr/bin/env", "DSPARK_PORT=1", *started.image.health]
    assert started.execute(*elsewhere).returncode != 0


def test_what_it_measures_goes_into_the_volume(started: Started) -> None:
    kept = [path for name in ("profiles", "checks") for path in (started.volume / name).iterdir()]
    assert kept
    assert {path.stat().st_uid for path in kept} == {UID}
    assert all(json.loads(path.read_text()) for path in kept)
    assert started.execute("touch", "/etc/dspark-serve/mine").returncode != 0  # the image itself is not its to change


def test_another_model_could_be_fetched_and_the_configurations_are_there(started: Started) -> None:
    assert started.execute("python", "-m", "pip", "--version").returncode == 0  # the catalog's models are wheels
    names = started.execute("ls", "/etc/dspark-serve").stdout.split()
    assert {file.name for file in (ROOT / "configs").glob("*.yaml")} <= set(names)


def test_it_stops_when_told(started: Started) -> None:
    os.kill(started.server, signal.SIGTERM)
    assert started.process.wait(timeout=600) == 0, started.log.read_text()
