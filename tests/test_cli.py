"""The command: a flag for every option, quick help, one sentence for every error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_serve.cli import app
from dspark_serve.config import leaves
from dspark_serve.server import run


@pytest.fixture
def served(monkeypatch):
    """What `serve` would have been given."""
    for name in [name for name in os.environ if name.startswith("DSPARK_") and name != "DSPARK_CACHE"]:
        monkeypatch.delenv(name)
    configs = []
    monkeypatch.setattr(run, "serve", lambda config: configs.append(config) or 0)
    return configs


def invoke(*arguments):
    return CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "300"})


def test_every_option_has_a_flag():
    text = invoke("--help").output
    for _, name, info in leaves():
        if name != "model":
            assert f"--{name.replace('_', '-')} " in text
            assert info.description.split()[0] in text


def test_flags_reach_the_configuration(served):
    result = invoke(
        "qwen", "--port", "1", "--no-enable-prefix-caching", "--dtype", "bfloat16",
        "--speculative-config", '{"method": "none"}', "--kv-cache-gib", "0.25",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    [config] = served
    assert (config.model.model, config.server.port, config.model.dtype) == ("qwen", 1, "bfloat16")
    assert (config.cache.enable_prefix_caching, config.cache.kv_cache_gib) == (False, 0.25)
    assert config.speculation.method == "none"


def test_sources_are_merged(served, tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("server: {port: 1}\nengine: {seed: 1}\n")
    monkeypatch.setenv("DSPARK_PORT", "2")
    monkeypatch.setenv("DSPARK_PROT", "2")
    result = invoke("--config", str(file))
    assert (served[0].server.port, served[0].engine.seed) == (2, 1)
    assert "DSPARK_PROT is not an option" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--speculative-config", "{"], ["--config", "/nowhere.yaml"], ["--max-num-seqs", "0"]]
)
def test_errors_are_one_sentence(served, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("dspark-serve: ")
    assert result.stderr.count("\n") == 1
    assert not served


def test_start_up_errors_are_one_sentence(served, monkeypatch):
    def fail(config):
        raise run.StartupError("port 1 is in use")

    monkeypatch.setattr(run, "serve", fail)
    result = invoke()
    assert (result.exit_code, result.stderr) == (1, "dspark-serve: port 1 is in use\n")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, dspark_serve.cli; print([m for m in ('torch', 'transformers', 'fastapi', 'openai', 'uvicorn')"
        " if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


def test_profile_prints_the_curves(tmp_path, monkeypatch):
    """Of a tiny target; a plot without matplotlib, or what has no curves, is one sentence."""
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = str(Path(__file__).parent / "goldens" / "target")
    arguments = ["profile", target, "--method", "ngram"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines if line.strip()[0].isdigit()][:4] == ["1", "2", "4", "8"]
    assert len(list((tmp_path / "profiles").iterdir())) == 1
    result = CliRunner().invoke(app, ["profile", target, "--method", "none"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    picture = tmp_path / "curves.png"
    result = CliRunner().invoke(app, [*arguments, "--plot", str(picture)])
    assert picture.exists() == (result.exit_code == 0)
    assert picture.exists() or "[train]" in result.stderr


def test_version():
    result = CliRunner().invoke(app, ["version"])
    assert result.exit_code == 0
    assert result.output.startswith("dspark-serve ")
