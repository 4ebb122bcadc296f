"""The target writes its own training text: user turns and answers, with the hidden states of the same forwards.

User turns come from the grammar of topics.py, partly completed by the target (as in Magpie, Xu et al. 2024), or from
a file of OpenAI messages. Must not know: heads, losses.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_serve.config import load_config
from dspark_serve.engine.build import build_engine
from dspark_serve.engine.engine import Engine
from dspark_serve.reports import TokenDelta
from dspark_serve.text import Tokenizer
from dspark_serve.training.device import in_use, peak_gib
from dspark_serve.training.recorder import RecordingRunner
from dspark_serve.training.records import Conversation, Manifest, RecordReader, RecordWriter
from dspark_serve.training.target import TargetWeights
from dspark_serve.training.topics import write_turn
from dspark_serve.types import Request, SamplingParams

# (temperature, share): greedy and sampled traffic both; the head is trained on the distribution at 1 in any case.
TEMPERATURES = ((0.0, 0.40), (0.7, 0.25), (1.0, 0.35))
TURN_TEMPERATURE = 0.9
_MARK = "\x1f"  # stands for a user turn in the rendered template; no tokenizer's own text contains it
REPORT_SECONDS = 30.0
_ENDS = ".?!\n:"


@dataclass(frozen=True)
class SynthesisOptions:
    """How the target writes. Token counts are limits."""

    model: str
    layers: tuple[int, ...]  # whose outputs are kept; the target's last layer comes last
    seed: int = 0
    rows: int = 96
    max_answer_tokens: int = 200
    max_turn_tokens: int = 64
    max_prompt_tokens: int = 320
    max_bytes: int = 16 << 30  # of states on disk
    kv_cache_gib: float = 2.0
    data: Path | None = None  # JSON lines with {"messages": [...]} instead of the grammar
    device: str = "auto"  # as the server's


@dataclass(frozen=True)
class Turn:
    """What one index stands for: a conversation to be answered, or the beginning of a user turn."""

    index: int
    kind: str
    messages: tuple[dict[str, str], ...]
    is_open: bool = False
    temperature: float | None = None  # None: drawn from TEMPERATURES


@dataclass
class _Running:
    turn: Turn
    request: Request
    first_page: int = -1
    drawn: int = 0


class Synthesizer:
    """Keeps the engine full of turns and answers, and appends what is finished to a RecordWriter."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, writer: RecordWriter, options: SynthesisOptions) -> None:
        self._engine, self._tokenizer, self._writer, self._options = engine, tokenizer, writer, options
        self._runner = RecordingRunner(engine.runner, options.layers)
        engine.runner = self._runner
        self._eos = frozenset(engine.info.eos_token_ids)
        self._longest = engine.info.max_model_len
        self._running: dict[str, _Running] = {}
        self.answer_tokens = 0
        self.drawn_tokens = 0
        self.conversations = 0

    def run(self, turns: Iterator[Turn], stop: Callable[[], bool]) -> None:
        """Until the turns are used up or `stop` says so; unfinished conversations are dropped then."""
        exhausted = False
        while not stop():
            while not exhausted and len(self._running) < self._options.rows:
                turn = next(turns, None)
                if turn is None:
                    exhausted = True
                else:
                    self._start(turn)
            if not self._running:
                return
            for delta in self._engine.step().deltas:
                self._advance(delta)
            for running in self._running.values():
                if running.first_page < 0 and running.request.pages:
                    running.first_page = running.request.pages[0]

    def _start(self, turn: Turn) -> None:
        draw = random.Random(f"{self._options.seed}/{turn.index}/{turn.is_open}")
        if turn.is_open:
            before, _, _ = self._tokenizer.render_chat([{"role": "user", "content": _MARK}]).partition(_MARK)
            prompt = self._tokenizer.encode(before + turn.messages[0]["content"], add_special_tokens=False)
            params = SamplingParams(temperature=TURN_TEMPERATURE, max_tokens=self._options.max_turn_tokens)
        else:
            prompt = self._tokenizer.encode_chat(turn.messages)
            temperatures, shares = zip(*TEMPERATURES, strict=True)
            drawn = draw.choices(temperatures, weights=shares)[0]
            temperature = drawn if turn.temperature is None else turn.temperature
            params = SamplingParams(temperature=temperature, max_tokens=self._options.max_answer_tokens)
        if len(prompt) > self._options.max_prompt_tokens or len(prompt) + (params.max_tokens or 0) > self._longest:
            return
        request = Request(
            request_id=f"{turn.index}{'t' if turn.is_open else 'a'}",
            prompt_token_ids=tuple(prompt),
            params=params,
            seed=draw.getrandbits(63),
            eos_token_ids=self._eos,
        )
        self._engine.add(request)
        self._running[request.request_id] = _Running(turn, request)

    def _advance(self, delta: TokenDelta) -> None:
        self.drawn_tokens += len(delta.token_ids)
        if delta.finish_reason is None:
            return
        running = self._running.pop(delta.request_id)
        if running.first_page < 0:
            return  # ended in its first step: nothing to learn from
        states, log_totals = self._runner.collect(running.first_page)
        answer = running.request.token_ids[running.request.num_prompt :]
        finished = delta.finish_reason == "stop"
        if running.turn.is_open:
            self._answer_turn(running.turn, answer, finished)
        elif len(log_totals) == len(answer) and len(answer) > 1:
            conversation = Conversation(
                index=running.turn.index,
                kind=running.turn.kind,
                temperature=running.request.params.temperature,
                prompt=running.request.prompt_token_ids,
                answer=tuple(answer),
                seed=running.request.seed,
                finished=finished,
                log_totals=tuple(round(value, 4) for value in log_totals),
            )
            self._writer.append(conversation, states)
            self.answer_tokens += len(answer)
            self.conversations += 1

    def _answer_turn(self, turn: Turn, completion: Sequence[int], finished: bool) -> None:
        """The target has completed a user turn; a turn cut off at the cap keeps its whole sentences."""
        text = turn.messages[0]["content"] + self._tokenizer.decode(completion)
        if not finished:
            text = text[: max(text.rfind(end) for end in _ENDS) + 1]
        if text.strip():
            self._start(Turn(turn.index, turn.kind, ({"role": "user", "content": text.strip()},)))


