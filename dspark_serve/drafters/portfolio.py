"""Several drafters together: per row and step, prompt lookup where it promises more for its cost, else the head.

The choice looks at committed tokens and past acceptance only, never at a drafted token, so it is legal in every mode.
Must not know: verification, budget, how its drafters work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_serve.drafters.base import AheadDrafter
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.ready import Ready
from dspark_serve.tensors import DraftLogits, DraftProbs, Newest, Proposal, StepBatch, Verdict
from dspark_serve.transfers import to_device
from dspark_serve.types import Row

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LOOKUP_DRAFTS = 16  # of a lookup beside a head: they cost nothing to make, and a copy that has begun often goes on
LOOKUP_SHORTEST = 3  # tokens that must have occurred before: what follows a pair, the head mostly knows better
HEAD_COST = 0.3  # time of a head's draft, in steps of the target without drafts
_DECAY = 0.98  # of old evidence, per new piece of it
_OWN = 6.0  # drafts of a request's own at which its acceptance counts as much as that of all requests
_GUESSED = 4.0  # drafts of all requests at which theirs counts as much as the first guess
_PROBE_EVERY = 16  # a lookup that lost this often in a row is tried once
_FIRST_GUESS = np.array([0.5, 0.5, 0.6, 0.7, 0.8])[:, None]  # by kind: of the head, of matches of 2, 3, 4 and 5 tokens
_HEAD, _KINDS = 0, len(_FIRST_GUESS)
_ALL = 0  # the line of all requests together
_LINES = 16  # to begin with


class Acceptance:
    """Running estimates by request, kind and slot: the probability that a draft is accepted, given those before it.

    What little is known of a request is drawn towards what is known of all, and that towards the first guess.
    """

    def __init__(self, width: int) -> None:
        self._counts: Floats = np.zeros((2, _LINES, _KINDS, width))  # tried and accepted, decayed
        self._line: dict[str, int] = {}
        self._free = list(range(_LINES - 1, _ALL, -1))
        self._usual: Floats | None = None  # rates of all requests [kinds, width], until something is recorded

    def lines(self, requests: Sequence[str]) -> Ints:
        """Where these requests are [requests]; one not seen before begins without evidence."""
        return np.array([self._line[name] if name in self._line else self._add(name) for name in requests])

    def _add(self, request: str) -> int:
        if not self._free:
            lines = self._counts.shape[1]
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)], axis=1)
            self._free = list(range(2 * lines - 1, lines - 1, -1))
        self._line[request] = self._free.pop()
        return self._line[request]

    def rates(self, lines: Ints, kinds: Ints | int) -> Floats:
        """The estimates for every slot [requests, width]; kinds [requests], or one for all."""
        if self._usual is None:
            tried, accepted = self._counts[:, _ALL]
            self._usual = (accepted + _GUESSED * _FIRST_GUESS) / (tried + _GUESSED)
        tried, accepted = self._counts[:, lines, kinds]
        rates: Floats = (accepted + _OWN * self._usual[kinds]) / (tried + _OWN)
        return rates

    def record(self, request: str, kind: int, n_kept: int, n_accepted: int) -> None:
        """n_accepted of n_kept drafts were right: every slot up to the first wrong one was tried."""
        for line in (_ALL, int(self.lines([request])[0])):
            tried, accepted = self._counts[:, line, kind, : min(n_kept, n_accepted + 1)]
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
        self._ngram, self._head, self._head_name = ngram, head, head_name
        self.acceptance = Acceptance(self.width)  # all that it has learned
        self._lost: dict[str, int] = {}  # how often a request's lookups lost since one was last used
        self._pending: list[tuple[str, int]] = []  # request and kind of each row that was to draft
        self._judged: _Judged | None = None  # what became of them, until that is needed

    def propose(self, rows: Sequence[Row], ready: Ready | None = None) -> Proposal:
        self._learn()
        found = [self._ngram.look_up(row) for row in rows]
        requests = [row.request.request_id for row in rows]
        counts = [len(drafts) for drafts, _ in found]
        if not any(counts):
            looking = [row.lookup_only for row in rows]
            if all(looking):
                self._pending = []
                return Proposal.empty(len(rows))
            if not any(looking):
                return self._all_drawn(rows, requests, ready)
        lines, kinds = self.acceptance.lines(requests), np.array([_kind(length) for _, length in found])
        chosen = kinds
        if not all(row.lookup_only for row in rows):
            chosen = self._choose(rows, lines, kinds, np.array(counts))
        self._pending = list(zip(requests, chosen.tolist(), strict=True))
        neural, looked_up = np.flatnonzero(chosen == _HEAD).tolist(), np.flatnonzero(chosen != _HEAD).tolist()
        drawn = self._head.propose([rows[index] for index in neural], ready) if neural else None
        copied = Proposal.from_lists([found[index][0] for index in looked_up], _device(drawn)) if looked_up else None
        names = tuple(self._head_name if kind == _HEAD else "ngram" for kind in chosen.tolist())
        return _merge(drawn, neural, copied, looked_up, names, self.acceptance.rates(lines, chosen))

    def _all_drawn(self, rows: Sequence[Row], requests: Sequence[str], ready: Ready | None) -> Proposal:
        """Nothing was found for any of them, and all may use the head: as nearly always, so in few words."""
        self._pending = [(request, _HEAD) for request in requests]
        drawn, names = self._head.propose(rows, ready), (self._head_name,) * len(rows)
        if drawn.confidence is not None:
            return replace(drawn, drafters=names)
        everyone = range(len(rows))
        return _merge(drawn, everyone, None, (), names, self.acceptance.rates(self.acceptance.lines(requests), _HEAD))

    def ahead(self, rows: Sequence[Row], newest: Newest) -> Proposal:
        """The head's part. Lookups need the host to know the text, and are made when it does."""
        return self._head.ahead(rows, newest)

    def _choose(self, rows: Sequence[Row], lines: Ints, kinds: Ints, counts: Ints) -> Ints:
        """Which kind drafts for each row, where a lookup of `kinds` [rows] found `counts` [rows] tokens."""
        limits = np.array([min(self._head.width, row.max_drafts) for row in rows])
        lookup = 1 + self._expected(self.acceptance.rates(lines, kinds), counts)
        head = (1 + self._expected(self.acceptance.rates(lines, _HEAD), limits)) / (1 + HEAD_COST)
        chosen = np.zeros_like(kinds)  # the head
        for index, (row, better) in enumerate(zip(rows, (lookup >= head).tolist(), strict=True)):
            request = row.request.request_id
            if row.lookup_only:
                chosen[index] = kinds[index]
            elif counts[index]:
                lost = self._lost[request] = 0 if better else self._lost.get(request, 0) + 1
                if lost % _PROBE_EVERY == 0:
                    chosen[index] = kinds[index]
        return chosen

    @staticmethod
    def _expected(rates: Floats, counts: Ints) -> Floats:
        """Drafts that will be accepted of the first counts[r] of each row [rows]."""
        survival = rates.cumprod(1)
        survival[np.arange(rates.shape[1]) >= counts[:, None]] = 0.0
        expected: Floats = survival.sum(1)
        return expected

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
        for row, choice in zip(judged.rows, judged.choices, strict=True):
            if judged.sample_lens[row] > 1:
                n_accepted = len(judged.verdict.host_tokens[row]) - 1
                self.acceptance.record(*choice, judged.sample_lens[row] - 1, n_accepted)

    def release(self, request_id: str) -> None:
        self._learn()
        self._lost.pop(request_id, None)
        self.acceptance.release(request_id)
        self._ngram.release(request_id)
        self._head.release(request_id)


