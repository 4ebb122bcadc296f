"""Every command and snippet of README.md, docs/ and benchmarks/README.md is run, or named below with the reason why
not; `test_docs.py` only parses them. Whatever is changed in one, to make it small or to point it at a free port, a tiny
model and files of this test, stands in the tables here. Scripts of benchmarks/: tests/benchmarks/test_scripts.py."""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from dspark_serve.cli import app
from dspark_serve.server import run as server_run
from dspark_serve.server.app import create_app
from dspark_serve.server.service import Service
from dspark_serve.training import command as training
from tests.documented import COMMANDS, ROOT, commands, snippets
from tests.tiny_model import write_tiny_model

pytestmark = pytest.mark.timeout(900)  # of what is documented nothing is asked to be quick; most of it is
URL = "http://127.0.0.1:8000"  # of a server that runs, on every page


@dataclass(frozen=True)
class Run:
    """What a command's output must show (a pattern), and what is changed in it (patterns, in this order)."""

    shows: str
    changes: dict[str, str] = field(default_factory=dict)
    writes: str = ""  # the file that must be there afterwards


# In every command. {name}: a path of the fixture `place`, or the port of the server that is asked.
EVERYWHERE = {
    "127.0.0.1:800[01]": "127.0.0.1:{port}",
    r"\b(mine\.jsonl|\w+\.(?:json|png))\b": "{here}/\\1",
    "--out DIR": "--out {here}/head",
    "--head DIR(/best)?": "--head {here}/head/best",
    r"\bMODEL\b": "{model}",
}
_SHORT = " --output-len 4 --num-prompts 2 --warmup 0"
_SHAPE = " --updates 2 --layers 1 --rank 4 --gamma 3 --draft-vocab 64 --taps=-1,0 --mask-token 299"
_THROUGHPUT, _SPEED_UP = r"Output token throughput \(tok/s\): +\d", "(?i)texts"
_OK = r"(?m)^\s*ok\b"

GRAFTED = "dspark-serve graft MODEL --out DIR --minutes 90"  # makes the head that others name
ASKED = {  # through the command line, in this process
    GRAFTED: Run("head: .*best", {"--minutes 90": _SHAPE}),
    "dspark-serve graft MODEL --out DIR": Run("head: .*best", {"$": _SHAPE}),  # goes on, with nothing left to do
    "dspark-serve graft MODEL --out DIR --data mine.jsonl": Run("head: .*best", {"DIR": "{here}/other", "$": _SHAPE}),
    "dspark-serve profile MODEL": Run("(?m)^ *8 "),
    "dspark-serve profile MODEL --plot curves.png": Run("(?m)^ *8 ", writes="curves.png"),
    "dspark-serve doctor": Run(_OK),
    "dspark-serve doctor MODEL": Run(_OK),
    "dspark-serve doctor MODEL --head DIR --json doctor.json": Run(_OK, writes="doctor.json"),
    "dspark-serve check-lossless": Run("(?m)^LOSSLESS$", {"$": f" --url {URL} --max-tokens 6 --draws 20"}),
    "dspark-serve bench": Run(_THROUGHPUT, {"$": f" --url {URL} --repeats 1{_SHORT}"}),
    "dspark-serve bench --concurrency 8 --plot bench.png": Run(
        _THROUGHPUT, {"$": f" --url {URL} --repeats 1{_SHORT}"}, "bench.png"
    ),
    "dspark-serve bench --url http://127.0.0.1:8000 --concurrency 8 --repeats 5 --json here.json": Run(
        _THROUGHPUT, {"--repeats 5": "--repeats 1", "$": _SHORT}, "here.json"
    ),
    "dspark-serve bench --url http://127.0.0.1:8001 --concurrency 8 --repeats 5 --json there.json --api-key KEY": Run(
        _THROUGHPUT, {"--repeats 5": "--repeats 1", "$": _SHORT}, "there.json"
    ),
    "dspark-serve bench --request-rate 2 --input-len 512 --output-len 128 --num-prompts 100": Run(
        _THROUGHPUT,
        {"rate 2": "rate 50", "512": "32", "128": "4", "100": "2", "$": f" --url {URL} --warmup 0 --repeats 1"},
    ),
    "dspark-serve bench --compare --prompts mine.jsonl": Run(_SPEED_UP, {"$": f" --url {URL}{_SHORT}"}),
    "dspark-serve bench --compare --prompts mine.jsonl --sweep 1,4,16 --plot compare.png": Run(
        _SPEED_UP, {"1,4,16": "1,2", "$": f" --url {URL}{_SHORT}"}, "compare.png"
    ),
    "dspark-serve serve --help": Run("--max-num-seqs"),
}

