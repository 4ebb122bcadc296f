"""Does a draft head earn its keep? A few prompts through target and head at load; compared with what it should reach.

A low figure mostly means that the head was made for other weights. The one file of the engine that knows text.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from dspark_serve.engine.engine import Engine
from dspark_serve.text import Tokenizer
from dspark_serve.types import Request, SamplingParams

WORTHLESS = 1.05  # accepted tokens per step below which drafting is switched off
_FAR_BELOW = 0.7  # of the stored value
_MAX_TOKENS = 24
_PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A shop sells 3 apples for 2 dollars. How much do 12 apples cost? Think step by step.",
    "List five things to take on a hike.",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelfTest:
    measured: float  # accepted tokens per step, the bonus token included
    expected: float | None  # stored with the head, greedy
    num_steps: int

    @property
    def worthless(self) -> bool:
        return self.num_steps > 0 and self.measured < WORTHLESS

    def warnings(self, head: str, insisted: bool) -> tuple[str, ...]:
        """What the operator must know, one sentence each; `insisted`: the budget drafts whatever comes of it."""
        found = f"the head {head} reaches {self.measured:.2f} accepted tokens per step in the self-test"
        if self.worthless:
            outcome = "drafting goes on because the budget insists" if insisted else "serving without speculation"
            return (f"{found}, below {WORTHLESS}; {outcome}. Is it a head for other weights?",)
        if self.expected is not None and self.measured < 1 + _FAR_BELOW * (self.expected - 1):
            return (f"{found}, far below the {self.expected:.2f} stored with it. Is it a head for other weights?",)
        return ()


def run_self_test(engine: Engine, head_dir: Path) -> SelfTest:
    """Answer the prompts greedily with every draft verified. The engine must be idle, and is idle afterwards.

    Raises what the target raises when its layers cannot be tapped.
    """
    for index, prompt in enumerate(_prompts(engine)):
        room = engine.info.max_model_len - len(prompt)
        if room < 2:
            continue
        params = SamplingParams(temperature=0.0, max_tokens=min(_MAX_TOKENS, room), ignore_eos=True)
        engine.add(Request(f"self-test-{index}", prompt, params, seed=index))
    steps = accepted = 0
    while engine.has_work:
        for row in engine.step().rows:
            if row.n_kept and row.drafter != "ngram":  # of a portfolio, the head's part
                steps += 1
                accepted += row.n_accepted
    measured = 1 + accepted / steps if steps else 1.0
    logger.info("self-test of the head: %.2f accepted tokens per step over %d steps", measured, steps)
    return SelfTest(measured, expected_length(head_dir), steps)


def expected_length(head_dir: Path) -> float | None:
    """The greedy accepted length that dspark.json beside the head promises; None where nothing is promised."""
    try:
        stored = json.loads((head_dir / "dspark.json").read_text(encoding="utf-8"))["expected_accepted_length"]
        return float(stored["greedy"] if isinstance(stored, dict) else stored)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prompts(engine: Engine) -> list[tuple[int, ...]]:
    """The prompts in the model's tokens, as chat where it has a template; without a tokenizer, some token ids."""
    tokenizer = Tokenizer.load(engine.info.model_dir) if engine.info.model_dir else None
    if tokenizer is None:
        vocab = engine.info.vocab_size
        return [tuple((7 * i + 31 * j) % vocab for j in range(8)) for i in range(len(_PROMPTS))]
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": prompt}] for prompt in _PROMPTS]
        return [tuple(tokenizer.encode_chat(chat, add_generation_prompt=True)) for chat in chats]
    return [tuple(tokenizer.encode(prompt)) for prompt in _PROMPTS]
