"""The `dspark-serve` command. Its flags are the leaves of the configuration tree, generated from it.

Heavy modules are imported when a command runs, so that --help is quick. Must not know: how anything is served.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from dspark_serve.config import ConfigError, leaves, load_config, unknown_variables

_MODEL_HELP = "Catalog name, local directory, GGUF file or hub id."
_TRAINING_DEVICE_HELP = "auto: cuda when available, else cpu."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An LLM inference server whose speculative decoding is built in and exact.",
)


def main() -> None:
    """Entry point of the `dspark-serve` command."""
    app()


def _fail(message: object) -> typing.NoReturn:
    print(f"dspark-serve: {message}", file=sys.stderr)
    raise SystemExit(1)


def serve(model: str | None, config: Path | None, speculative_config: str | None, **flags: Any) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP API.

    Options win over environment variables (DSPARK_MAX_NUM_SEQS, ...), those over the YAML file, that over defaults.
    """
    for sentence in unknown_variables(os.environ):
        print(f"dspark-serve: warning: {sentence}", file=sys.stderr)
    try:
        merged = load_config(
            {"model": model, **flags}, environment=os.environ, file=config, speculative_config=speculative_config
        )
    except ConfigError as error:
        _fail(error)
    from dspark_serve.server.run import StartupError
    from dspark_serve.server.run import serve as run

    try:
        code = run(merged)
    except StartupError as error:
        _fail(error)
    raise SystemExit(code)


@app.command()
def version() -> None:
    """Print the versions of dspark-serve and of what it computes with."""
    from importlib.metadata import version as of

    print(f"dspark-serve {of('dspark-serve')} (torch {of('torch')}, transformers {of('transformers')})")


@app.command()
def graft(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="Directory of the run: its text, checkpoint and heads.")],
    minutes: Annotated[float | None, typer.Option(help="Length of the run; 60 unless --updates is given.")] = None,
    updates: Annotated[int | None, typer.Option(help="Length of the run in updates instead.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines with OpenAI messages to answer.")] = None,
    records: Annotated[Path | None, typer.Option(help="Directory of text that is written already, or shared.")] = None,
    write: Annotated[bool, typer.Option(help="Let the target write text while the head trains.")] = True,
    variant: Annotated[str, typer.Option(help="dspark, or dflash: without Markov and confidence heads.")] = "dspark",
    layers: Annotated[int, typer.Option(min=1, help="Draft layers.")] = 2,
    rank: Annotated[int, typer.Option(min=0, help="Of the Markov head.")] = 64,
    gamma: Annotated[int, typer.Option(min=1, help="Drafts per round (block_size).")] = 5,
    taps: Annotated[str | None, typer.Option(help="Target layers to read, as 4,12,20.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Draft K/V heads; default: as many as query heads.")] = None,
    draft_vocab: Annotated[int, typer.Option(min=0, help="Frequent tokens that can be drafted; 0: all.")] = 4096,
    mask_token: Annotated[int | None, typer.Option(help="Token id that fills a block.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(help="Same seed, text and --updates: same head, with --no-write.")] = 0,
    device: Annotated[str, typer.Option(help=_TRAINING_DEVICE_HELP)] = "auto",
) -> None:
    """Train a draft head for MODEL on text that MODEL writes itself, then calibrate it. Started again, it goes on.

    SIGTERM or Ctrl-C saves a checkpoint first. OUT/best is the head to serve with. Started by torchrun or
    `accelerate launch`, several processes train one head, each on its share of the text and on a GPU of its own.
    """
    from dspark_serve.models.catalog import LoadError
    from dspark_serve.training.command import GraftOptions, HeadShape
    from dspark_serve.training.command import graft as run
    from dspark_serve.training.graft import TrainOptions
    from dspark_serve.training.schedule import Schedule

    try:
        wanted = tuple(sorted(int(tap) for tap in taps.split(","))) if taps else None
        shape = HeadShape(variant, layers, rank, gamma, wanted, kv_heads, draft_vocab or None, mask_token)
        length = 60.0 if minutes is None and updates is None else minutes
        train = TrainOptions(minutes=length, updates=updates, seed=seed, schedule=Schedule(learning_rate=learning_rate))
        options = GraftOptions(model, out, train, shape, records=records, write=write, data=data, device=device)
        head = run(options, _say)
        if os.environ.get("RANK", "0") == "0":  # of several processes one talks
            print(f"head: {head}")
    except (LoadError, ValueError, OSError) as error:
        _fail(error)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    head: Annotated[Path, typer.Option(help="Directory of the head; its dspark.json is rewritten.")],
    records: Annotated[Path, typer.Option(help="Text that MODEL wrote, as `graft` keeps it in OUT/records.")],
    device: Annotated[str, typer.Option(help=_TRAINING_DEVICE_HELP)] = "auto",
) -> None:
    """Fit the confidence of a trained head to held-out text again, and report what it is worth."""
    from dspark_serve.models.catalog import LoadError
    from dspark_serve.training.command import recalibrate

    try:
        recalibrate(model, head, records, _say, device)
    except (LoadError, ValueError, OSError) as error:
        _fail(error)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)] = "smollm2-135m-instruct",
    head: Annotated[str | None, typer.Option(help="Draft head; default: the one that comes with the model.")] = None,
    method: Annotated[str | None, typer.Option(help="The drafter, as for serve.")] = None,
    again: Annotated[bool, typer.Option(help="Measure even if a profile is in the cache.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves here, as PNG; needs the [train] extra.")] = None,
) -> None:
    """Print what steps and drafts cost on this machine: the curves that --budget auto decides by."""
    from dspark_serve.engine.build import build_engine
    from dspark_serve.engine.curves import plot_curves, table
    from dspark_serve.models.catalog import LoadError

    try:
        config = load_config({"model": model, "head": head, "method": method, "budget": "auto", "measure_again": again})
        engine = build_engine(config)
        for line in table(engine):
            print(line)
        if plot is not None:
            plot_curves(engine, plot)
            print(f"plot: {plot}")
    except (LoadError, ValueError, OSError) as error:
        _fail(error)


