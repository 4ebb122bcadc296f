"""Every command and snippet of README.md, docs/ and benchmarks/README.md is run, or named below with the reason why
not; `test_docs.py` only parses them. Whatever is changed in one, to make it small or to point it at a free port, a tiny
model and files of this test, stands in the tables here."""

import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from dspark_serve.cli import app
from dspark_serve.server import run as server_run
from dspark_serve.server.app import create_app
from dspark_serve.server.service import Service
from dspark_serve.training import command as training
from tests.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = r"(?:dspark-serve|make|python|pytest|pip|torchrun|docker|curl) "
URL = "http://127.0.0.1:8000"  # of a server that runs, on every page


@dataclass(frozen=True)
class Run:
    """What a command's output must show (a pattern), and what is changed in it (patterns, in this order)."""

    shows: str
    changes: dict[str, str] = field(default_factory=dict)


# In every command. {name}: a path of the fixture `place`, or the port of the server that is asked.
EVERYWHERE = {
    "127.0.0.1:800[01]": "127.0.0.1:{port}",
    r"\bmine\.jsonl": "{prompts}",
    "--out DIR": "--out {out}",
    "--head DIR(/best)?": "--head {out}/best",
    r"\bMODEL\b": "{model}",
}
_NO_PLOT = {r" --plot \w+\.png": ""}  # drawing needs the [train] extra: test_plots.py and test_cli.py do it
_SHORT = " --output-len 4 --num-prompts 2 --warmup 0"
_SHAPE = " --updates 2 --layers 1 --rank 4 --gamma 3 --draft-vocab 64 --taps=-1,0 --mask-token 299"
_THROUGHPUT, _SPEED_UP = "Output token throughput", "(?i)texts"
_OK = r"(?m)^\s*ok\b"

