"""What is asked: the prompts that come with the package, a file of conversations, or synthetic ones of given lengths.

Must not know: when requests are sent, what comes back.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dspark_serve.bench.client import BenchError, Endpoint

SHIPPED = Path(__file__).with_name("prompts.jsonl")  # public evaluation sets; where from: benchmarks/README.md
_OURS = ("model", "stream", "stream_options", "n")  # what the benchmark decides, whatever a recorded request says
_TRIAL_WORDS = 100  # of the request that shows how many tokens a word has


@dataclass(frozen=True)
class Workload:
    """Request bodies of one kind, sent in order and over again; `seed` counts on from request to request."""

    name: str
    bodies: tuple[Mapping[str, Any], ...]
    seed: int = 0

    def take(self, first: int, count: int) -> list[dict[str, Any]]:
        """The bodies of requests first to first + count, each with its seed."""
        numbers = range(first, first + count)
        return [{"seed": self.seed + n, **self.bodies[n % len(self.bodies)]} for n in numbers]

    def with_defaults(self, defaults: Mapping[str, Any]) -> Workload:
        """With fields for those requests that do not bring their own."""
        limited = {key: value for key, value in defaults.items() if key != "max_tokens"}
        return replace(
            self,
            bodies=tuple(
                {**(limited if "max_completion_tokens" in body else defaults), **body} for body in self.bodies
            ),
        )


def shortened(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request for one token."""
    return {**{key: value for key, value in body.items() if key != "max_completion_tokens"}, "max_tokens": 1}


def shipped(seed: int = 0) -> list[Workload]:
    """The sample of public evaluation sets in this package, one workload per set."""
    return from_file(SHIPPED, seed)


def from_file(path: Path, seed: int = 0) -> list[Workload]:
    """JSON lines with OpenAI `messages`, other fields of a request as they are, and perhaps `workload`: a name to
    report under. Also `source` and `turns`, of which the first is asked. Raises BenchError naming the wrong line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from None
    return _parse(text, str(path), path.stem, seed)


def _parse(text: str, source: str, name: str, seed: int) -> list[Workload]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            workload, body = _body(line, f"{source}, line {number}", name)
            found.setdefault(workload, []).append(body)
    if not found:
        raise BenchError(f"{source} holds no conversation; each line must be a JSON object with `messages`")
    return [Workload(workload, tuple(bodies), seed) for workload, bodies in found.items()]


def _body(line: str, where: str, name: str) -> tuple[str, Mapping[str, Any]]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise BenchError(f"{where} is not JSON: {error}") from None
    if isinstance(fields, dict) and fields.get("turns"):  # as evaluation sets come: what the user says, turn by turn
        fields = {"workload": fields.get("source", name), "messages": [{"role": "user", "content": fields["turns"][0]}]}
    messages = fields.get("messages") if isinstance(fields, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise BenchError(f"{where} must be an object with `messages`: a list of {{role, content}}, as OpenAI's")
    workload = str(fields.pop("workload", name))
    return workload, {key: value for key, value in fields.items() if key not in _OURS}


async def synthetic(endpoint: Endpoint, input_len: int, count: int, seed: int = 0) -> tuple[Workload, str | None]:
    """`count` prompts of random words, `input_len` tokens each, and a note where the length is not exact.

    Exact where the server has /tokenize; else as many words as a trial request suggests.
    """
    known: set[str] = set()
    for workload in shipped():
        known |= {word for body in workload.bodies for m in body["messages"] for word in m["content"].split()}
    words, draw = sorted(known), random.Random(seed)
    name = f"random-{input_len}"

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    prompts: list[Any] = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < input_len:  # every word has a token or more, so mostly once
            more = await endpoint.tokenize(text(input_len))
            if not more:
                break
            ids += more
        if len(ids) < input_len:
            break
        prompts.append(ids[:input_len])
    if len(prompts) == count:
        return Workload(name, tuple({"prompt": prompt} for prompt in prompts), seed), None
    trial = await endpoint.ask({"prompt": text(_TRIAL_WORDS), "max_tokens": 1})
    if trial.error is not None or not trial.num_input:
        raise BenchError(
            "prompts of a given length need /tokenize or usage in answers, and this server has neither: "
            + (trial.error or "it tells no usage")
        )
    length = max(1, round(input_len * _TRIAL_WORDS / trial.num_input))
    bodies = tuple({"prompt": text(length)} for _ in range(count))
    return Workload(name, bodies, seed), "this server has no /tokenize: prompt lengths are approximate"
