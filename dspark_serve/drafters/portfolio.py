"""Several drafters together: per row and step, prompt lookup where it promises more for its cost, else the head.

The choice looks at committed tokens and past acceptance only, never at a drafted token, so it is legal in every mode.
Must not know: verification, budget, how its drafters work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark_serve.drafters.base import Drafter
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.tensors import Proposal, StepBatch, Verdict
from dspark_serve.types import Row

LOOKUP_DRAFTS = 10  # of a lookup beside a head: they cost nothing to make, and a copy that has begun often goes on
HEAD_COST = 0.3  # time of a head's draft, in steps of the target without drafts
_DECAY = 0.98  # of old evidence, per new piece of it
_OWN = 6.0  # drafts of a request's own at which its acceptance counts as much as that of all requests
_PROBE_EVERY = 16  # a lookup that lost this often in a row is tried once
_FIRST_GUESS = {"head": 0.5, "ngram2": 0.5, "ngram3": 0.6, "ngram4": 0.7, "ngram5": 0.8}


@dataclass
class Acceptance:
    """Running estimate per slot: the probability that a draft is accepted, given that those before it were."""

    tried: list[float] = field(default_factory=list)  # decayed counts
    accepted: list[float] = field(default_factory=list)

    def record(self, n_kept: int, n_accepted: int) -> None:
        """n_accepted of n_kept drafts were right: every slot up to the first wrong one was tried."""
        for slot in range(min(n_kept, n_accepted + 1)):
            if slot == len(self.tried):
                self.tried.append(0.0)
                self.accepted.append(0.0)
            self.tried[slot] = self.tried[slot] * _DECAY + 1
            self.accepted[slot] = self.accepted[slot] * _DECAY + (slot < n_accepted)

    def rate(self, slot: int, guess: float, weight: float) -> float:
        """The estimate for a slot, drawn towards `guess` as if that had been seen `weight` times."""
        tried, accepted = (self.tried[slot], self.accepted[slot]) if slot < len(self.tried) else (0.0, 0.0)
        return (accepted + weight * guess) / (tried + weight)


@dataclass
class _Record:
    """What one request's drafts of each kind came to, and how often its lookups lost since one was last used."""

    by_kind: dict[str, Acceptance] = field(default_factory=dict)
    lost: int = 0


@dataclass(frozen=True)
class _Choice:
    request_id: str
    kind: str  # "head", or "ngram" and the length of the match


