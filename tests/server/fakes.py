"""A scripted engine over the real scheduler, and a byte-level tokenizer: the server's tests need no model."""

import asyncio
import threading
import time

import tiny_model
from tiny_model import EOS, VOCAB

from dspark_serve.cache.pages import PagePool
from dspark_serve.config import load_config
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.reports import EngineInfo
from dspark_serve.server.app import create_app
from dspark_serve.server.service import Service
from dspark_serve.text import Tokenizer
from dspark_serve.types import RowResult, TokenLogprobs

ANSWER = "Hello, wörld! This is a scripted answer. "
PATIENCE_S = 120.0  # nothing is decided by time; this is when to give up


def byte_tokenizer():
    """One token per byte, <eos> as 256, with a chat template."""
    return Tokenizer(tiny_model.byte_tokenizer())


class FakeEngine:
    """Says ANSWER over and over, `burst` tokens a step (the extra ones count as accepted drafts), `<eos>` at `length`.

    `delay_s` per step; `gate` (an Event) holds steps back, and closes itself behind step `hold_after`; `fail_at`
    raises in that step. What must happen before a request is at its end wants a gate: a delay is no promise.
    """

    def __init__(
        self, *, pages=256, max_model_len=512, max_queue=64, max_num_seqs=8, burst=1, length=None, delay_s=0.0,
        hold_after=None,
    ):  # fmt: skip
        self.pool = PagePool(pages + 1, 16)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=256,
            max_model_len=max_model_len,
            max_queue=max_queue,
            vocab_size=VOCAB,
            draft_width=burst - 1,
        )
        self.length, self.delay_s, self.hold_after = length, delay_s, hold_after
        self.steps = 0
        self.fail_at = None
        self.gate = threading.Event()
        self.gate.set()
        self.info = EngineInfo(
            model="fake", model_dir="", architecture="FakeForCausalLM", vocab_size=VOCAB, max_model_len=max_model_len,
            dtype="float32", device="cpu", backend="script", page_size=16, pool_tokens=pages * 16, kv_bytes=1 << 20,
            max_num_seqs=max_num_seqs, max_num_batched_tokens=256, drafter="script" if burst > 1 else "none",
            num_speculative_tokens=burst - 1, verify_mode="coupled", row_invariant=True, eos_token_ids=(EOS,),
        )  # fmt: skip

    @property
    def has_work(self):
        return self.scheduler.has_work

    def add(self, request):
        self.scheduler.add(request)

    def cancel(self, request_id):
        return self.scheduler.cancel(request_id)

    def stats(self):
        return self.scheduler.stats()

    def cost_curve(self):
        return None

    def check_integrity(self):
        self.scheduler.check_integrity()

    def token(self, request, index):
        """The token that request says at `index`, its seed deciding where in ANSWER it starts."""
        if self.length is not None and index >= self.length:
            return EOS
        script = ANSWER.encode()
        start = 0 if request.params.temperature < 0.5 else request.seed % len(script)
        return script[(start + index) % len(script)]

    def step(self):
        self.gate.wait(PATIENCE_S)
        if self.delay_s:
            time.sleep(self.delay_s)
        self.steps += 1
        if self.fail_at == self.steps:
            raise RuntimeError("scripted failure")
        plan = self.scheduler.plan()
        report = self.scheduler.commit(plan, [self._result(row) for row in plan.rows])
        if self.steps == self.hold_after:
            self.gate.clear()
        return report

    def _result(self, row):
        request = row.request
        scored = None
        if request.params.prompt_logprobs is not None and row.start + row.length <= request.num_prompt:
            targets = request.prompt_token_ids[row.start + 1 : row.start + row.length + 1]
            scored = tuple(_entry(token, request.params.prompt_logprobs) for token in targets)
        if not row.samples:
            return RowResult(prompt_logprobs=scored)
        known = request.num_generated
        tokens = tuple(self.token(request, known + i) for i in range(row.max_drafts + 1))
        n = request.params.logprobs
        logprobs = None if n is None else tuple(_entry(token, n) for token in tokens)
        return RowResult(tokens, row.max_drafts, row.max_drafts, logprobs, scored)


def _entry(token, n):
    return TokenLogprobs(token, -0.5, 1, tuple(((token + i) % VOCAB, -0.5 - i) for i in range(n)))


def make_service(engine=None, tokenizer="byte", **options):
    """A Service over a FakeEngine; options are configuration leaves."""
    engine = engine or FakeEngine()
    tokenizer = byte_tokenizer() if tokenizer == "byte" else tokenizer
    config = load_config({"model": "fake", "max_queue": engine.scheduler.max_queue, **options})
    return Service(config, lambda _: (engine, tokenizer))


def make_app(engine=None, **options):
    return create_app(make_service(engine, **options))


async def until(condition):
    """Wait for `condition()`; AssertionError when it never comes."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "what was waited for never came"
        await asyncio.sleep(0.005)


async def gate_closed(engine):
    """Wait until step `hold_after` is done: its tokens are there or on their way, and no more come."""
    await until(lambda: not engine.gate.is_set())


async def settled(service, engine):
    """Wait until nothing runs; then the engine must be whole and every page free."""
    await until(lambda: not service.engine.num_requests and not engine.has_work)
    await service.engine.call(lambda e: e.check_integrity())
    stats = await service.engine.call(lambda e: e.stats())
    assert (stats.num_running, stats.num_waiting, stats.pages_used) == (0, 0, 0)
