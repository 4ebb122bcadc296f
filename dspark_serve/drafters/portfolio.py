"""Several drafters together: per row and step, prompt lookup where it promises more for its cost, else the head.

The choice looks at committed tokens and past acceptance only, never at a drafted token, so it is legal in every mode.
Must not know: verification, budget, how its drafters work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_serve.drafters.base import AheadDrafter
from dspark_serve.drafters.copies import Copies
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.ready import Ready
from dspark_serve.tensors import DraftLogits, DraftProbs, Newest, Proposal, StepBatch, Verdict
from dspark_serve.transfers import to_device
from dspark_serve.types import LOOKUP, Row

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LOOKUP_DRAFTS = 16  # of a lookup beside a head: they cost nothing to make, and a copy that has begun often goes on
LOOKUP_SHORTEST = 3  # tokens that must have occurred before: what follows a pair, the head mostly knows better
HEAD_COST = 0.3  # time of a head's draft, in steps of the target without drafts
_DECAY = 0.98  # of old evidence, per new piece of it
_OWN = 6.0  # drafts of a request's own at which its acceptance counts as much as that of all requests
_GUESSED = 4.0  # drafts of all requests at which theirs counts as much as the first guess
_FIRST_GUESS = 0.5
_ALL = 0  # the line of all requests together
_LINES = 16  # to begin with


class Acceptance:
    """Running estimates of the head's drafts by request and slot: the probability that one is accepted, given those
    before it.

    What little is known of a request is drawn towards what is known of all, and that towards the first guess.
    """

    def __init__(self, width: int) -> None:
        self._counts: Floats = np.zeros((2, _LINES, width))  # tried and accepted, decayed
        self._line: dict[str, int] = {}
        self._free = list(range(_LINES - 1, _ALL, -1))
        self._usual: Floats | None = None  # rates of all requests [width], until something is recorded

    def _lines(self, requests: Sequence[str]) -> Ints:
        """Where these requests are [requests]; one not seen before begins without evidence."""
        return np.array([self._line[name] if name in self._line else self._add(name) for name in requests])

    def _add(self, request: str) -> int:
        if not self._free:
            lines = self._counts.shape[1]
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)], axis=1)
            self._free = list(range(2 * lines - 1, lines - 1, -1))
        self._line[request] = self._free.pop()
        return self._line[request]

    def rates(self, requests: Sequence[str]) -> Floats:
        """The estimates for every slot [requests, width]."""
        if self._usual is None:
            tried, accepted = self._counts[:, _ALL]
            self._usual = (accepted + _GUESSED * _FIRST_GUESS) / (tried + _GUESSED)
        lines = self._lines(requests)  # may replace the counts
        tried, accepted = self._counts[:, lines]
        rates: Floats = (accepted + _OWN * self._usual) / (tried + _OWN)
        return rates

    def record(self, request: str, n_kept: int, n_accepted: int) -> None:
        """n_accepted of n_kept drafts were right: every slot up to the first wrong one was tried."""
        for line in (_ALL, int(self._lines([request])[0])):
            tried, accepted = self._counts[:, line, : min(n_kept, n_accepted + 1)]
            tried *= _DECAY
            tried += 1
            accepted *= _DECAY
            accepted[:n_accepted] += 1
        self._usual = None

    def release(self, request: str) -> None:
        line = self._line.pop(request, None)
        if line is not None:
            self._counts[:, line] = 0.0
            self._free.append(line)


class PortfolioDrafter:
    """A head and prompt lookup. The head observes every token, and proposes for the rows that need it only."""

    def __init__(self, ngram: NgramDrafter, head: AheadDrafter, head_name: str) -> None:
        self.taps, self.width = head.taps, max(head.width, ngram.width)
        self._ngram = ngram
        self._head, self._head_name = head, head_name
        self.acceptance = Acceptance(head.width)  # of the head's drafts, as far as they were verified
        self._pending: list[str | None] = []  # the request of each row that was to draft with the head, in their order
        self._judged: _Judged | None = None  # what became of them, until that is needed

    @property
    def copies(self) -> Copies:
        """All that is known of what texts copy."""
        return self._ngram.copies

    def take_over(self, acceptance: Acceptance, copies: Copies) -> None:
        """What another one has learned, of the same head; it is not to be used any more."""
        self.acceptance, self._ngram.copies = acceptance, copies

    def propose(self, rows: Sequence[Row], ready: Ready | None = None) -> Proposal:
        self._learn()
        copied = [self._ngram.look_up(row) for row in rows]
        chances = [self._ngram.chances(row) for row in rows]
        requests = [row.request.request_id for row in rows]
        looks = [row.lookup_only for row in rows]
        if any(copied) and not all(looks):
            looks = self._better_copied(rows, requests, chances)
        self._pending = [None if look else request for request, look in zip(requests, looks, strict=True)]
        if not any(looks):
            return self._drawn(rows, requests, ready)
        neural = [index for index, look in enumerate(looks) if not look]
        found = Proposal.from_lists(
            [drafts if look else () for drafts, look in zip(copied, looks, strict=True)],
            confidence=[mine if look else () for mine, look in zip(chances, looks, strict=True)],
        )
        if not neural:
            return replace(found, drafters=(LOOKUP,) * len(rows))
        drawn = self._drawn([rows[index] for index in neural], [requests[index] for index in neural], ready)
        return _merge(drawn, neural, found, self._head_name)

    def _drawn(self, rows: Sequence[Row], requests: Sequence[str], ready: Ready | None) -> Proposal:
        """The head's drafts, with what is known of their acceptance where it says nothing itself."""
        drawn = replace(self._head.propose(rows, ready), drafters=(self._head_name,) * len(rows))
        if drawn.confidence is not None:
            return drawn
        where = drawn.tokens.device if drawn.largest is None else drawn.largest.device
        (rates,) = to_device(where, self.acceptance.rates(requests).astype(np.float32))
        return replace(drawn, confidence=rates[:, : drawn.tokens.shape[1]])

    def ahead(self, rows: Sequence[Row], newest: Newest) -> Proposal:
        """The head's part. Lookups need the host to know the text, and are made when it does."""
        return self._head.ahead(rows, newest)

    def _better_copied(
        self, rows: Sequence[Row], requests: Sequence[str], chances: Sequence[Sequence[float]]
    ) -> list[bool]:
        """Of which rows the lookup promises more for its cost than a pass of the head would."""
        limits = np.array([min(self._head.width, row.max_drafts) for row in rows])
        survival = self.acceptance.rates(requests).cumprod(1)
        survival[np.arange(survival.shape[1]) >= limits[:, None]] = 0.0
        head = ((1 + survival.sum(1)) / (1 + HEAD_COST)).tolist()
        lookup = [1 + sum(accumulate(mine, mul)) for mine in chances]
        return [
            row.lookup_only or (bool(mine) and copy >= draw)
            for row, mine, copy, draw in zip(rows, chances, lookup, head, strict=True)
        ]

    def observe(self, batch: StepBatch, taps: Tensor | None, verdict: Verdict) -> None:
        self._head.observe(batch, taps, verdict)
        pending, self._pending = self._pending, []
        if pending and batch.drafts.shape[1]:
            self._judged = _Judged(pending, batch.drafting, batch.sample_lens, verdict)

    def _learn(self) -> None:
        """From the last step, once its tokens are on the host: asked for within `observe`, they would be waited for
        before the drafts that are made ahead are."""
        judged, self._judged = self._judged, None
        if judged is None:
            return
        for row, request in zip(judged.rows, judged.requests, strict=True):
            if request is not None and judged.sample_lens[row] > 1:
                n_accepted = len(judged.verdict.host_tokens[row]) - 1
                self.acceptance.record(request, judged.sample_lens[row] - 1, n_accepted)

    def release(self, request_id: str) -> None:
        self._learn()
        self.acceptance.release(request_id)
        self._ngram.release(request_id)
        self._head.release(request_id)


