"""A newcomer's path through README.md is walked: `make serve`, curl, both snippets, on a free port. Every other command
of README.md, docs/ and benchmarks/README.md is named below with what tests it, or with the reason why nothing does."""

import contextlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = r"(?:dspark-serve|make|python|pytest|pip|torchrun|docker|curl) "

STARTED = 'make serve ARGS="--port 9000 --num-speculative-tokens 6"'  # a server process that all others ask
TRIED = {"make serve": ["serve"], STARTED: ["serve", "--port", "9000", "--num-speculative-tokens", "6"]}

_MINUTES = "takes minutes; its parts are tested in tests/benchmarks"
_DOCKER = "needs a container engine; tests/docker/test_replay.py runs the Dockerfile's steps and its server"
# Commands of this program that are parsed, by test_docs.py, and whose work other tests do in the small.
PARSED = {
    "serve": "tests/server/test_real.py",
    "graft": "tests/training/test_graft.py",
    "profile": "tests/test_cli.py",
    "doctor": "tests/doctor",
    "bench": "tests/server/test_bench.py",
    "check-lossless": "tests/server/test_lossless.py",
}
NOT_RUN = {
    "make test": "runs this very test",
    "make test-docker": "builds a Debian root with all that the server needs: minutes, and gigabytes",
    "pip install -e .[gpu]": "changes the environment that the tests run in",
    "pytest -m gpu": "needs a GPU",
    "python benchmarks/serve.py --quick": _MINUTES,
    "python benchmarks/accept.py --prompts DIR": _MINUTES,
    "python benchmarks/load.py --quick --prompts DIR": _MINUTES,
    "python benchmarks/gpu.py --quick": "needs a GPU",
    "python benchmarks/observe.py": _MINUTES,
    "python benchmarks/cores.py": _MINUTES,
    "docker build -t dspark-serve:cpu --target cpu .": _DOCKER,
    "docker run -p 127.0.0.1:8000:8000 -v dspark-cache:/cache dspark-serve:cpu": _DOCKER,
    "docker build -t dspark-serve:gpu .": _DOCKER + ", of the CPU",
    "docker run --gpus all -p 127.0.0.1:8000:8000 -v dspark-cache:/cache dspark-serve:gpu serve --config "
    "/etc/dspark-serve/h100-qwen3-8b-dspark.yaml": "needs a GPU; tests/test_configs.py reads the file",
    "docker run --gpus all -p 127.0.0.1:8000:8000 -v dspark-cache:/cache dspark-serve:gpu serve --config "
    "/etc/dspark-serve/dgx-spark-qwen3-4b-dspark.yaml --gpu-memory-utilization 0.45": "needs a GPU, see above",
    "docker compose -f configs/compose.yaml up --build": "needs a container engine; tests/server/test_grafana.py",
    "torchrun --nproc-per-node 4 --no-python dspark-serve graft MODEL --out DIR": "tests/training/test_parallel.py",
}


def commands(text: str) -> list[str]:
    """All commands of a page, in order: of fenced sh blocks, then of code spans; comments and line breaks removed."""
    found = []
    for fence in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = ""
        for line in fence.splitlines(keepends=True):
            lines += line
            with contextlib.suppress(ValueError):  # a quotation that goes on
                if not lines.endswith("\\\n") and (words := shlex.split(lines.replace("\\\n", " "), comments=True)):
                    found.append(words)
                    lines = ""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [shlex.split(span) for span in re.findall(rf"`({PROGRAMS}[^`]+)`", prose)]
    return [" ".join(word if re.fullmatch(r"[^\s{}]*", word) else _quoted(word) for word in words) for words in found]


def _quoted(word: str) -> str:
    name, _, value = word.partition("=")
    return f'{name}="{value}"' if name.isupper() else shlex.quote(word)


def snippets() -> list[str]:
    return [code for page in PAGES for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.DOTALL)]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))))
CURLS = [command for command in COMMANDS if command.startswith("curl ")]


def test_every_command_is_run_or_excused():
    """A new one belongs into a table above; one that is gone is to be taken out of it."""
    own = {command for command in COMMANDS if command.startswith("dspark-serve ")}
    assert {command.split()[1] for command in own} == set(PARSED)
    assert all((ROOT / tests).exists() for tests in PARSED.values())
    assert set(COMMANDS) - set(CURLS) - own == {*TRIED, *NOT_RUN}
    assert len(CURLS) == 1
    assert len(snippets()) == 2


def test_commands_are_found_wherever_they_stand():
    page = "```sh\n# why\nmake a  # b\ncurl x -d '{\n 1}'\ndocker run \\\n  y\n```\nand `pip install z`, `--flag`."
    assert commands(page) == ["make a", "curl x -d '{\n 1}'", "docker run y", "pip install z"]
    assert commands('`make serve ARGS="--port 1"`') == ['make serve ARGS="--port 1"']


@pytest.fixture(scope="module")
def server():
    """The port of the one server process, started by a documented line on a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(port) if word == "9000" else word for word in recipe(STARTED)]
    process = subprocess.Popen(
        [sys.executable, "-m", "dspark_serve.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("ready "):
            break
    else:
        pytest.fail("".join(said))
    yield port
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 0


def recipe(command):
    """The arguments of `dspark-serve` that make would start with, its environment being up to date."""
    command = [*shlex.split(command), "-n", "-o", ".venv/.installed"]
    # What runs these tests may be a make itself, which tells those below it so.
    mine = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    said = subprocess.run(command, cwd=ROOT, env=mine, capture_output=True, text=True, check=True).stdout
    program, _, arguments = said.splitlines()[-1].partition("dspark-serve ")
    assert program == "exec .venv/bin/"
    return shlex.split(arguments)


def asked(text, port):
    """A command or snippet that asks this server, not the one of port 8000."""
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")


@pytest.mark.parametrize("command", TRIED)
def test_make_starts_the_server_with_these_options(command):
    assert recipe(command) == TRIED[command]


@pytest.mark.parametrize("command", CURLS, ids=["curl"])
def test_curl(command, server):
    done = subprocess.run(
        ["bash", "-c", asked(command, server)], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] > 1


@pytest.mark.parametrize("code", snippets(), ids=["client", "offline"])
def test_snippet(code, server):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(asked(code, server), "snippet", "exec"), {})
    assert printed.getvalue().strip()
