"""Rows of a plan as tensors for a neural drafter, and its tokens as a Proposal: drawing with the target's own noise.

In coupled mode a draft is drawn exactly as the target draws: same temperature and filters, same noise at the same
address; penalties and logit_bias are left out. Must not know: networks, verification.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dspark_kernels import noise
from dspark_serve.sampling import Support, argmax, draw, draw_logits, target_probs, target_support
from dspark_serve.tensors import Newest, Proposal, SamplingBatch, StepBatch, Verdict
from dspark_serve.transfers import to_device
from dspark_serve.types import Request, Row, VerifyMode, signed_seed

_KEY_MULTIPLE = 32  # context is padded to this: fewer shapes, and the same bits for neighbouring lengths


@dataclass(frozen=True)
class DraftRows:
    """Decode rows that want drafts. Positions 0..start-1 have draft K/V in the store, `start` is the anchor's."""

    anchors: Tensor  # [rows] int64
    start: Tensor  # [rows] int64
    pages: Tensor  # [rows, max_pages] int64, padded with 0
    page_size: int
    counts: tuple[int, ...]  # [rows] drafts wanted
    longest: int  # context of the longest row, or more
    sampling: SamplingBatch  # one sample per row, at the position of the first draft

    @staticmethod
    def build(
        rows: Sequence[Row], page_size: int, width: int, device: torch.device | str, newest: Newest | None = None
    ) -> DraftRows:
        """newest: the rows' anchors where the device alone knows them; rows[r].start is the last place possible."""
        start = np.array([row.start for row in rows], dtype=np.int64)
        longest = int(start.max())
        pages = np.zeros((len(rows), DraftRows.width(longest, page_size)), dtype=np.int64)
        for line, row in zip(pages, rows, strict=True):
            count = -(-row.start // page_size)
            line[:count] = row.request.pages[:count]
        known = [row.request.token_ids[row.start] for row in rows] if newest is None else []
        anchors = np.array(known, dtype=np.int64)
        table, there, begin, position = to_device(torch.device(device), pages, anchors, start, start + 1)
        if newest is not None:
            there, begin, position = newest.anchors, newest.start, newest.start + 1
        return DraftRows(
            anchors=there,
            start=begin,
            pages=table,
            page_size=page_size,
            counts=tuple([min(width, row.max_drafts) for row in rows]),
            longest=longest,
            sampling=replace(_sampling(tuple([row.request for row in rows]), device), position=position),
        )

    @staticmethod
    def width(longest: int, page_size: int) -> int:
        """Pages per row where the longest row's context has so many tokens."""
        return -(-_padded(longest) // page_size)

    def context(self) -> tuple[Tensor, Tensor]:
        """Slot of each context position [rows, keys] int64, and which of them a row has [rows, keys] bool."""
        position = torch.arange(_padded(self.longest), device=self.pages.device)
        slots = self.pages[:, position // self.page_size] * self.page_size + position % self.page_size
        return slots, position < self.start.unsqueeze(1)


@functools.lru_cache(maxsize=4)
def _sampling(requests: tuple[Request, ...], device: torch.device | str) -> SamplingBatch:
    """One sample per request, at no position yet. The same few batches come again and again."""
    params = [request.params for request in requests]
    numbers = np.array([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float32)
    whole = np.array([(max(r.params.top_k, 0), signed_seed(r.seed)) for r in requests], dtype=np.int64)
    temperature, top_p, min_p, top_k, seed = to_device(torch.device(device), *numbers.T, *whole.T)
    return SamplingBatch(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        position=seed.new_zeros(0),
        all_greedy=all(p.greedy for p in params),
        any_filter=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params),
    )


def _padded(keys: int) -> int:
    return -(-keys // _KEY_MULTIPLE) * _KEY_MULTIPLE


@dataclass(frozen=True)
class Drawer:
    """How a drafter turns logits into tokens. `draft_vocab` [n] holds the target ids of the logits' columns, if few."""

    mode: VerifyMode
    vocab_size: int
    draft_vocab: Tensor | None = None

    def draw(self, logits: Tensor, sampling: SamplingBatch, slot: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [rows] for the slot-th draft and, in rejection mode, what they were drawn from [rows, vocab].

        logits: [rows, drafted tokens] float32. Greedy drafts of a whole batch are certain: no probabilities then.
        """
        if sampling.all_greedy:
            token = argmax(logits)
            return (token if self.draft_vocab is None else self.draft_vocab[token]), None
        sampling = replace(sampling, position=sampling.position + slot)
        if self.mode == "coupled" and not sampling.any_filter:
            address = sampling.seed, sampling.position, noise.GUMBEL
            return draw_logits(logits, sampling.temperature, *address, self.draft_vocab), None
        support = target_support(logits, sampling)
        if self.draft_vocab is not None:  # from here on under the target's ids, which the noise is addressed by
            support = Support(self.draft_vocab[support.ids], support.log_weights)
        if self.mode == "coupled":
            return draw(support, sampling.seed, sampling.position), None
        token = draw(support, sampling.seed, sampling.position, noise.DRAFT)
        probs = logits.new_zeros(logits.shape[0], self.vocab_size)
        return token, probs.scatter_add_(1, support.ids, target_probs(support))


@dataclass
class Drafts:
    """Drafts as they are drawn, slot by slot, for all rows."""

    counts: tuple[int, ...]  # [rows] drafts wanted; 0 where a row cannot have any
    tokens: list[Tensor] = field(default_factory=list)  # each [rows]
    probs: list[Tensor] = field(default_factory=list)  # each [rows, vocab], in rejection mode
    largest: list[Tensor] = field(default_factory=list)  # each [rows], largest draft probability

    def add(self, token: Tensor, probs: Tensor | None, largest: Tensor) -> None:
        self.tokens.append(token)
        self.largest.append(largest)
        if probs is not None:
            self.probs.append(probs)

    def proposal(self, confidence: Tensor | None = None) -> Proposal:
        probs = torch.stack(self.probs, dim=1) if self.probs else None
        return proposal(
            self.counts, torch.stack(self.tokens, dim=1), torch.stack(self.largest, dim=1), probs, confidence
        )


def proposal(
    counts: tuple[int, ...],
    tokens: Tensor,  # [rows, width] int64, overwritten
    largest: Tensor,  # [rows, width]
    probs: Tensor | None = None,  # [rows, width, vocab]
    confidence: Tensor | None = None,  # [rows, width]
) -> Proposal:
    """Drafts of all rows as a proposal, rows cut to what they wanted."""
    width = tokens.shape[1]
    if min(counts) < width:
        (beyond,) = to_device(tokens.device, np.arange(width) >= np.array(counts)[:, None])
        tokens.masked_fill_(beyond, -1)
    return Proposal(tokens, counts, probs, confidence, largest=largest)


def largest_probability(logits: Tensor) -> Tensor:
    """Of softmax, [rows, drafted tokens] -> [rows]: tells acceptance about as well as a confidence head does."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def committed(batch: StepBatch, verdict: Verdict) -> Tensor | None:
    """Indices of the batch's tokens to remember: those that stay, [tokens that stay] int64. None: all of them.

    Off the CPU that is always so: how many stay is not asked, for the device would have to be waited for. What is kept
    of rejected drafts lies in slots that the tokens that do come there are written to before anything reads them.
    """
    if not batch.drafts.shape[1] or batch.drafts.device.type != "cpu":
        return None
    lens, total = np.array(batch.query_lens), sum(batch.query_lens)
    kept = np.maximum(np.array(batch.sample_lens) - 1, 0)
    place = torch.from_numpy(np.arange(total) - (lens.cumsum() - kept).repeat(lens))  # of drafts: 0, 1, ...
    row = torch.from_numpy(np.arange(len(lens)).repeat(lens))
    return (place < verdict.n_accepted[row]).nonzero().squeeze(1)
