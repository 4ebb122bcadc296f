"""What a head says and how far it is right, over held-out passages and for each way of verifying.

Must not know: how signals become probabilities, files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from dspark_serve.training.anchors import Passage
from dspark_serve.training.calibrate import Signals
from dspark_serve.training.evaluate import Drafts, draft_passage, overlap_passage
from dspark_serve.training.head import FrozenTarget, TrainableHead
from dspark_serve.training.records import Conversation

MODES = ("greedy", "rejection", "coupled")


def collect_signals(
    head: TrainableHead, passages: Iterable[tuple[Conversation, Passage]], target: FrozenTarget
) -> dict[str, Signals]:
    """By mode: "greedy" on texts at temperature 0, the other two on texts at 1. Modes without a text are left out."""
    draw = np.random.default_rng(0)
    parts: dict[str, list[Signals]] = {mode: [] for mode in MODES}
    for number, (conversation, passage) in enumerate(passages):
        if conversation.temperature == 0.0:
            drafts = draft_passage(head, passage, target)
            parts["greedy"].append(_signals(drafts, drafts.matches, number))
        elif conversation.temperature == 1.0:
            drafts, ratios = overlap_passage(head, passage, target)
            parts["rejection"].append(_signals(drafts, draw.random(ratios.shape) < ratios, number))
            if conversation.seed >= 0:
                drafts = draft_passage(head, passage, target, conversation.seed)
                parts["coupled"].append(_signals(drafts, drafts.matches, number))
    return {mode: _joined(found) for mode, found in parts.items() if found}


def _signals(drafts: Drafts, accepted: npt.NDArray[np.bool_], number: int) -> Signals:
    whole = drafts.labels[:, -1] >= 0  # the whole block lies within the text
    return Signals(
        confidence=drafts.confidence[whole].astype(np.float64),
        largest=drafts.largest[whole].astype(np.float64),
        accepted=accepted[whole],
        group=np.full(int(whole.sum()), number),
    )


def _joined(parts: Sequence[Signals]) -> Signals:
    return Signals(
        confidence=np.concatenate([p.confidence for p in parts]),
        largest=np.concatenate([p.largest for p in parts]),
        accepted=np.concatenate([p.accepted for p in parts]),
        group=np.concatenate([p.group for p in parts]),
    )


def accepted_length(signals: Signals) -> float:
    """Mean over anchors of the accepted drafts and the bonus token."""
    return 1 + float(signals.prefix.sum(1).mean())
