"""Every `dspark-serve` command line in README.md, docs/ and the like, parsed by the real command: options that were
renamed, dropped or given a value that is no longer one are found here. Nothing is run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer import BadParameter
from typer.main import get_command

from dspark_serve.cli import app
from dspark_serve.config import ConfigError, leaves, load_config

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/README.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "configs").glob("*.yaml"),
]
_PROGRAM = re.compile(r"dspark-serve(:[a-z]+)?")  # the command, or an image whose entry point it is
_ENDS = {"|", "&&", ";", "&", ">"}


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every call in fenced sh blocks, in code spans and in comments of YAML files."""
    fences = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:dspark-serve|make serve) [^`]+)`", rest)
    lines += re.findall(r"^#.*?(dspark-serve [a-z].*)$", rest, re.MULTILINE)
    for line in lines:
        if "dspark-serve" not in line and "make serve" not in line:
            continue
        words = shlex.split(line, comments=True)
        if words[:2] == ["make", "serve"]:
            options = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), "")
            yield ["serve", *shlex.split(options)]
            continue
        places = [number for number, word in enumerate(words) if _PROGRAM.fullmatch(word)]
        if places and words[:2] != ["docker", "build"]:
            arguments = words[places[0] + 1 :]
            end = next((number for number, word in enumerate(arguments) if word in _ENDS), len(arguments))
            yield arguments[:end] or ["serve"]  # what an image does by itself


def check(arguments: list[str]) -> None:
    """Parse as the shell command would; a configuration must also hold together. Raises what that would raise."""
    group = get_command(app)
    name, *rest = arguments
    command = group.commands[name]  # type: ignore[attr-defined]
    if rest == ["--help"]:
        return
    with command.make_context(name, rest) as context:
        given = {key: value for key, value in context.params.items() if key in {leaf for _, leaf, _ in leaves()}}
    if name == "serve":
        file = context.params["config"]
        file = None if file is None else ROOT / "configs" / file.name  # in an image: /etc/dspark-serve
        load_config(given, file=file, speculative_config=context.params["speculative_config"])


USAGE_ERROR = BadParameter.__base__  # of the library beneath typer, whichever that is
ALL_OPTIONS = {
    option
    for command in get_command(app).commands.values()  # type: ignore[attr-defined]
    for parameter in command.params
    for option in (*parameter.opts, *parameter.secondary_opts)
}
CALLS = [(page.name, arguments) for page in PAGES for arguments in command_lines(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "arguments"), CALLS, ids=[f"{page}: {' '.join(call)}" for page, call in CALLS])
def test_documented_commands_parse(page, arguments):
    check(arguments)


def test_the_calls_are_found():
    named = {call[0] for page, call in CALLS if page in ("README.md", "tuning.md")}
    assert named == {"serve", "graft", "profile", "check-lossless", "doctor", "bench"}
    assert ["serve", "--port", "9000", "--num-speculative-tokens", "6"] in [call for _, call in CALLS]
    assert any(page.endswith(".yaml") for page, _ in CALLS)
    assert list(command_lines("```sh\ndocker run -p 1:1 dspark-serve:gpu \\\n  serve --port 1 # why\n```")) == [
        ["serve", "--port", "1"]
    ]
    assert list(command_lines("so `dspark-serve bench --url X`, not dspark-serve alone")) == [["bench", "--url", "X"]]


@pytest.mark.parametrize(
    "line",
    [
        "dspark-serve serve --no-such-option",
        "dspark-serve serve --budget sometimes",
        "dspark-serve serve --config /etc/dspark-serve/gone.yaml",
        "dspark-serve bench --concurrency many",
        "dspark-serve bench --warm-up 3",
        "dspark-serve measure",
    ],
)
def test_a_command_that_rots_is_found(line):
    [arguments] = command_lines(f"```sh\n{line}\n```")
    with pytest.raises((USAGE_ERROR, ConfigError, KeyError)):
        check(arguments)


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_options_that_are_mentioned_exist(page):
    spans = re.findall(r"`(--[a-z][a-z-]*)[^`]*`", page.read_text(encoding="utf-8"))
    assert spans
    assert set(spans) <= ALL_OPTIONS