@dataclass(frozen=True)
class _Judged:
    """A step's rows that were to draft, and where the verdict on them is."""

    requests: Sequence[str | None]  # [rows] None of those that looked up
    rows: Sequence[int]  # [rows] of the batch
    sample_lens: Sequence[int]  # of the batch's rows
    verdict: Verdict


def _merge(drawn: Proposal, neural: Sequence[int], found: Proposal, head_name: str) -> Proposal:
    """The head's drafts for rows `neural`, and what was found for the others, on the host. Where the head's drafts have
    probabilities, those of a lookup are one-hot."""
    rows, size, columns = len(found.n_draft), found.tokens.shape[1], drawn.tokens.shape[1]
    device, said = drawn.tokens.device, drawn.tokens.device
    if drawn.largest is not None:
        # Made ahead: the budget has what the head says of them on the host by now, and should find all of it there.
        said = drawn.largest.device
    others = [index for index in range(rows) if index not in set(neural)]
    assert found.confidence is not None
    wide = ((0, 0), (0, max(columns - size, 0)))
    tables = np.pad(found.tokens.numpy(), wide, constant_values=-1), np.pad(found.confidence.numpy(), wide)
    tokens, confidence, place, rest = to_device(device, *tables, np.array(neural), np.array(others))
    told = place
    if said != device:
        confidence, told = torch.from_numpy(tables[1]), torch.from_numpy(np.array(neural))
    tokens[place, :columns] = drawn.tokens
    assert drawn.confidence is not None
    confidence[told, :columns] = drawn.confidence
    largest = torch.zeros_like(confidence)
    if drawn.largest is not None:
        largest[told, :columns] = drawn.largest
    n_draft, names = list(found.n_draft), [LOOKUP] * rows
    for row, count in zip(neural, drawn.n_draft, strict=True):
        n_draft[row], names[row] = count, head_name
    probs = drawn.draft_probs
    if probs is not None:
        probs = _with_certain(probs, place, tokens, rest)
    return Proposal(tokens, tuple(n_draft), probs, confidence, tuple(names), largest)


def _with_certain(drawn: DraftProbs, neural: Tensor, tokens: Tensor, others: Tensor) -> Tensor:
    """The head's probabilities, written out, and one-hot ones of the other rows of tokens: [rows, width, vocab]."""
    drawn = drawn.probs() if isinstance(drawn, DraftLogits) else drawn
    probs = drawn.new_zeros((*tokens.shape, drawn.shape[-1]))
    probs[neural, : drawn.shape[1]] = drawn
    certain = tokens[others].clamp(min=0)  # [others, width]
    probs[others] = torch.zeros_like(probs[others]).scatter_(-1, certain.unsqueeze(-1), 1.0)
    return probs