ASKED = {  # through the command line, in this process. Later ones use what earlier ones made
    "dspark-serve graft MODEL --out DIR --minutes 90": Run("head: .*best", {"--minutes 90": _SHAPE}),
    "dspark-serve graft MODEL --out DIR": Run("head: .*best", {"$": _SHAPE}),  # it goes on, and has nothing left to do
    "dspark-serve graft MODEL --out DIR --data mine.jsonl": Run("head: .*best", {"DIR": "{other}", "$": _SHAPE}),
    "dspark-serve profile MODEL": Run("(?m)^ *8 "),
    "dspark-serve profile MODEL --plot curves.png": Run("(?m)^ *8 ", _NO_PLOT),
    "dspark-serve doctor": Run(_OK),
    "dspark-serve doctor MODEL": Run(_OK),
    "dspark-serve doctor MODEL --head DIR --json doctor.json": Run(_OK, {"doctor.json": "{json}"}),
    "dspark-serve check-lossless": Run("(?m)^LOSSLESS$", {"$": f" --url {URL} --max-tokens 6 --draws 20"}),
    "dspark-serve bench": Run(_THROUGHPUT, {"$": f" --url {URL} --repeats 1{_SHORT}"}),
    "dspark-serve bench --concurrency 8 --plot bench.png": Run(
        _THROUGHPUT, {**_NO_PLOT, "$": f" --url {URL} --repeats 1{_SHORT}"}
    ),
    "dspark-serve bench --url http://127.0.0.1:8000 --concurrency 8 --repeats 5 --json here.json": Run(
        _THROUGHPUT, {"here.json": "{json}", "--repeats 5": "--repeats 1", "$": _SHORT}
    ),
    "dspark-serve bench --url http://127.0.0.1:8001 --concurrency 8 --repeats 5 --json there.json --api-key KEY": Run(
        _THROUGHPUT, {"there.json": "{json}", "--repeats 5": "--repeats 1", "$": _SHORT}
    ),
    "dspark-serve bench --request-rate 2 --input-len 512 --output-len 128 --num-prompts 100": Run(
        _THROUGHPUT,
        {"rate 2": "rate 50", "512": "32", "128": "4", "100": "2", "$": f" --url {URL} --warmup 0 --repeats 1"},
    ),
    "dspark-serve bench --compare --prompts mine.jsonl": Run(_SPEED_UP, {"$": f" --url {URL}{_SHORT}"}),
    "dspark-serve bench --compare --prompts mine.jsonl --sweep 1,4,16 --plot compare.png": Run(
        _SPEED_UP, {**_NO_PLOT, "1,4,16": "1,2", "$": f" --url {URL}{_SHORT}"}
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
    "dspark-serve serve --objective per-user:10": {"serve ": "serve {model} "},
    "dspark-serve serve --budget full": {"serve ": "serve {model} "},
}

STARTED = 'make serve ARGS="--port 9000 --num-speculative-tokens 6"'  # a server process that all others ask
TRIED = {"make serve": ["serve"], STARTED: ["serve", "--port", "9000", "--num-speculative-tokens", "6"]}

_MINUTES = "takes minutes; its parts are tested in tests/benchmarks, its options here"
_DOCKER = "needs a container engine; tests/docker/test_replay.py runs the Dockerfile's steps and its server"
NOT_RUN = {
    "make test": "runs this very test",
    "pip install -e .[gpu]": "changes the environment that the tests run in",
    "pytest -m gpu": "needs a GPU",
    "python benchmarks/serve.py --quick": _MINUTES,
    "python benchmarks/accept.py --prompts DIR": _MINUTES,
    "python benchmarks/load.py --quick --prompts DIR": _MINUTES,
    "python benchmarks/gpu.py --quick": "needs a GPU",
    "python benchmarks/observe.py": _MINUTES,
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
    assert set(COMMANDS) - set(CURLS) == {*ASKED, *SERVED, *TRIED, *NOT_RUN}
    assert len(CURLS) == 1
    assert len(snippets()) == 2


def test_commands_are_found_wherever_they_stand():
    page = "```sh\n# why\nmake a  # b\ncurl x -d '{\n 1}'\ndocker run \\\n  y\n```\nand `pip install z`, `--flag`."
    assert commands(page) == ["make a", "curl x -d '{\n 1}'", "docker run y", "pip install z"]
    assert commands('`make serve ARGS="--port 1"`') == ['make serve ARGS="--port 1"']


@pytest.fixture(scope="module")
def place(tmp_path_factory, server):
    """What stands for the names in the commands."""
    here = tmp_path_factory.mktemp("docs")
    prompts = here / "mine.jsonl"
    asked = [{"messages": [{"role": "user", "content": f"{n} and {n}"}], "workload": "sums"} for n in range(40)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    names = {"out": here / "head", "other": here / "other", "json": here / "figures.json"}
    return {"port": server, "model": write_tiny_model(here / "model"), "prompts": prompts, **names}


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
    line = subprocess.run(
        [*shlex.split(command), "-n", "-o", ".venv/.installed"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    program, _, arguments = line.partition("dspark-serve ")
    assert program == "exec .venv/bin/"
    return shlex.split(arguments)


def changed(command, changes, place):
    """The command with changes made, its own first; every one must find something to change."""
    for pattern, new in changes.items():
        command, count = re.subn(pattern, lambda _, new=new: new, command, count=1)
        assert count, f"nothing to change: {pattern}"
    for pattern, new in EVERYWHERE.items():
        command = re.sub(pattern, lambda _, new=new: new, command)
    return re.sub(r"{(\w+)}", lambda name: str(place[name[1]]), command)


def invoke(command):
    result = CliRunner().invoke(app, shlex.split(command)[1:], env={"COLUMNS": "200"})
    assert result.exit_code == 0, (command, result.output, result.exception)
    return result.output


@pytest.mark.parametrize("command", TRIED)
def test_make_starts_the_server_with_these_options(command):
    assert recipe(command) == TRIED[command]


@pytest.mark.parametrize("command", CURLS, ids=["curl"])
def test_curl(command, place):
    done = subprocess.run(
        ["bash", "-c", changed(command, {}, place)], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] > 1


@pytest.mark.parametrize("code", snippets(), ids=["client", "offline"])
def test_snippet(code, place):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(changed(code, {}, place), "snippet", "exec"), {})
    assert printed.getvalue().strip()


@pytest.fixture
def tiny_runs(monkeypatch, tmp_path_factory):
    """Figures of the tiny model stay out of the cache; grafting starts with what the tiny model has soon written."""
    cache = tmp_path_factory.getbasetemp() / "docs-cache"
    monkeypatch.setenv("DSPARK_CACHE", str(cache))
    monkeypatch.setenv("DSPARK_KV_CACHE_GIB", "0.02")
    small = functools.partial(training.GraftOptions, first_tokens=300, rows=8)
    monkeypatch.setattr(training, "GraftOptions", small)


@pytest.mark.parametrize("command", ASKED)
def test_command(command, place, tiny_runs):
    run = ASKED[command]
    assert re.search(run.shows, invoke(changed(command, run.changes, place)))
    if "{json}" in "".join(run.changes.values()):
        assert json.loads(place["json"].read_text())
        place["json"].unlink()


@pytest.mark.parametrize("command", SERVED)
def test_serve(command, place, tiny_runs, monkeypatch):
    answers = []

    def ask(config):
        service = Service(config)
        with TestClient(create_app(service)) as client:
            client.portal.call(service.engine.wait_loaded)
            answers.append(client.post("/v1/completions", json={"prompt": "abcabc", "max_tokens": 6, "seed": 1}))
        return 0

    monkeypatch.setattr(server_run, "serve", ask)
    invoke(changed(command, SERVED[command], place))
    (answer,) = answers
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 6


SCRIPTS = re.findall(r"^\| `(\w+\.py)`", (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_takes_what_is_said_of_all(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    assert ended.value.code == 0
    assert {"--quick", "--json"} <= set(re.findall(r"--[a-z]+", capsys.readouterr().out))