def grammar_turns(seed: int, first: int) -> Iterator[Turn]:
    """Endless; the turn of an index does not depend on where one starts."""
    index = first
    while True:
        kind, text, is_open = write_turn(random.Random(f"{seed}/{index}"))
        yield Turn(index, kind, ({"role": "user", "content": text},), is_open)
        index += 1


def file_turns(path: Path, first: int) -> Iterator[Turn]:
    """The file's conversations up to their last user message, again and again. Raises ValueError naming a bad line."""
    prompts = list(_read_messages(path))
    if not prompts:
        raise ValueError(f"{path} holds no conversation with a user message")
    index = first
    while True:
        yield Turn(index, "data", prompts[index % len(prompts)])
        index += 1


def _read_messages(path: Path) -> Iterator[tuple[dict[str, str], ...]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            messages: Any = given["messages"] if isinstance(given, dict) else given
            plain = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is no JSON object with messages: {error}") from None
        users = [i for i, message in enumerate(plain) if message["role"] == "user"]
        if users:
            yield tuple(plain[: users[-1] + 1])


def synthesize(
    options: SynthesisOptions,
    out: Path,
    stop: Callable[[], bool],
    report: Callable[[str], None],
    max_tokens: int | None = None,
) -> int:
    """Write conversations into `out` until `stop`, or until it holds `max_tokens` answer tokens; how many it holds."""
    engine, tokenizer = recording_engine(options)
    weights = TargetWeights.load(Path(engine.info.model_dir))
    manifest = Manifest(weights.fingerprint, options.layers, weights.config.hidden_size)
    del weights
    writer = RecordWriter(out, manifest, options.max_bytes)
    known = RecordReader(out).conversations
    before = sum(len(c.answer) for c in known)
    first = max((c.index for c in known), default=-1) + 1
    turns = grammar_turns(options.seed, first) if options.data is None else file_turns(options.data, first)
    synthesizer = Synthesizer(engine, tokenizer, writer, options)
    device, began = engine.runner.model.device, time.monotonic()
    last = began
    report(f"the target writes on {device}, {engine.info.dtype}")

    def done() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last = now
            report(
                f"{synthesizer.conversations} conversations, {before + synthesizer.answer_tokens} answer tokens; "
                f"{synthesizer.answer_tokens / (now - began):.0f} answer tokens/s, "
                f"{synthesizer.drawn_tokens / (now - began):.0f} drawn/s{in_use(peak_gib(device))}"
            )
        return stop() or (max_tokens is not None and before + synthesizer.answer_tokens >= max_tokens)

    try:
        synthesizer.run(turns, done)
    finally:
        writer.close()
    return before + synthesizer.answer_tokens


def recording_engine(options: SynthesisOptions) -> tuple[Engine, Tokenizer]:
    """An engine without speculation, and the target's tokenizer. Raises ValueError when there is none."""
    config = load_config(
        {
            "model": options.model,
            "device": options.device,
            "method": "none",
            "enable_prefix_caching": False,
            "max_num_seqs": options.rows,
            "max_num_batched_tokens": max(512, 2 * options.rows),
            "kv_cache_gib": options.kv_cache_gib,
        }
    )
    engine = build_engine(config)
    tokenizer = Tokenizer.load(engine.info.model_dir)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so it cannot write its own training text")
    return engine, tokenizer
