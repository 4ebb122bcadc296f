"""`dspark-serve check-lossless`: is a running server's speculation lossless? Asked over HTTP, as its users see it.

Two claims: the same seed gives the same tokens with speculation on and off; and tokens drawn with many seeds are
distributed alike. Must not know: engines, tensors other than a few counts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from openai import APIError, AsyncOpenAI

PROMPTS = (
    "Write a short story about a lighthouse keeper.",
    "def quicksort(items):",
    "List the planets of the solar system and one fact about each.",
    "A farmer has 17 sheep and buys 5 more, then sells 8. How many are left? Explain.",
    "Repeat this sentence three times: the quick brown fox jumps over the lazy dog.",
    "Translate to French: Good morning, how are you today?",
    "What is the difference between a list and a tuple in Python?",
    "1, 2, 3, 4, 5, 6, 7,",
)
TEMPERATURES = (0.0, 0.8, 1.2)
_DRAW_PROMPT = "The colour of the sky today is"
_DRAW_TOKENS = 4  # of each draw; the first comes from the prompt's step, the others may be drafts
_LEAST_EXPECTED = 5.0  # per cell of the chi-square test; rarer outcomes are counted together
ALPHA = 0.001  # a lossless server fails the distribution test this often


class CheckError(Exception):
    """The check could not be made; one sentence that says what to do."""


@dataclass(frozen=True)
class Report:
    """What was found. `differing` names prompts and temperatures whose tokens differ at the same seed."""

    num_compared: int
    differing: tuple[str, ...]
    p_values: tuple[float, ...]  # by position of the drawn token
    num_drafted: int | None  # drafts of all answers with speculation on; None: the server does not say
    same_seed_promised: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def distribution_equal(self) -> bool:
        return min(self.p_values) >= ALPHA / len(self.p_values)

    @property
    def lossless(self) -> bool:
        return self.distribution_equal and not (self.same_seed_promised and self.differing)

    def lines(self) -> list[str]:
        equal = self.num_compared - len(self.differing)
        promise = "" if self.same_seed_promised else " (not promised in rejection mode)"
        found = [f"same seed, same tokens: {equal} of {self.num_compared} answers{promise}"]
        found += [f"  differs: {name}" for name in self.differing[:10]]
        shown = ", ".join(f"{p:.3f}" for p in self.p_values)
        found.append(
            f"same distribution: chi-square p by position {shown} (fails below {ALPHA / len(self.p_values):.4f})"
        )
        if self.num_drafted is not None:
            found.append(f"drafted tokens in these answers: {self.num_drafted}")
        found += self.notes
        return [*found, "LOSSLESS" if self.lossless else "NOT LOSSLESS"]


@dataclass(frozen=True)
class _Answer:
    tokens: tuple[int, ...] | str  # the text where a server does not return ids
    num_drafted: int | None


class _Side:
    """One server, and what is added to every request to it."""

    def __init__(self, url: str, api_key: str | None, model: str | None, client: Any, extra: dict[str, Any]) -> None:
        base = url.rstrip("/")
        address = base if base.endswith("/v1") else f"{base}/v1"
        self.client = AsyncOpenAI(base_url=address, api_key=api_key or "none", timeout=600, http_client=client)
        self.model, self._extra = model, extra
        self._room = asyncio.Semaphore(8)

    async def name(self) -> str:
        if self.model is None:
            self.model = (await self.client.models.list()).data[0].id
        return self.model

    async def answer(self, prompt: str, temperature: float, seed: int, max_tokens: int) -> _Answer:
        async with self._room:
            got = await self.client.completions.create(
                model=await self.name(),
                prompt=prompt,
                temperature=temperature,
                seed=seed,
                max_tokens=max_tokens,
                extra_body={"ignore_eos": True, "return_token_ids": True, **self._extra},
            )
        choice, metrics = got.choices[0], (got.model_extra or {}).get("metrics") or {}
        ids = (choice.model_extra or {}).get("token_ids")
        report = metrics.get("speculative_decoding")
        return _Answer(tuple(ids) if ids else choice.text, report and int(report["num_draft_tokens"]))


async def check(
    url: str,
    against: str | None = None,
    api_key: str | None = None,
    model: str | None = None,
    max_tokens: int = 64,
    draws: int = 200,
    rejection: bool = False,
    client: Any = None,
) -> Report:
    """Compare `url` with speculation to itself without, or to `against`, a server of the same model that has none.

    rejection: the server promises the distribution only. client: the HTTP client to ask with, if not
    openai's own. Raises CheckError when a server cannot be asked.
    """
    on = _Side(url, api_key, model, client, {})
    off = _Side(against or url, api_key, model, client, {} if against else {"speculation": {"enabled": False}})
    try:
        cases = [(p, t, 1000 + i) for i, p in enumerate(PROMPTS) for t in TEMPERATURES]
        pairs = []
        for side in (on, off):
            pairs.append(await asyncio.gather(*(side.answer(p, t, seed, max_tokens) for p, t, seed in cases)))
        drawn = []
        for first, side in ((10_000, on), (20_000, off)):  # other seeds on each side: the samples are independent
            seeds = range(first, first + draws)
            drawn.append(await asyncio.gather(*(side.answer(_DRAW_PROMPT, 1.0, s, _DRAW_TOKENS) for s in seeds)))
    except APIError as error:
        raise CheckError(f"{url if against is None else f'{url} or {against}'} could not be asked: {error}") from error
    differing = [f"T={t} {p!r}" for (p, t, _), a, b in zip(cases, *pairs, strict=True) if a.tokens != b.tokens]
    counts = [answer.num_drafted for answer in pairs[0]]
    known = [count for count in counts if count is not None]
    notes = []
    if known and not sum(known):
        notes.append(
            "nothing was drafted, so the check says little: speculation is off on this server, or its budget saw no"
            " draft that pays (--budget full verifies every draft)"
        )
    p_values = tuple(
        same_distribution([a.tokens[: i + 1] for a in drawn[0]], [a.tokens[: i + 1] for a in drawn[1]])
        for i in range(_DRAW_TOKENS)
    )
    return Report(len(cases), tuple(differing), p_values, sum(known) if known else None, not rejection, tuple(notes))


def same_distribution(first: Sequence[Any], second: Sequence[Any]) -> float:
    """p-value of the two-sample chi-square test that both come from one distribution; rare outcomes are one cell."""
    a, b = Counter(first), Counter(second)
    share = len(first) / (len(first) + len(second))
    cells: list[tuple[int, int]] = []
    rare = (0, 0)
    for outcome in a | b:
        pair = (a[outcome], b[outcome])
        if min(share, 1 - share) * sum(pair) >= _LEAST_EXPECTED:
            cells.append(pair)
        else:
            rare = (rare[0] + pair[0], rare[1] + pair[1])
    cells += [rare] if sum(rare) else []
    if len(cells) < 2:
        return 1.0
    statistic = sum(
        (x - share * (x + y)) ** 2 / (share * (x + y)) + (y - (1 - share) * (x + y)) ** 2 / ((1 - share) * (x + y))
        for x, y in cells
    )
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
