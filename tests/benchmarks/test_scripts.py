"""The documented commands of benchmarks/, run on a tiny model and with fewer turns; what is changed stands in a table.

Their figures mean nothing here: what is asked is that they come, of every side, and that texts are the same.
"""

import importlib
import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer

from tests.documented import COMMANDS, ROOT
from tests.tiny_model import write_tiny_model

sys.path.append(str(ROOT / "benchmarks"))


@dataclass(frozen=True)
class Small:
    """What is appended to a command, and constants of the script that no option changes."""

    options: str = ""
    constants: dict[str, object] = field(default_factory=dict)


RUN = {
    "python benchmarks/serve.py --quick": Small("", {"NEW_TOKENS": 8}),
    "python benchmarks/load.py --prompts DIR": Small(
        "--quick --concurrency 1 4 --rounds 1 --new-tokens 32 --kv-cache-gib 0.02"
    ),
    "python benchmarks/observe.py": Small("--quick"),
    "python benchmarks/cores.py": Small("--quick", {"TURN_S": 0.02}),
}
ELSEWHERE = {
    "python benchmarks/accept.py --prompts DIR": "run with a head in test_accept.py",
    "python benchmarks/gpu.py --quick": "needs a GPU; test_gpu.py has what does not",
    "python benchmarks/llama.py --llama-python PYTHON": "needs llama-cpp-python, which takes minutes to compile",
}
SCRIPTS = re.findall(r"^\| `(\w+)\.py`", (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_documented_script_is_run():
    assert {command for command in COMMANDS if command.startswith("python ")} == {*RUN, *ELSEWHERE}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model with room for the prompts that come along, byte by byte; and prompts of its own."""
    here = tmp_path_factory.mktemp("scripts")
    config = write_tiny_model(here / "model") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 8192}))
    for name in ("gsm8k", "humaneval", "mt-bench"):
        lines = [json.dumps({"turns": [f"{name} {n} and {n} and {n}"]}) for n in range(4)]
        (here / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return here


def ran(command: str, place: Path, monkeypatch) -> dict:
    """What the script wrote."""
    small, out = RUN[command], place / "out.json"
    _, path, *arguments = shlex.split(f"{command} {small.options} --model {place / 'model'} --json {out}")
    module = importlib.import_module(Path(path).stem)
    for name, value in small.constants.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("DSPARK_CACHE", str(place / "cache"))
    monkeypatch.setattr(sys, "argv", [path, *(str(place) if word == "DIR" else word for word in arguments)])
    if "typer" in vars(module):
        with pytest.raises(SystemExit) as ended:
            typer.run(module.main)
        assert ended.value.code == 0
    else:
        module.main()
    result = json.loads(out.read_text())
    assert result["facts"]["revision"]
    out.unlink()
    return result


@pytest.mark.slow
def test_serve(place, monkeypatch):
    found = ran("python benchmarks/serve.py --quick", place, monkeypatch)
    for name, sides in (("single", 4), ("copying", 2), ("drafting", 2), ("batched", 3)):
        assert len(found[name]["tokens_per_s"]) == sides
        assert all(rate["median"] > 0 for rate in found[name]["tokens_per_s"].values())
    assert [found[name]["same_tokens"] for name in ("copying", "drafting")] == ["3 of 3", "3 of 3"]
    assert found["copying"]["accepted_length"] >= 1
    assert found["memory"]["requests"] == 60
    assert set(found["host"]["phases_ms"]) > {"plan", "forward"}


@pytest.mark.slow
def test_load(place, monkeypatch, capsys):
    found = ran("python benchmarks/load.py --prompts DIR", place, monkeypatch)["load"]
    assert set(found) == {"mix", "hostile"}
    for by_load in found.values():
        assert set(by_load) == {"1", "4"}
        for table in by_load.values():
            assert table["same_text"]
            assert set(table) - {"same_text"} == {"none", "fixed 3", "full", "budget"}
            assert table["none"]["of_none"]["median"] == 1
            assert table["none"]["kept_per_row"] == 0
            assert all(table[arm]["tokens_per_s"]["median"] > 0 for arm in table if arm != "same_text")
    assert max(table["full"]["kept_per_row"] for by_load in found.values() for table in by_load.values()) > 0
    assert "texts: identical in all of 4 cells" in capsys.readouterr().out


@pytest.mark.slow
def test_observe(place, monkeypatch):
    found = ran("python benchmarks/observe.py", place, monkeypatch)
    assert [each["rows"] for each in found["steps"]] == [1, 8, 64]
    assert all(each[part]["median"] > 0 for each in found["steps"] for part in ("step_ms", "watching_ms"))
    assert found["scrape_ms"]["median"] > 0


@pytest.mark.slow
def test_cores(place, monkeypatch):
    found = ran("python benchmarks/cores.py", place, monkeypatch)["cores"]
    assert [(each["rows"], each["neighbour"]) for each in found] == [(r, n) for n in (False, True) for r in (1, 8, 32)]
    assert all(each[side]["median"] > 0 for each in found for side in ("bound", "free"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_what_is_said_of_all(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        typer.run(module.main) if "typer" in vars(module) else module.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--quick" in said
    assert "--json" in said
