"""The training loop: a head for a target from its recorded conversations, while more of them may be arriving.

Small updates, one thread. A checkpoint holds everything that the next update of one process depends on, so a resumed
run equals an uninterrupted one. Must not know: how the conversations were written, the command line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.training.anchors import Passage, choose_anchors
from dspark_serve.training.device import peak_gib
from dspark_serve.training.evaluate import Score, score
from dspark_serve.training.export import export_head
from dspark_serve.training.head import FrozenTarget, TrainableHead
from dspark_serve.training.parallel import ALONE, Group
from dspark_serve.training.passages import Order, PassageSource, frequent_tokens
from dspark_serve.training.progress import Rates, Watch
from dspark_serve.training.records import Conversation
from dspark_serve.training.schedule import Schedule
from dspark_serve.training.start import warm_start
from dspark_serve.training.target import TargetWeights
from dspark_serve.training.update import UpdateResult, update_loss

CHECKPOINT = "checkpoint.pt"
BEST, LAST = "best", "last"
_START_PASSAGES = 100  # for the closed-form start and the spread of the target's hidden states
_CLIP = 1.0


@dataclass(frozen=True)
class TrainOptions:
    """A run ends after `minutes` of wall time over all its processes, or after `updates`; one of them is given."""

    minutes: float | None = None
    updates: int | None = None
    seed: int = 0
    passages_per_update: int = 2
    anchors_per_passage: int = 64
    trained_tokens: int = 4096  # the LM head in training, when the head has the whole vocabulary
    checkpoint_minutes: float = 5.0
    evaluate_minutes: float = 10.0
    planted_heads: int | None = None  # heads of layer 0 that read the anchor, see plant.py; None: a third, if it fits
    held_out: int = 48  # conversations in the live evaluation
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.updates is None):
            raise ValueError("give either minutes or updates")


class Grafter:
    """A head in training, on the device of the target's weights. Make one with `create` or `resume`, then `run`."""

    def __init__(
        self,
        options: TrainOptions,
        source: PassageSource,
        weights: TargetWeights,
        head: TrainableHead,
        spread: Tensor,  # [hidden], see regression_loss
        group: Group = ALONE,
    ) -> None:
        self.options, self.source, self.weights, self.head = options, source, weights, head.to(weights.device)
        self.group = group
        self.target = FrozenTarget(weights.embedding, weights.head[head.draft_vocab].contiguous())
        self.spread = spread.to(weights.device)
        self.optimizer = torch.optim.AdamW(
            head.parameters(), lr=options.schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.order = Order()
        self.draw = np.random.default_rng(options.seed)
        self.update = 0
        self.anchors = 0
        self.elapsed_s = 0.0
        self.best = 0.0
        self.history: list[dict[str, Any]] = []

    @staticmethod
    def create(
        options: TrainOptions,
        source: PassageSource,
        weights: TargetWeights,
        config: HeadConfig,
        group: Group = ALONE,
    ) -> Grafter:
        """A new head at its starting weights. `weights` must hold the target's last config.num_layers layers."""
        torch.manual_seed(options.seed)
        size = config.draft_vocab_size or min(options.trained_tokens, config.vocab_size)
        vocab = frequent_tokens(source.training, size, config.vocab_size)
        head = TrainableHead(config, vocab)
        passages = [source.load(c) for c in source.training[:_START_PASSAGES]]
        spread = torch.cat([p.last_hidden[p.num_prompt :] for p in passages]).std(0)
        grafter = Grafter(options, source, weights, head, spread, group)
        warm_start(head, weights, grafter.target, passages, _planted_heads(options, head))
        return grafter

    @staticmethod
    def resume(
        options: TrainOptions, source: PassageSource, weights: TargetWeights, directory: Path, group: Group = ALONE
    ) -> Grafter:
        """From the checkpoint in `directory`, written on whatever device, under `options`, which may extend the run."""
        saved = torch.load(directory / CHECKPOINT, map_location="cpu", weights_only=False)
        head = TrainableHead(HeadConfig.parse(saved["config"]), saved["draft_vocab"])
        head.load_state_dict(saved["head"])
        grafter = Grafter(options, source, weights, head, saved["spread"], group)
        grafter.optimizer.load_state_dict(saved["optimizer"])  # moves it to where the weights are
        grafter.order = Order(saved["seen"], saved["queue"])
        if group.is_first:
            grafter.draw.bit_generator.state = saved["draw"]
        else:
            grafter.draw = np.random.default_rng([options.seed, group.rank, saved["update"]])
        for name in ("update", "anchors", "elapsed_s", "best", "history"):
            setattr(grafter, name, saved[name])
        return grafter

    def save(self, directory: Path) -> None:
        self.order.seen = self.group.union(self.order.seen)  # what all have seen, for whoever resumes
        if self.group.is_first:
            self.write_checkpoint(directory)

    def write_checkpoint(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".{CHECKPOINT}.partial"
        state = {
            "config": self.head.config.to_dict(),
            "draft_vocab": self.head.draft_vocab,
            "head": self.head.state_dict(),
            "spread": self.spread,
            "optimizer": self.optimizer.state_dict(),
            "seen": sorted(self.order.seen),
            "queue": self.order.queue,
            "draw": self.draw.bit_generator.state,
            **{name: getattr(self, name) for name in ("update", "anchors", "elapsed_s", "best", "history")},
        }
        torch.save(state, partial)
        os.replace(partial, directory / CHECKPOINT)

    @property
    def progress(self) -> float:
        if self.options.updates is not None:
            return self.update / self.options.updates
        assert self.options.minutes is not None
        return self.elapsed_s / (60 * self.options.minutes)

    def step(self) -> UpdateResult:
        """One update of all weights; the result's tokens and anchors are those of all processes."""
        passages = [self._next_passage() for _ in range(self.options.passages_per_update)]
        anchors = [choose_anchors(p, self.options.anchors_per_passage, self.draw) for p in passages]
        schedule, progress = self.options.schedule, self.progress
        result = update_loss(self.head, passages, anchors, self.target, schedule.weights(progress), self.spread)
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        self.group.average_gradients(self.head.parameters())
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), _CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(self.update, progress)
        self.optimizer.step()
        self.update += 1
        totals = [round(total) for total in self.group.total([result.anchors, result.tokens])]
        self.anchors += totals[0]
        return replace(result, anchors=totals[0], tokens=totals[1])

    def _next_passage(self) -> Passage:
        """A passage with at least one anchor, whose states have not been dropped meanwhile."""
        while True:
            # Each process has a share of its own, so that together they see as much text as they can.
            mine = [c for c in self.source.training if c.index % self.group.size == self.group.rank]
            if not mine:
                raise ValueError(f"there is no text for process {self.group.rank} of {self.group.size} to train on")
            conversation = self.order.next(mine, self.draw)
            try:
                passage = self.source.load(conversation)
            except FileNotFoundError:
                self.source.reader.refresh()
                continue
            if passage.num_prompt < len(passage.tokens) - 1:
                return passage

    def evaluate(self) -> Score:
        """On the first held-out conversations, the same ones every time."""
        chosen: list[Conversation] = self.source.held_out[: self.options.held_out]
        return score(self.head, ((c.temperature, self.source.load(c)) for c in chosen), self.target)

    def export(self, directory: Path, result: Score, rates: Rates) -> None:
        facts = {
            "target_fingerprint": self.weights.fingerprint,
            "expected_accepted_length": {"greedy": result.greedy, "sampled": result.sampled},
            "training": {
                "updates": self.update,
                "anchors": self.anchors,
                "conversations": len(self.order.seen),
                "hours": self.elapsed_s / 3600,
                "device": str(self.weights.device),
                "processes": self.group.size,
                **asdict(rates),
                "options": asdict(self.options),
            },
        }
        export_head(directory, self.head, self.target, self.weights.head, facts)

    def run(self, directory: Path, stop: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Until the budget is spent or `stop` says so. Keeps a checkpoint, the best head so far and the last one."""
        watch = Watch(report, self.progress) if self.group.is_first else None
        saved = evaluated = before = self.elapsed_s
        self.source.reader.refresh()  # what comes from here on was written meanwhile
        begun = time.monotonic()
        stopped, judged = self._agree(before, stop), -1
        while self.progress < 1 and not stopped:
            result = self.step()
            stopped = self._agree(before + time.monotonic() - begun, stop)
            if watch is not None:
                loss = float(result.loss.detach())
                watch.add(self.progress, self.update, loss, result.accepted_length, result.tokens, result.anchors)
            if self.elapsed_s - saved > 60 * self.options.checkpoint_minutes:
                self.save(directory)
                self._refresh(watch)
                saved = self.elapsed_s
            if self.elapsed_s - evaluated > 60 * self.options.evaluate_minutes:
                evaluated, judged = self.elapsed_s, self.update
                self._judge(directory, watch, report)
        self.save(directory)
        self._refresh(watch)
        if watch is not None:
            watch.close()
            report(f"trained on {self.weights.device}: {watch.rates(peak_gib(self.weights.device))}")
        if judged < 0 or (not stopped and judged != self.update):
            self._judge(directory, watch, report)

    def _agree(self, elapsed_s: float, stop: Callable[[], bool]) -> bool:
        """All processes read the first one's clock, and stop together if one must."""
        clock = elapsed_s if self.group.is_first else 0.0
        self.elapsed_s, stopping = self.group.total([clock, float(stop())])
        return stopping > 0

    def _refresh(self, watch: Watch | None) -> None:
        new = self.source.reader.refresh()
        if new and watch is not None:
            watch.wrote(new, sum(len(c.answer) for c in self.source.reader.conversations[-new:]))

    def _judge(self, directory: Path, watch: Watch | None, report: Callable[[str], None]) -> None:
        if watch is None:
            return
        result = self.evaluate()
        self.history.append({"update": self.update, "anchors": self.anchors, **asdict(result)})
        report(
            f"update {self.update}: held-out accepted length {result.greedy:.3f} greedy, {result.sampled:.3f} sampled; "
            f"by slot {' '.join(f'{a:.2f}' for a in result.by_slot)}"
        )
        rates = watch.rates(peak_gib(self.weights.device))
        self.export(directory / LAST, result, rates)
        if result.greedy + result.sampled > self.best:
            self.best = result.greedy + result.sampled
            self.export(directory / BEST, result, rates)


def _planted_heads(options: TrainOptions, head: TrainableHead) -> int:
    """Planting needs a key/value head per head, and heads on both sides."""
    if options.planted_heads is not None:
        return options.planted_heads
    return head.config.heads // 3 if head.config.kv_heads == head.config.heads else 0
