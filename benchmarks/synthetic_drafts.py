"""Made-up drafts for engines in virtual time: which of them the target would accept is drawn, request by request.

Must not know: what steps take, what is decided about the drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from dspark_serve.speculation.calibrate import sigmoid
from dspark_serve.tensors import Proposal
from dspark_serve.types import Row

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Of the logit of acceptance: by request, by block, by slot. With these the stated survival tells accepted prefixes from
# others with an AUC of 0.80 to 0.84 by slot, 0.845 over all (the paper: 0.81 to 0.91).
SPREAD = (0.4, 0.8, 0.8)
_SAMPLES = 4096  # blocks that there are, and from which an accepted length is computed
_WIDEST = 16


def mean_accepted(logit: float, width: int) -> float:
    """Tokens per step of full blocks, the bonus token included, where acceptance is spread around `logit`."""
    draw = np.random.default_rng(0)
    request, block = draw.normal(0, SPREAD[0], (_SAMPLES, 1)), draw.normal(0, SPREAD[1], (_SAMPLES, 1))
    slots = draw.normal(0, SPREAD[2], (_SAMPLES, width))
    return 1 + float(sigmoid(logit + request + block + slots).cumprod(1).sum(1).mean())


@cache
def logit_for(accepted_length: float, width: int) -> float:
    """The logit of acceptance, alike in all slots, at which blocks of `width` give `accepted_length`."""
    if not 1 < accepted_length < width + 1:
        raise ValueError(f"{width} drafts give between 1 and {width + 1} tokens per step, not {accepted_length}")
    low, high = -12.0, 12.0
    for _ in range(16):  # down to 4e-4
        middle = (low + high) / 2
        low, high = (middle, high) if mean_accepted(middle, width) < accepted_length else (low, middle)
    return (low + high) / 2


class SyntheticDrafts:
    """Made-up acceptance: every request is of one kind, every block and slot easier or harder than others.

    What becomes of a block depends on the request, its place in the answer and the seed alone, so that all arms face
    the same. The stated confidence is the probability that the outcome is drawn with, shifted by `bias` in logits.
    """

    def __init__(self, logits: Sequence[float], width: int, seed: int, bias: float = 0.0, costly: str = "head") -> None:
        if not 1 <= width <= _WIDEST:
            raise ValueError(f"blocks of 1 to {_WIDEST} drafts can be simulated, not of {width}")
        self.width, self.costly = width, costly
        self._bias = bias
        draw = np.random.default_rng(seed)
        blocks, requests = draw.normal(0, SPREAD[1], (_SAMPLES, 1)), draw.normal(0, SPREAD[0], _SAMPLES)
        self._slots: Floats = blocks + draw.normal(0, SPREAD[2], (_SAMPLES, _WIDEST))  # [samples, widest]
        self._luck: Floats = draw.random((_SAMPLES, _WIDEST))
        self._own = [logits[index % len(logits)] + own for index, own in enumerate(requests.tolist())]

    def propose(self, rows: Sequence[Row]) -> tuple[Proposal, Ints]:
        # Two strides without a common divisor with the number of samples: neighbours in either sense share nothing.
        place = np.array([(row.request.arrival * 9973 + row.start * 31) % _SAMPLES for row in rows])
        own = np.array([self._own[row.request.arrival % _SAMPLES] for row in rows])[:, None]
        logits = own + self._slots[place, : self.width]
        odds = sigmoid(logits)
        right = np.logical_and.accumulate(self._luck[place, : self.width] < odds, axis=1).sum(1)
        limits = tuple([min(self.width, row.max_drafts) for row in rows])
        confidence = torch.from_numpy(sigmoid(logits + self._bias) if self._bias else odds)
        return Proposal(torch.zeros(logits.shape, dtype=torch.int64), limits, confidence=confidence), right

    def release(self, request_id: str) -> None:
        pass
