"""`dspark-serve bench`: from options to requests to a table, JSON and a picture.

Must not know: HTTP, engines; a server is asked like any other.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspark_serve.bench import compare as comparing
from dspark_serve.bench.client import BenchError, Endpoint
from dspark_serve.bench.drafts import difference
from dspark_serve.bench.load import closed_loop, poisson
from dspark_serve.bench.plots import plot, plot_comparisons, require_matplotlib
from dspark_serve.bench.report import Measured, Pass, as_json, failure_lines, sweep_table, table
from dspark_serve.bench.workload import Workload, from_file, shipped, synthetic

Say = Callable[[str], object]
_FEWEST = 16  # requests per repeat, unless --num-prompts says otherwise
_PAIRS = 8  # per workload, likewise
_FEWEST_PAIRS = 2  # one has no interval


@dataclass(frozen=True)
class BenchOptions:
    """What `dspark-serve bench` was asked for; None where the default depends on the others."""

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model: str | None = None
    prompts: Path | None = None
    input_len: int | None = None
    output_len: int = 128
    ignore_eos: bool | None = None
    temperature: float = 0.0
    seed: int = 0
    num_prompts: int | None = None
    concurrency: int | None = None
    request_rate: float | None = None
    sweep: tuple[int, ...] = ()
    repeats: int | None = None
    warmup: int = 2
    compare: bool = False
    retries: int = 3
    timeout_s: float = 600.0
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.request_rate is not None and (self.sweep or self.compare):
            raise BenchError("--request-rate does not go with --sweep or --compare, which are closed loops")
        if self.sweep and self.concurrency is not None:
            raise BenchError("--sweep says the concurrencies; leave out --concurrency")
        if self.prompts is not None and self.input_len is not None:
            raise BenchError("--input-len makes its own prompts; leave out --prompts")
        if any(users < 1 for users in self.sweep):
            raise BenchError("--sweep takes concurrencies of 1 and more, as 1,2,4,8")
        for path in (self.json, self.plot):  # known before an hour of measuring, not after
            if path is not None and not path.parent.is_dir():
                raise BenchError(f"{path} cannot be written: there is no directory {path.parent}")

    @property
    def loads(self) -> tuple[int | None, ...]:
        """Most requests at once, run by run; None: no limit but the arrivals."""
        if self.sweep:
            return self.sweep
        return (self.concurrency if self.request_rate is not None else self.concurrency or 1,)

    @property
    def passes(self) -> int:
        return self.repeats or (1 if self.compare else 3)

    def pairs(self, concurrency: int) -> int:
        """Pairs of turns per workload when comparing."""
        size = comparing.turn_size(concurrency)
        once = _PAIRS if self.num_prompts is None else -(-self.num_prompts // size)
        return max(_FEWEST_PAIRS, once * self.passes)

    def requests(self, concurrency: int | None) -> int:
        """Requests per repeat, or of a comparison all in one arm."""
        if self.compare:
            return self.pairs(concurrency or 1) * comparing.turn_size(concurrency or 1)
        return self.num_prompts or max(_FEWEST, 2 * (concurrency or 0))

    @property
    def fields(self) -> dict[str, Any]:
        """Of every request that does not bring its own."""
        ignore = self.input_len is not None if self.ignore_eos is None else self.ignore_eos
        found = {"max_tokens": self.output_len, "temperature": self.temperature}
        return {**found, "ignore_eos": True} if ignore else found  # not every server knows the field


async def bench(options: BenchOptions, say: Say, client: Any = None) -> bool:
    """Run it; True when at least one request succeeded. `client`: the HTTP client to ask with, if not openai's own.

    Raises BenchError with one sentence when there is nothing to measure.
    """
    if options.plot is not None:
        require_matplotlib()
    endpoint = Endpoint(options.url, options.api_key, options.model, options.timeout_s, options.retries, client)
    try:
        await endpoint.find_model()
        workloads, notes = await _workloads(options, endpoint)
        for note in notes:
            say(note)
        await _warm(endpoint, workloads[0], options.warmup)
        run = _compare if options.compare else _measure
        return await run(options, endpoint, workloads, say)
    finally:
        if client is None:
            await endpoint.close()


async def _workloads(options: BenchOptions, endpoint: Endpoint) -> tuple[list[Workload], list[str]]:
    """What to ask, and what the reader must know about it."""
    notes: list[str] = []
    if options.input_len is not None:
        once = max(options.requests(users) for users in options.loads)
        count = once if options.compare else once * options.passes * len(options.loads)
        made, note = await synthetic(endpoint, options.input_len, count + options.warmup, options.seed)
        found, notes = [made], [note] if note else []
    else:
        found = shipped(options.seed) if options.prompts is None else from_file(options.prompts, options.seed)
    found = [workload.with_defaults(options.fields) for workload in found]
    if options.compare:
        return found, notes
    mixed = [body for turn in range(max(len(w.bodies) for w in found)) for w in found for body in w.bodies[turn:][:1]]
    total = sum(options.requests(users) * options.passes for users in options.loads) + options.warmup
    if total > len(mixed):
        notes.append(
            f"{total} requests of {len(mixed)} prompts: those that come again may be in the server's prefix cache"
        )
    return [Workload("all", tuple(mixed), options.seed)], notes


async def _warm(endpoint: Endpoint, workload: Workload, count: int) -> None:
    """Some requests that are not measured. If none of them succeeds, no other will."""
    if count:
        last = len(workload.bodies) - count  # from the end: what is asked first shall be new to the server
        run = await closed_loop(endpoint, workload.take(max(0, last), count), count)
        if not run.succeeded:
            raise BenchError(f"no warm-up request succeeded: {next(failure_lines(run.failures))}")


async def _measure(options: BenchOptions, endpoint: Endpoint, workloads: list[Workload], say: Say) -> bool:
    measured: list[Measured] = []
    first = 0
    for users in options.loads:
        passes: list[Pass] = []
        count = options.requests(users)
        with _bar(count * options.passes, f"concurrency {users}" if users else "arrivals") as bar:
            for turn in range(options.passes):
                bodies = workloads[0].take(first, count)
                first += count
                before = await endpoint.metrics()
                if options.request_rate is None:
                    run = await closed_loop(endpoint, bodies, users or 1, bar.update)
                else:
                    rate, seed = options.request_rate, options.seed + turn
                    run = await poisson(endpoint, bodies, rate, seed, users, bar.update)
                passes.append(Pass(run, difference(before, await endpoint.metrics())))
        measured.append(Measured(users, options.request_rate, tuple(passes)))
        for line in table(measured[-1]):
            say(line)
    if len(measured) > 1:
        for line in sweep_table(measured):
            say(line)
    if any(sample.counted for each in measured for one in each.passes for sample in one.run.succeeded):
        say("This server tells no usage: generated tokens are chunks, and input tokens are not known.")
    await _write(options, endpoint, "runs", [as_json(each) for each in measured], say)
    succeeded = any(each.completed for each in measured)
    if options.plot is not None and succeeded:
        plot(measured, options.plot)
        say(f"plot: {options.plot}")
    return succeeded


async def _compare(options: BenchOptions, endpoint: Endpoint, workloads: list[Workload], say: Say) -> bool:
    loads = [users or 1 for users in options.loads]
    await comparing.require_control(endpoint, workloads[0].take(0, 1)[0])
    found: list[comparing.Comparison] = []
    for users in loads:
        for workload in workloads:
            pairs = options.pairs(users)
            with _bar(2 * pairs * comparing.turn_size(users), f"{workload.name} at {users}") as bar:
                found.append(await comparing.compare(endpoint, workload, users, pairs, options.seed, bar.update))
            for line in found[-1].lines():
                say(line)
    await _write(options, endpoint, "comparisons", [each.as_json() for each in found], say)
    succeeded = any(each.on for each in found)
    if options.plot is not None and succeeded:
        plot_comparisons(found, options.plot)
        say(f"plot: {options.plot}")
    return succeeded


def _bar(total: int, title: str) -> tqdm[Any]:
    return tqdm(total=total, desc=title, unit="request", disable=None, leave=False)


async def _write(options: BenchOptions, endpoint: Endpoint, name: str, results: Sequence[Any], say: Say) -> None:
    if options.json is None:
        return
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
    asked["api_key"] = None if options.api_key is None else "***"
    document = {
        "server": {"url": endpoint.root, "model": endpoint.model, "version": await endpoint.version()},
        "client": {
            "version": version("dspark-serve"),
            "python": platform.python_version(),
            "machine": platform.platform(),
        },
        "options": asked,
        name: results,
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    say(f"json: {options.json}")