@app.command("check-lossless")
def check_lossless(
    url: Annotated[str, typer.Option(help="The server to check.")] = "http://127.0.0.1:8000",
    against: Annotated[
        str | None,
        typer.Option(help="A server of the same model without speculation; default: switch it off per request."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Bearer token of both.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name in the API; default: the server's first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of the compared answers.")] = 64,
    draws: Annotated[int, typer.Option(min=20, help="Samples per side of the distribution test.")] = 200,
    rejection: Annotated[bool, typer.Option(help="The server promises the distribution, not the text.")] = False,
) -> None:
    """Ask a running server with speculation on and off, and say whether its answers are the same.

    Exit code 0: lossless; 1: not, or the server could not be asked.
    """
    import asyncio

    from dspark_serve.lossless import CheckError, check

    try:
        report = asyncio.run(check(url, against, api_key, model, max_tokens, draws, rejection))
    except CheckError as error:
        _fail(error)
    for line in report.lines():
        print(line)
    raise SystemExit(0 if report.lossless else 1)


@app.command()
def bench(
    url: Annotated[str, typer.Option(help="Any OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="Bearer token.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name in the API; default: the server's first.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with OpenAI messages; default: a sample that comes along.")
    ] = None,
    input_len: Annotated[int | None, typer.Option(min=1, help="Random prompts of this many tokens instead.")] = None,
    output_len: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    ignore_eos: Annotated[
        bool | None, typer.Option(help="Answers go on to that length; default: with --input-len.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, arrivals and requests.")] = 0,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests per repeat (default: twice the concurrency, 16 at least), or with --compare "
            "per workload and arm (default: 8 pairs of turns).",
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Users who wait for their answer; default: 1, no limit with arrivals.")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Poisson arrivals per second instead of waiting users.")
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="Several concurrencies, as 1,2,4,8.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Default: 3, with --compare 1.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before anything is measured.")] = 2,
    compare: Annotated[
        bool, typer.Option("--compare", help="With and without speculation on the same requests, and the speed-up.")
    ] = False,
    retries: Annotated[int, typer.Option(min=0, help="Of a request that gets 429, 503 and the like.")] = 3,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds that a server may be silent.")] = 600.0,
    json: Annotated[Path | None, typer.Option(help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here, as PNG; needs the [train] extra.")] = None,
) -> None:
    """Measure a running server, ours or another, and print the table that vLLM's `bench serve` prints.

    Figures are medians over the repeats, with quartiles. Exit code 1: no request succeeded, or the server could not be
    asked; 0 otherwise, whatever the figures say.
    """
    import asyncio

    from dspark_serve.bench.client import BenchError
    from dspark_serve.bench.command import BenchOptions
    from dspark_serve.bench.command import bench as run

    try:
        options = BenchOptions(
            url, api_key, model, prompts, input_len, output_len, ignore_eos, temperature, seed, num_prompts,
            concurrency, request_rate, _numbers(sweep), repeats, warmup, compare, retries, timeout, json, plot,
        )  # fmt: skip
        succeeded = asyncio.run(run(options, print))
    except (BenchError, OSError) as error:
        _fail(error)
    if not succeeded:
        _fail("no request succeeded")


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help=f"{_MODEL_HELP} Fetched if need be; left out: the machine alone."),
    ] = None,
    head: Annotated[str | None, typer.Option(help="Draft head; default: the one that comes with the model.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options, as for serve.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the findings here.")] = None,
) -> None:
    """Say what will be fast here, what will not, and why: the machine, and MODEL with its head, loaded as for serve.

    Every line is ok, warn or fail, with what to do. Exit code 0: everything works, warnings or not; 1: something will
    not. Options come from the environment and the YAML file as for serve.
    """
    try:
        merged = load_config({"model": model, "head": head}, environment=os.environ, file=config)
        from dspark_serve.doctor.command import doctor as run

        works = run(merged, model is not None or head is not None, print, json)
    except (ConfigError, OSError) as error:
        _fail(error)
    raise SystemExit(0 if works else 1)


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"takes whole numbers with commas between, not {text!r}", param_hint="--sweep"
        ) from None