@dataclass(frozen=True)
class _Judged:
    """A step's rows that were to draft: whose drafts they carried, and where the verdict on them is."""

    choices: Sequence[tuple[str, int]]  # [rows] request and kind
    rows: Sequence[int]  # [rows] of the batch
    sample_lens: Sequence[int]  # of the batch's rows
    verdict: Verdict


def _kind(length: int) -> int:
    return min(max(length, 2), 5) - 1


def _device(proposal: Proposal | None) -> torch.device:
    return torch.device("cpu") if proposal is None else proposal.tokens.device


def _merge(
    drawn: Proposal | None,
    neural: Sequence[int],
    copied: Proposal | None,
    looked_up: Sequence[int],
    names: tuple[str, ...],
    confidence: Floats,
) -> Proposal:
    """One proposal for all rows. Where the head's drafts have probabilities, those of a lookup are one-hot."""
    rows = len(names)
    width = max(part.tokens.shape[1] for part in (drawn, copied) if part is not None)
    device = _device(drawn)
    tokens = torch.full((rows, width), -1, dtype=torch.int64, device=device)
    at = [np.array(index, dtype=np.int64) for index in (neural, looked_up)]
    rates, *places = to_device(device, confidence[:, :width].astype(np.float32), *at)
    said, told_at = device, places
    if drawn is not None and drawn.largest is not None and drawn.largest.device != device:
        # Made ahead: the budget has what the head says of them on the host by now, and should find all of it there.
        said = drawn.largest.device
        rates, *told_at = to_device(said, confidence[:, :width].astype(np.float32), *at)
    largest = torch.zeros((rows, width), device=said)
    n_draft = [0] * rows
    probs = None if drawn is None else drawn.draft_probs
    if probs is not None and copied is not None:
        probs = _with_certain(probs, places[0], copied, places[1], rows, width)
    for part, index, place, told in zip((drawn, copied), (neural, looked_up), places, told_at, strict=True):
        if part is None:
            continue
        columns = part.tokens.shape[1]
        tokens[place, :columns] = part.tokens
        for row, count in zip(index, part.n_draft, strict=True):
            n_draft[row] = count
        if part.confidence is not None:
            rates[told, :columns] = part.confidence
        if part.largest is not None:
            largest[told, :columns] = part.largest
    return Proposal(tokens, tuple(n_draft), probs, rates, names, largest)


def _with_certain(
    drawn: DraftProbs, neural: Tensor, copied: Proposal, looked_up: Tensor, rows: int, width: int
) -> Tensor:
    """The head's probabilities, written out, and one-hot ones of lookups: [rows, width, vocab]."""
    drawn = drawn.probs() if isinstance(drawn, DraftLogits) else drawn
    probs = drawn.new_zeros((rows, width, drawn.shape[-1]))
    probs[neural, : drawn.shape[1]] = drawn
    certain = F.pad(copied.tokens, (0, width - copied.tokens.shape[1])).clamp(min=0)  # [lookups, width]
    probs[looked_up] = torch.zeros_like(probs[looked_up]).scatter_(-1, certain.unsqueeze(-1), 1.0)
    return probs