SERVED = {  # by a server of these options in this process, without its socket; on the tiny model where none is named
    "dspark-serve serve MODEL": {},
    "dspark-serve serve MODEL --head DIR": {},
    "dspark-serve serve MODEL --head DIR/best": {},
    "dspark-serve serve MODEL --head DIR --measure-again": {},
    "dspark-serve serve MODEL --head DIR --objective per-user:10": {},
    "dspark-serve serve MODEL --method ngram --num-speculative-tokens 8 --budget fixed:3": {},
    "dspark-serve serve --objective per-user:10": {" serve": " serve {model}"},
    "dspark-serve serve --budget full": {" serve": " serve {model}"},
}

STARTED = 'make serve ARGS="--port 9000 --num-speculative-tokens 6"'  # a server process that all others ask
TRIED = {"make serve": ["serve"], STARTED: ["serve", "--port", "9000", "--num-speculative-tokens", "6"]}

_DOCKER = "needs a container engine; tests/docker/test_container_engine.py types it for podman"
NOT_RUN = {
    "make test": "runs this very test",
    "make test-docker": "builds a Debian root and an image with all that the server needs: minutes, and gigabytes",
    "pip install -e .[gpu]": "changes the environment that the tests run in",
    "pytest -m gpu": "needs a GPU",
    "docker build -t dspark-serve:cpu --target cpu .": _DOCKER,
    "docker run -p 127.0.0.1:8000:8000 -v dspark-cache:/cache dspark-serve:cpu": _DOCKER,
    "docker build -t dspark-serve:gpu .": "needs a container engine and a registry; tests/docker/ builds the CPU's",
    "docker run --gpus all -p 127.0.0.1:8000:8000 -v dspark-cache:/cache dspark-serve:gpu serve --config "
    "/etc/dspark-serve/h100-qwen3-8b-dspark.yaml": "needs a GPU; tests/test_configs.py reads the file",
    "docker run --gpus all -p 127.0.0.1:8000:8000 -v dspark-cache:/cache dspark-serve:gpu serve --config "
    "/etc/dspark-serve/dgx-spark-qwen3-4b-dspark.yaml --gpu-memory-utilization 0.45": "needs a GPU, see above",
    "docker compose -f configs/compose.yaml up --build": _DOCKER,
    "torchrun --nproc-per-node 4 --no-python dspark-serve graft MODEL --out DIR": "tests/training/test_parallel.py",
}
SCRIPTS = [command for command in COMMANDS if command.startswith("python ")]
CURLS = [command for command in COMMANDS if command.startswith("curl ")]


def test_every_command_is_run_or_excused():
    """A new one belongs into a table above; one that is gone is to be taken out of it."""
    assert set(COMMANDS) - {*CURLS, *SCRIPTS} == {*ASKED, *SERVED, *TRIED, *NOT_RUN}
    assert len(CURLS) == 1
    assert len(snippets()) == 2


def test_commands_are_found_wherever_they_stand():
    page = "```sh\n# why\nmake a  # b\ncurl x -d '{\n 1}'\ndocker run \\\n  y\n```\nand `pip install z`, `--flag`."
    assert commands(page) == ["make a", "curl x -d '{\n 1}'", "docker run y", "pip install z"]
    assert commands('`make serve ARGS="--port 1"`') == ['make serve ARGS="--port 1"']