class PortfolioDrafter:
    """A head and prompt lookup. The head observes every token, and proposes for the rows that need it only."""

    def __init__(self, ngram: NgramDrafter, head: Drafter, head_name: str, page_size: int) -> None:
        self.taps, self.width = head.taps, max(head.width, ngram.width)
        self._ngram, self._head, self._head_name, self._page_size = ngram, head, head_name, page_size
        self._overall: dict[str, Acceptance] = {}
        self._records: dict[str, _Record] = {}
        self._pending: dict[int, _Choice] = {}  # by the slot of the row's anchor, which no other row has

    def propose(self, rows: Sequence[Row]) -> Proposal:
        found = [self._ngram.look_up(row) for row in rows]
        kinds = [self._choose(row, length, len(drafts)) for row, (drafts, length) in zip(rows, found, strict=True)]
        if "head" not in kinds and not any(drafts for drafts, _ in found):
            self._pending = {}
            return Proposal.empty(len(rows))
        self._pending = {
            self._anchor_slot(row): _Choice(row.request.request_id, kind) for row, kind in zip(rows, kinds, strict=True)
        }
        neural = [index for index, kind in enumerate(kinds) if kind == "head"]
        looked_up = [index for index, kind in enumerate(kinds) if kind != "head"]
        drawn = self._head.propose([rows[index] for index in neural]) if neural else None
        copied = Proposal.from_lists([found[index][0] for index in looked_up], _device(drawn)) if looked_up else None
        names = tuple(self._head_name if kind == "head" else "ngram" for kind in kinds)
        confidence = self._confidence(rows, kinds)
        return _merge(drawn, neural, copied, looked_up, names, confidence)

    def _choose(self, row: Row, length: int, count: int) -> str:
        """Which kind drafts for a row whose last `length` tokens occurred before, and were followed by `count`."""
        if row.lookup_only:
            return _kind(length)
        if not count:
            return "head"
        record = self._records.setdefault(row.request.request_id, _Record())
        kind = _kind(length)
        lookup = 1 + sum(self._survival(record, kind, count))
        head = (1 + sum(self._survival(record, "head", min(self._head.width, row.max_drafts)))) / (1 + HEAD_COST)
        record.lost = 0 if lookup >= head else record.lost + 1
        return kind if lookup >= head or record.lost % _PROBE_EVERY == 0 else "head"

    def _survival(self, record: _Record, kind: str, count: int) -> list[float]:
        """Probability that each of `count` drafts and all before it are accepted."""
        survival, product = [], 1.0
        for rate in self._rates(record, kind, count):
            product *= rate
            survival.append(product)
        return survival

    def _rates(self, record: _Record, kind: str, count: int) -> list[float]:
        overall, own = self._overall.get(kind, Acceptance()), record.by_kind.get(kind, Acceptance())
        guess = [overall.rate(slot, _FIRST_GUESS[kind], 4.0) for slot in range(count)]
        return [own.rate(slot, guess[slot], _OWN) for slot in range(count)]

    def _confidence(self, rows: Sequence[Row], kinds: Sequence[str]) -> list[list[float]]:
        """Running acceptance of each row's kind, for drafts that come without a confidence of their own."""
        records = [self._records.get(row.request.request_id, _Record()) for row in rows]
        return [self._rates(record, kind, self.width) for record, kind in zip(records, kinds, strict=True)]

    def observe(self, batch: StepBatch, taps: Tensor | None, verdict: Verdict) -> None:
        self._head.observe(batch, taps, verdict)
        if not batch.drafts.shape[1]:
            return
        first = torch.tensor(batch.query_lens).cumsum(0) - torch.tensor(batch.query_lens)
        anchors = batch.slots[first.to(batch.slots.device)].tolist()
        for slot, samples, accepted in zip(anchors, batch.sample_lens, verdict.n_accepted.tolist(), strict=True):
            choice = self._pending.get(slot) if samples > 1 else None
            if choice is None:
                continue
            self._overall.setdefault(choice.kind, Acceptance()).record(samples - 1, accepted)
            own = self._records.setdefault(choice.request_id, _Record())
            own.by_kind.setdefault(choice.kind, Acceptance()).record(samples - 1, accepted)

    def release(self, request_id: str) -> None:
        self._records.pop(request_id, None)
        self._ngram.release(request_id)
        self._head.release(request_id)

    def _anchor_slot(self, row: Row) -> int:
        return row.request.pages[row.start // self._page_size] * self._page_size + row.start % self._page_size


def _kind(length: int) -> str:
    return f"ngram{min(max(length, 2), 5)}"


def _device(proposal: Proposal | None) -> torch.device | str:
    return "cpu" if proposal is None else proposal.tokens.device


def _merge(
    drawn: Proposal | None,
    neural: Sequence[int],
    copied: Proposal | None,
    looked_up: Sequence[int],
    names: tuple[str, ...],
    confidence: Sequence[Sequence[float]],
) -> Proposal:
    """One proposal for all rows. Where the head's drafts have probabilities, those of a lookup are one-hot."""
    rows = len(names)
    width = max(part.tokens.shape[1] for part in (drawn, copied) if part is not None)
    device = _device(drawn)
    tokens = torch.full((rows, width), -1, dtype=torch.int64, device=device)
    rates = torch.tensor([line[:width] for line in confidence], device=device).reshape(rows, width)
    largest = torch.zeros((rows, width), device=device)
    n_draft = [0] * rows
    probs = None
    if drawn is not None and drawn.draft_probs is not None:
        probs = drawn.draft_probs.new_zeros((rows, width, drawn.draft_probs.shape[-1]))
        probs[list(neural), : drawn.tokens.shape[1]] = drawn.draft_probs
    for part, index in ((drawn, neural), (copied, looked_up)):
        if part is None:
            continue
        columns = part.tokens.shape[1]
        tokens[list(index), :columns] = part.tokens
        for row, count in zip(index, part.n_draft, strict=True):
            n_draft[row] = count
        if part.confidence is not None:
            rates[list(index), :columns] = part.confidence
        if part.largest is not None:
            largest[list(index), :columns] = part.largest
    if probs is not None and copied is not None:
        certain = tokens[list(looked_up)]  # [lookups, width]
        one_hot = torch.zeros_like(probs[list(looked_up)])
        probs[list(looked_up)] = one_hot.scatter_(-1, certain.clamp(min=0).unsqueeze(-1), 1.0)
    return Proposal(tokens, tuple(n_draft), probs, rates, names, largest)
