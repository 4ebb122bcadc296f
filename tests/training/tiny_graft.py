"""A tiny random target's own text, and the options of a head that is grafted on it in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dspark_serve.training.calibrate import Signals
from dspark_serve.training.command import HeadShape, head_config
from dspark_serve.training.graft import Grafter, TrainOptions
from dspark_serve.training.passages import PassageSource
from dspark_serve.training.signals import MODES, collect_signals
from dspark_serve.training.synthesize import SynthesisOptions, synthesize
from dspark_serve.training.target import TargetWeights

SHAPE = HeadShape(layers=1, markov_rank=4, block_size=3, taps=(-1, 0), draft_vocab=64, mask_token_id=299)
TRAIN = TrainOptions(updates=6, anchors_per_passage=8, held_out=4)


def write_text(model: Path, directory: Path, max_tokens: int, device: str = "cpu") -> int:
    """Let the target write until there are `max_tokens` answer tokens in `directory`; how many there are then."""
    options = SynthesisOptions(
        str(model),
        (-1, 0, 1),
        rows=8,
        max_answer_tokens=24,
        max_turn_tokens=8,
        max_prompt_tokens=200,
        kv_cache_gib=0.01,
        device=device,
    )
    return synthesize(options, directory, lambda: False, print, max_tokens=max_tokens)


def check_states(model: Path, directory: Path, tolerance: float = 0.02) -> None:
    """That what was stored gives the target's own distribution again."""
    weights = TargetWeights.load(model)
    source = PassageSource(directory, weights, (0,))
    conversations = source.reader.conversations
    assert len({c.index for c in conversations}) == len(conversations) > 8
    for conversation in conversations[:10]:
        passage = source.load(conversation)
        logits = weights.logits(passage.last_hidden)[passage.num_prompt - 1 :]
        torch.testing.assert_close(logits.logsumexp(-1), torch.tensor(conversation.log_totals), atol=tolerance, rtol=0)
        if conversation.temperature == 0.0:
            agree = logits.argmax(-1) == torch.tensor(conversation.answer)
            assert agree.float().mean() > 0.95  # but for half precision


def opened(model: Path, written: Path, device: torch.device | str) -> tuple[PassageSource, TargetWeights]:
    """The text, and the target's weights on the device that it is read to."""
    weights = TargetWeights.load(model, SHAPE.layers, device)
    return PassageSource(written, weights, SHAPE.taps or ()), weights


def make(
    model: Path,
    written: Path,
    options: TrainOptions,
    device: torch.device | str = "cpu",
    shape: HeadShape = SHAPE,
) -> Grafter:
    source, weights = opened(model, written, device)
    return Grafter.create(options, source, weights, head_config(shape, weights, model))


def signals_of(grafter: Grafter) -> dict[str, Signals]:
    """What the head says of some texts, held out or not, in every mode."""
    passages = [(c, grafter.source.load(c)) for c in grafter.source.reader.conversations[:16]]
    found = collect_signals(grafter.head, passages, grafter.target)
    assert set(found) == set(MODES)
    return found


def assert_same_signals(one: Grafter, other: Grafter, tolerance: float) -> None:
    found, wanted = signals_of(one), signals_of(other)
    for mode, signals in found.items():
        expected = wanted[mode]
        np.testing.assert_allclose(signals.confidence, expected.confidence, atol=tolerance, err_msg=mode)
        np.testing.assert_allclose(signals.largest, expected.largest, atol=tolerance, err_msg=mode)
        assert (signals.accepted != expected.accepted).mean() <= tolerance, mode
