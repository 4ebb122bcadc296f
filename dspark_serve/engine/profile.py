"""Measures what steps and drafts cost: made-up rows on scratch pages, through the real drafter, batcher and target.

Done once per machine, model and head, then read from the cache. Must not know: text, what is decided by the times.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from dspark_serve.drafters.base import Drafter, DrafterPlan
from dspark_serve.engine.batch import Batcher
from dspark_serve.engine.remembered import digest, keep_newest, machine
from dspark_serve.engine.runner import Runner
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.models.catalog import cache_dir
from dspark_serve.reports import EngineInfo
from dspark_serve.speculation.cost import Point, Profile, load_profile, save_profile
from dspark_serve.speculation.verify import Rule, verify
from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan, Request, Row, SamplingParams

SECONDS = 7.0  # for the sweep
_PASSES = 3  # timed ones, over all shapes
_MORE_PASSES = 6  # after them, over those that were never measured while the machine was calm
_CALM = 1.25  # times as long as usual the smallest step may take just before and after a measurement that counts
_CONTEXT, _LONG = 128, 640  # tokens before a row's anchor
_DENSE = 512  # tokens of prompts from which every doubling is measured: beyond the last, times are extrapolated
_STRIDE = 61
_KEPT_FILES = 32


@dataclass(frozen=True)
class Rig:
    """The parts of an engine that a step runs through. Nobody else may use them during a sweep."""

    info: EngineInfo
    scheduler: Scheduler
    drafter: Drafter
    batcher: Batcher
    runner: Runner
    rule: Rule = verify


@dataclass(frozen=True)
class Shape:
    """A step to be measured: decoding rows with so many drafts each, or one prompt chunk."""

    rows: int
    drafts: int = 0
    context: int = _CONTEXT
    chunk: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * (self.chunk + self.drafts)

    @property
    def keys(self) -> int:
        """That the rows see."""
        return self.rows * (self.context + self.chunk)

    @property
    def draft_keys(self) -> int:
        """That the drafts see, each those of its row."""
        return self.keys * self.drafts

    @property
    def silent(self) -> int:
        """Tokens after which nothing is drawn."""
        return self.rows * self.chunk if self.chunk > 1 else 0

    def point(self, ms: float) -> Point:
        """A step of this shape that took so long."""
        return Point(self.tokens, self.rows, self.keys, ms, self.draft_keys, self.silent)


def machine_profile(
    rig: Rig, plan: DrafterPlan, head_dir: Path | None, seconds: float = SECONDS, again: bool = False
) -> Profile:
    """The profile in the cache, or a new one, which takes about `seconds` and is kept there."""
    key = profile_key(rig, plan, head_dir)
    path = cache_dir() / "profiles" / f"{digest(key)}.json"
    profile = None if again else load_profile(path, key)
    if profile is None:
        profile = sweep(rig, plan.costly, seconds)
        save_profile(path, key, profile)
        keep_newest(path.parent, _KEPT_FILES)
    else:
        with contextlib.suppress(OSError):  # a cache that is read only
            path.touch()  # the newest are kept
    return profile


def profile_key(rig: Rig, plan: DrafterPlan, head_dir: Path | None) -> dict[str, object]:
    """What a profile holds for: times measured under another key say nothing."""
    model, info = rig.runner.model, rig.info
    rows = model.embed(torch.arange(0, info.vocab_size, _STRIDE, device=model.device))
    weights = hashlib.sha256(rows.float().cpu().numpy().tobytes())
    return {
        "model": f"{info.architecture}-{weights.hexdigest()[:16]}",
        "head": "" if head_dir is None else _head_fingerprint(head_dir),
        "drafter": plan.name,
        "width": rig.drafter.width,
        "rows": rig.scheduler.max_num_seqs,
        "tokens": rig.scheduler.max_num_batched_tokens,
        "verify_mode": info.verify_mode,
        "dtype": info.dtype,
        "backend": info.backend,
        **({"graphs": info.graph_tokens} if info.graph_tokens else {}),  # not a word where there are none
        **machine(model.device),
    }


def _head_fingerprint(head_dir: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(head_dir.glob("*.json")) + sorted(head_dir.glob("*.safetensors")):
        found.update(f"{path.name} {path.stat().st_size} ".encode())
    found.update((head_dir / "config.json").read_bytes() if (head_dir / "config.json").exists() else b"")
    return found.hexdigest()[:16]


def shapes(rig: Rig) -> list[Shape]:
    """What to measure, the cheapest first. Equal token counts in different rows tell rows from tokens, and so on."""
    width, scheduler = rig.drafter.width, rig.scheduler
    pool_tokens = scheduler.pool.num_available * scheduler.pool.page_size
    context = max(0, min(_CONTEXT, scheduler.max_model_len - width - 2, pool_tokens - width - 1))
    found = [Shape(1, 0, 0)] + [Shape(1, drafts, context) for drafts in range(width + 1)]
    rows = 2
    while rows <= scheduler.max_num_seqs:
        found.append(Shape(rows, 0, context))
        rows *= 2
    found += [Shape(4, drafts, context) for drafts in sorted({1, 3, width} & set(range(1, width + 1)))]
    found += [Shape(16, 1, context), Shape(16, min(3, width), context)]
    found += [Shape(8, 0, _LONG), Shape(2, 0, _LONG)]
    found += [Shape(4, drafts, _LONG) for drafts in {1, 3, width} & set(range(1, width + 1))]
    found += _prompts(scheduler, width)

    def fits(shape: Shape) -> bool:
        length = shape.context + shape.chunk + width
        return (
            shape.rows <= scheduler.max_num_seqs
            and shape.tokens <= scheduler.max_num_batched_tokens
            and length <= scheduler.max_model_len
            and shape.rows * scheduler.pool.pages_for(length) * scheduler.pool.page_size <= pool_tokens
        )

    return sorted({shape for shape in found if fits(shape)}, key=lambda s: (s.tokens, s.rows, s.context))


def _prompts(scheduler: Scheduler, width: int) -> list[Shape]:
    """Prompt chunks up to the most tokens of a step, several at once where one row cannot be that long."""
    longest = min(scheduler.max_model_len - width, scheduler.max_prefill_chunk, scheduler.max_num_batched_tokens)
    if longest < 1:
        return []
    most, chunk = (1 << (n.bit_length() - 1) for n in (scheduler.max_num_batched_tokens, longest))  # powers of two
    counts, tokens = {most, chunk}, 32
    while tokens < most:
        counts.add(tokens)
        tokens *= 4 if tokens < _DENSE else 2
    return [Shape(max(tokens // chunk, 1), 0, 0, min(tokens, chunk)) for tokens in counts]


def sweep(rig: Rig, costly: str | None, seconds: float, clock: Callable[[], float] = time.perf_counter) -> Profile:
    """Measure as many shapes as `seconds` allow, each a few times over the whole of them, so that a slow moment hits
    many points once and not one point always. Pages come from the pool and go back; their K/V is of no use to anyone.

    Other processes take the machine away for moments that are longer than many steps. So the smallest step is timed
    between all others: what was measured while it took longer than at its best tenth does not count.
    """
    wanted, began = shapes(rig), clock()
    if not wanted:
        raise ValueError("the K/V pool holds less than a block of drafts; raise kv_cache_gib")
    found: dict[Shape, list[_Measured]] = {}
    took: dict[Shape, float] = {}  # seconds, setting up included
    per_token = 0.0
    pace_ms = _smallest_ms(rig, clock)
    with tqdm(total=seconds, desc="measuring", unit="s", disable=None, leave=False, bar_format="{l_bar}{bar}|") as bar:
        for turn in range(1 + _PASSES + _MORE_PASSES):
            for shape in wanted if turn == 0 else list(found) if turn <= _PASSES else _disturbed(found):
                spent = clock() - began
                # Not measured yet: as long as the one before it, which has no more tokens, token for token.
                expected = took.get(shape, per_token * shape.tokens)
                # The first pass, which warms up, leaves room for another.
                late = spent + expected > seconds or (turn == 0 and spent > seconds * 0.6)
                if late and len(found) > 1:
                    break  # the shapes after it take longer still
                before_ms, times = pace_ms, _measure(rig, shape, costly, clock)
                pace_ms = _smallest_ms(rig, clock)
                found.setdefault(shape, []).append(_Measured(times, max(before_ms, pace_ms)))
                took[shape] = clock() - began - spent
                per_token = took[shape] / shape.tokens
                bar.update(min(spent + took[shape], seconds) - bar.n)
    typical = _typical(found)

    def steps(which: str) -> tuple[Point, ...]:
        return tuple(shape.point(getattr(times, which)) for shape, times in typical.items())

    def drafts(which: str) -> tuple[Point, ...]:
        return tuple(Point(s.rows, s.rows, s.keys, ms) for s, t in typical.items() if (ms := getattr(t, which)) > 0)

    return Profile(steps("step"), drafts("draft"), steps("greedy_step"), drafts("greedy_draft"))


class _Times(NamedTuple):
    """Milliseconds of one shape, drawing tokens and taking the likeliest; drafts 0 where they cost nothing."""

    draft: float
    greedy_draft: float
    step: float
    greedy_step: float


class _Measured(NamedTuple):
    times: _Times
    pace_ms: float  # the smallest step just before or after, whichever took longer


def _calm_ms(found: Mapping[Shape, Sequence[_Measured]]) -> float:
    """The most that the smallest step may take: what it takes at its best tenth, and a little."""
    paces = sorted(measured.pace_ms for several in found.values() for measured in several)
    return _CALM * paces[len(paces) // 10]


def _disturbed(found: Mapping[Shape, Sequence[_Measured]]) -> list[Shape]:
    """Shapes that have never been measured in a calm moment."""
    most = _calm_ms(found)
    return [shape for shape, several in found.items() if all(measured.pace_ms > most for measured in several)]


def _typical(found: Mapping[Shape, Sequence[_Measured]]) -> dict[Shape, _Times]:
    """The median of a shape's calm times: the least would flatter short steps, which vary most. The least of all where
    none was calm, as whatever disturbs a measurement makes it longer."""
    most, disturbed = _calm_ms(found), set(_disturbed(found))
    typical = {}
    for shape, several in found.items():
        times = [each for each, pace_ms in several if pace_ms <= most or shape in disturbed]
        of = min if shape in disturbed else statistics.median_low
        typical[shape] = _Times(*(of(part) for part in zip(*times, strict=True)))
    return typical


@torch.inference_mode()
def _smallest_ms(rig: Rig, clock: Callable[[], float]) -> float:
    """One token of one row through the target."""
    rows = _rows(rig, Shape(1, 0, 0))
    try:
        batch = rig.batcher.build(Plan(tuple([row._replace(max_drafts=0) for row in rows])), Proposal.empty(0))
        start = _now(rig, clock)
        rig.runner.run(batch)
        return (_now(rig, clock) - start) * 1e3
    finally:
        rig.scheduler.pool.release(rows[0].request.pages)


@torch.inference_mode()
def _measure(rig: Rig, shape: Shape, costly: str | None, clock: Callable[[], float]) -> _Times:
    rows = _rows(rig, shape)
    drafts_cost = bool(costly) and shape.chunk == 1
    try:
        proposal, drafts = None, {0.0: 0.0, 1.0: 0.0}  # milliseconds by temperature
        for temperature in drafts if drafts_cost else ():
            rows = [_at(row, temperature) for row in rows]
            _smallest_ms(rig, clock)  # as in service, a draft finds in the caches what a step leaves there
            start = _now(rig, clock)
            proposal = rig.drafter.propose(rows)
            drafts[temperature] = (_now(rig, clock) - start) * 1e3
        if proposal is None or min(proposal.n_draft) < shape.drafts:  # a lookup finds nothing in made-up text
            proposal = Proposal.from_lists([[1] * shape.drafts] * shape.rows, rig.batcher.device)
        limited = [row._replace(max_drafts=shape.drafts) for row in rows]
        kept = proposal.trim([shape.drafts] * shape.rows) if shape.drafts else Proposal.empty(0)
        marks = [_now(rig, clock)]
        batch = rig.batcher.build(Plan(tuple(limited)), kept)
        out = rig.runner.run(batch)
        marks.append(_now(rig, clock))
        sampling = batch.sampling
        greedy = replace(sampling, all_greedy=True, temperature=torch.zeros_like(sampling.temperature))
        for each in (replace(batch, sampling=greedy), batch):
            verdict = rig.rule(out.logits, each, rig.info.verify_mode)
            verdict.to_host()
            marks.append(_now(rig, clock))
        rig.drafter.observe(batch, out.taps, verdict)
        marks.append(_now(rig, clock))
    finally:
        for row in rows:
            rig.scheduler.pool.release(row.request.pages)
            rig.drafter.release(row.request.request_id)
    forward, greedy_judged, judged, observed = ((b - a) * 1e3 for a, b in pairwise(marks))
    rest = forward + observed
    return _Times(drafts[1.0], drafts[0.0], rest + judged, rest + greedy_judged)


def _rows(rig: Rig, shape: Shape) -> list[Row]:
    """Rows of made-up tokens that never repeat in the same order."""
    width, pool, draw = rig.drafter.width, rig.scheduler.pool, random.Random(0)
    rows = []
    for index in range(shape.rows):
        params = SamplingParams(temperature=1.0)
        request = Request(f"profile-{index}", (1,), params, seed=index)
        request.token_ids = [draw.randrange(rig.info.vocab_size) for _ in range(shape.context + shape.chunk)]
        if not pool.grow(request.pages, shape.context + shape.chunk + width):
            raise AssertionError("shapes are chosen to fit the pool")
        # A chunk of a prompt gives no token and gets no drafts.
        decodes = shape.chunk == 1
        rows.append(Row(request, shape.context, shape.chunk, decodes, width if decodes else 0))
    return rows


def _at(row: Row, temperature: float) -> Row:
    """The same of a request of its own: what is known of a request's parameters holds for as long as it lives."""
    params = replace(row.request.params, temperature=temperature)
    return row._replace(request=replace(row.request, params=params))


def _now(rig: Rig, clock: Callable[[], float]) -> float:
    """When everything asked for so far is done."""
    if rig.batcher.device.type == "cuda":
        torch.cuda.synchronize(rig.batcher.device)
    return clock()