@pytest.fixture(scope="module")
def server():
    """The port of the one server process, started by a documented line on a port that it chooses itself."""
    arguments = ["0" if word == "9000" else word for word in recipe(STARTED)]
    process = subprocess.Popen(
        [sys.executable, "-m", "dspark_serve.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if ready := re.match(r"ready +http://127\.0\.0\.1:(\d+)/", line):
            break
    else:
        pytest.fail("".join(said))
    # It logs a line for each request and others by the clock: into a full pipe that nobody empties it would wait.
    threading.Thread(target=process.stdout.readlines, daemon=True).start()
    yield int(ready[1])
    process.terminate()
    assert process.wait(timeout=120) == 0


def recipe(command):
    """The arguments of `dspark-serve` that make would start with, its environment being up to date."""
    command = [*shlex.split(command), "-n", "-o", ".venv/.installed"]
    # What runs these tests may be a make itself, which tells those below it so.
    mine = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    said = subprocess.run(command, cwd=ROOT, env=mine, capture_output=True, text=True, check=True).stdout
    program, _, arguments = said.splitlines()[-1].partition("dspark-serve ")
    assert program == "exec .venv/bin/"
    return shlex.split(arguments)


@pytest.mark.parametrize("command", TRIED)
def test_make_starts_the_server_with_these_options(command):
    assert recipe(command) == TRIED[command]


def asked(text, port):
    """A command or snippet that asks this server, not the one of port 8000."""
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")


@pytest.mark.parametrize("command", CURLS, ids=["curl"])
def test_curl(command, server):
    done = subprocess.run(
        ["bash", "-c", asked(command, server)], capture_output=True, text=True, check=False, timeout=800
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


@pytest.fixture(scope="module")
def place(tmp_path_factory, server):
    """What stands for the names in the commands."""
    here = tmp_path_factory.mktemp("docs")
    lines = [{"messages": [{"role": "user", "content": f"{n} and {n}"}], "workload": "sums"} for n in range(40)]
    (here / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {"port": server, "model": write_tiny_model(here / "model"), "here": here}


def changed(command, changes, place):
    """The command with changes made, its own first; every one of them must find something to change."""
    for pattern, new in changes.items():
        command, count = re.subn(pattern, new, command, count=1)
        assert count, f"nothing to change: {pattern}"
    for pattern, new in EVERYWHERE.items():
        command = re.sub(pattern, new, command)
    return re.sub(r"{(\w+)}", lambda name: str(place[name[1]]), command)


def invoke(command, place):
    """The output. Figures of the tiny model stay out of the cache; grafting starts with what it has soon written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPARK_CACHE", str(place["here"] / "cache"))
        patch.setenv("DSPARK_KV_CACHE_GIB", "0.02")
        patch.setattr(training, "GraftOptions", functools.partial(training.GraftOptions, first_tokens=300, rows=8))
        result = CliRunner().invoke(app, shlex.split(command)[1:], env={"COLUMNS": "200"})
    assert result.exit_code == 0, (command, result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def grafted(place):
    """What the first graft printed; its head is there."""
    return invoke(changed(GRAFTED, ASKED[GRAFTED].changes, place), place)


def marked(table):
    """The commands of a table, those slow that train a head, use one, or ask for hundreds of answers."""
    slow = re.compile("graft|--head|check-lossless")
    return [pytest.param(command, marks=pytest.mark.slow if slow.search(command) else ()) for command in table]


@pytest.mark.parametrize("command", marked(ASKED))
def test_command(command, place, request):
    run, said = ASKED[command], ""
    if "DIR" in command:
        said = request.getfixturevalue("grafted")
    if command != GRAFTED:
        said = invoke(changed(command, run.changes, place), place)
    assert re.search(run.shows, said)
    if run.writes:
        written = (place["here"] / run.writes).read_bytes()
        assert json.loads(written) if run.writes.endswith("json") else written.startswith(b"\x89PNG")


@pytest.mark.parametrize("command", marked(SERVED))
def test_serve(command, place, request, monkeypatch):
    answers = []
    if "DIR" in command:
        request.getfixturevalue("grafted")

    def ask(config):
        service = Service(config)
        with TestClient(create_app(service)) as client:
            client.portal.call(service.engine.wait_loaded)
            answers.append(client.post("/v1/completions", json={"prompt": "abcabc", "max_tokens": 6, "seed": 1}))
        return 0

    monkeypatch.setattr(server_run, "serve", ask)
    invoke(changed(command, SERVED[command], place), place)
    (answer,) = answers
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 6
