"""How requests arrive: a number of users who each wait for their answer, or a Poisson process that does not wait.

Must not know: what is asked, what the numbers mean.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dspark_serve.bench.client import Endpoint
from dspark_serve.bench.figures import Run, Sample

Bodies = Sequence[Mapping[str, Any]]
Tick = Callable[[], object]  # called after each request


async def closed_loop(endpoint: Endpoint, bodies: Bodies, concurrency: int, tick: Tick = lambda: None) -> Run:
    """`concurrency` users take the next request as soon as their last is answered; samples in the order of bodies."""
    waiting = enumerate(bodies)
    samples: dict[int, Sample] = {}

    async def user() -> None:
        for number, body in waiting:
            samples[number] = await endpoint.ask(body)
            tick()

    began_s = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(min(concurrency, len(bodies)))))
    duration_s = time.perf_counter() - began_s
    return Run(tuple(samples[number] for number in range(len(bodies))), duration_s)


def arrivals_s(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which requests of a Poisson process arrive, `rate` per second; the first at once."""
    draw = random.Random(seed)
    return list(itertools.accumulate((draw.expovariate(rate) for _ in range(count - 1)), initial=0.0))


async def poisson(
    endpoint: Endpoint, bodies: Bodies, rate: float, seed: int, most: int | None = None, tick: Tick = lambda: None
) -> Run:
    """Requests at the times of a Poisson process, at most `most` at once: the others wait, and not on the clock of
    their latency."""
    room = asyncio.Semaphore(len(bodies) if most is None else most)
    began_s = time.perf_counter()

    async def request(body: Mapping[str, Any], at_s: float) -> Sample:
        await asyncio.sleep(began_s + at_s - time.perf_counter())
        async with room:
            sample = await endpoint.ask(body)
        tick()
        return sample

    times = arrivals_s(rate, len(bodies), seed)
    samples = await asyncio.gather(*(request(body, at_s) for body, at_s in zip(bodies, times, strict=True)))
    return Run(tuple(samples), time.perf_counter() - began_s)
