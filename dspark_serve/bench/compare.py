"""Does speculation help this traffic? The same requests with and without it, side by side on one server.

A pair is two turns of a closed loop with the same requests and seeds, one right after the other, and which comes first
alternates: what the machine does to one it does to the other. Must not know: how a server speculates.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dspark_serve.bench.client import BenchError, Endpoint
from dspark_serve.bench.drafts import Drafts, difference
from dspark_serve.bench.figures import Ratio, Run, speed_up
from dspark_serve.bench.load import Tick, closed_loop
from dspark_serve.bench.report import drafts_json, failure_lines
from dspark_serve.bench.workload import Workload, shortened

ON, OFF = True, False
Turn = tuple[int, float]  # tokens, seconds
_APART = 1.15  # a median pair and a whole that differ by more are worth a line
_FEWEST_PAIRS = 6  # for a verdict: of fewer a bootstrap draws too few different means, and its interval is too narrow


@dataclass(frozen=True)
class Comparison:
    """One workload at one concurrency. ratio: tokens per second with speculation over those without; None when fewer
    than two pairs went through. drafts: what the server says it drafted in each arm; None: it does not say."""

    workload: str
    concurrency: int
    on: tuple[Turn, ...]
    off: tuple[Turn, ...]
    ratio: Ratio | None
    num_compared: int
    num_identical: int
    drafts: dict[bool, Drafts | None]
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "nothing can be said: fewer than two pairs went through"
        if len(self.on) < _FEWEST_PAIRS:
            return f"no verdict on {len(self.on)} pairs; {_FEWEST_PAIRS} are needed (--num-prompts, --repeats)"
        if self.ratio.low > 1:
            return "speculation helps"
        return "speculation costs" if self.ratio.high < 1 else "no difference that can be told from noise"

    def lines(self) -> Iterator[str]:
        yield f"{self.workload}, concurrency {self.concurrency}: {self.verdict}"
        if self.ratio is not None:
            ratio = self.ratio
            on_rate, off_rate = (sum(t for t, _ in arm) / sum(s for _, s in arm) for arm in (self.on, self.off))
            yield (
                f"  speed-up {ratio.value:.3f} (95 % interval {ratio.low:.3f} to {ratio.high:.3f}), "
                f"{on_rate:.1f} against {off_rate:.1f} tok/s over {len(self.on)} pairs"
            )
            apart = ratio.median_pair / ratio.value
            if max(apart, 1 / apart) > _APART:
                yield f"  the median pair says {ratio.median_pair:.3f}: some turns were disturbed, or requests differ"
        yield f"  texts with equal seeds: {self.num_identical} of {self.num_compared} identical"
        on, off = self.drafts[ON], self.drafts[OFF]
        if on is not None and not on.draft_tokens:
            yield "  nothing was drafted: this server has no drafter, or its budget saw no draft that pays"
        elif on is not None:
            yield f"  acceptance rate {100 * on.acceptance_rate:.1f} %, acceptance length {on.acceptance_length:.2f}"
        if off is not None and off.draft_tokens:
            yield f"  {off.draft_tokens} tokens were drafted in turns that asked for none: is there other traffic?"
        yield from (f"  {line}" for line in failure_lines(self.failures))

    def as_json(self) -> dict[str, Any]:
        ratio, on = self.ratio, self.drafts[ON]
        return {
            "workload": self.workload,
            "max_concurrency": self.concurrency,
            "verdict": self.verdict,
            "speed_up": None if ratio is None else asdict(ratio),
            "turns": {"on": self.on, "off": self.off},  # [tokens, seconds] each
            "texts_compared": self.num_compared,
            "texts_identical": self.num_identical,
            "speculation": None if on is None or not on.draft_tokens else drafts_json(on),
            "errors": dict(self.failures),
        }


async def require_control(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """Raises BenchError unless the server obeys `speculation: {"enabled": bool}` in a request.

    Most servers ignore fields that they do not know. One that knows this field refuses nonsense in it.
    """
    short = shortened(body)
    good = await endpoint.ask({**short, "speculation": {"enabled": False}})
    if good.error is not None:
        raise BenchError(f"{endpoint.root} did not answer a request without speculation: {good.error}")
    bad = await endpoint.ask({**short, "speculation": {"enabled": "perhaps"}})
    if bad.status not in (400, 422):
        raise BenchError(
            f"{endpoint.root} cannot switch speculation per request (the field `speculation` of dspark-serve): nothing "
            "to compare; start that server with speculation and without, and run bench on each"
        )


async def compare(
    endpoint: Endpoint, workload: Workload, concurrency: int, pairs: int, seed: int, tick: Tick = lambda: None
) -> Comparison:
    """`pairs` pairs of turns: single requests for one user, else twice as many as users."""
    size = turn_size(concurrency)
    turns: dict[bool, list[Turn]] = {ON: [], OFF: []}
    drafts: dict[bool, list[Drafts | None]] = {ON: [], OFF: []}
    failures: Counter[str] = Counter()
    compared = identical = 0
    for pair in range(pairs):
        bodies = workload.take(pair * size, size)
        # Prompts into the prefix cache first, or the turn that comes first would fill it for the other.
        await closed_loop(endpoint, [shortened(body) for body in bodies], concurrency)
        runs: dict[bool, Run] = {}
        for arm in (ON, OFF) if pair % 2 == 0 else (OFF, ON):
            before = await endpoint.metrics()
            wanted = [{**body, "speculation": {"enabled": arm}} for body in bodies]
            runs[arm] = await closed_loop(endpoint, wanted, concurrency, tick)
            drafts[arm].append(difference(before, await endpoint.metrics()))
            failures += runs[arm].failures
        both = list(zip(runs[ON].samples, runs[OFF].samples, strict=True))
        texts = [(a.text, b.text) for a, b in both if a.error is None and b.error is None]
        compared += len(texts)
        identical += sum(a == b for a, b in texts)
        same_work = all((a.error is None) == (b.error is None) for a, b in both)
        if same_work and all(run.output_tokens for run in runs.values()):
            for arm, run in runs.items():
                turns[arm].append((run.output_tokens, run.duration_s))
    return Comparison(
        workload.name,
        concurrency,
        on=tuple(turns[ON]),
        off=tuple(turns[OFF]),
        ratio=speed_up(turns[ON], turns[OFF], seed) if len(turns[ON]) > 1 else None,
        num_compared=compared,
        num_identical=identical,
        drafts={arm: _sum(counts) for arm, counts in drafts.items()},
        failures=failures,
    )


def _sum(counts: list[Drafts | None]) -> Drafts | None:
    known = [each for each in counts if each is not None]
    return functools.reduce(Drafts.plus, known, Drafts()) if len(known) == len(counts) else None


def turn_size(concurrency: int) -> int:
    """Requests per turn: for one user a turn is one request; more users need some that follow each other."""
    return 1 if concurrency == 1 else 2 * concurrency