def _say(line: str) -> None:
    tqdm.write(f"{time.strftime('%H:%M:%S')} {line}")  # above a bar, where one is drawn
    sys.stdout.flush()


def _serve_signature() -> inspect.Signature:
    """One parameter per leaf: `--max-num-seqs` for engine.max_num_seqs. None means "not given"."""

    def parameter(name: str, annotation: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    speculative_help = 'JSON with vLLM\'s keys, e.g. \'{"method": "ngram", "num_speculative_tokens": 4}\'.'
    parameters = [
        parameter("model", Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_help("model"))]),
        parameter("config", Annotated[Path | None, typer.Option("--config", help="YAML file of options.")]),
        parameter(
            "speculative_config",
            Annotated[
                str | None,
                typer.Option("--speculative-config", help=speculative_help, rich_help_panel="speculation"),
            ],
        ),
    ]
    for section, name, info in leaves():
        if name == "model":
            continue
        flag = f"--{name.replace('_', '-')}"
        if info.annotation is bool:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        option = typer.Option(flag, help=_help(name), rich_help_panel=section, show_default=False)
        parameters.append(parameter(name, Annotated[_optional(info.annotation), option]))
    return inspect.Signature(parameters)


def _optional(kind: Any) -> Any:
    return kind | None


def _help(name: str) -> str:
    info = next(info for _, leaf, info in leaves() if leaf == name)
    default = "" if info.default is None else f" (default: {info.default})"
    return f"{info.description or ''}{default}"


# typer reads a command's options from its signature; ours is computed, so that no option can be forgotten.
serve.__signature__ = _serve_signature()  # type: ignore[attr-defined]
serve.__annotations__ = {p.name: p.annotation for p in serve.__signature__.parameters.values()}  # type: ignore[attr-defined]
app.command("serve")(serve)


if __name__ == "__main__":
    main()
