"""Steps padded to one of a few sizes, at fixed addresses: what a recorded forward reads, whatever the batch.

A padding token is a row of its own that sees one key, itself, in the first slot of page 0, which no request ever has.
Must not know: requests, how layers compute, who records.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_serve.drafters.rows import DraftRows
from dspark_serve.tensors import SamplingBatch, StepBatch

# Few, so that recording is quick; close where padding costs most: up to half of a small step, a third of a large one.
# Beyond the last the device is busy for longer than the host takes to queue the next launch.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def tiers(most: int) -> tuple[int, ...]:
    """The sizes to pad to, ascending, for every number from 1 to `most`, or to the largest of SIZES if that is less."""
    most = min(most, SIZES[-1])
    return (*(size for size in SIZES if size < most), most)


@dataclass(frozen=True)
class Limits:
    """What the steps of an engine stay within."""

    max_num_seqs: int  # rows of a step
    max_tokens: int  # of a step; longer ones are not looked at
    max_model_len: int  # tokens of a row, context included

    def rows_of(self, tokens: int) -> int:
        """How many rows a tier of so many tokens has: one for every padding token, beside the most there can be.

        Rows are no tier of their own: a row without tokens costs attention some programs that look for their work and
        find none, which is less than the memory and the time that a second dimension of recordings would take.
        """
        smaller = max((size for size in tiers(self.max_tokens) if size < tokens), default=0)
        return min(tokens, self.max_num_seqs + tokens - smaller - 1)


class StepInputs:
    """Inputs of a step of `tokens` tokens in `rows` rows. `batch` is theirs, for any step that `takes` says fits.

    Host integers of `batch` stand for none of those steps: they are the longest that any can have.
    """

    def __init__(self, tokens: int, table: Tensor, page_size: int) -> None:
        """table: [rows, max_pages] int64, zeroed; smaller tiers use the first rows of the same."""
        rows, device = table.shape[0], table.device
        self.tokens, self.rows, self._table = tokens, rows, table
        self._flat = torch.zeros(3 * (tokens + rows), dtype=torch.int64, device=device)
        token_ids, positions, slots = self._flat[: 3 * tokens].view(3, tokens)
        spans = self._flat[3 * tokens :].view(3, rows)
        lens = tuple((tokens + row) // rows for row in range(rows))  # something legal, until a step is filled in
        firsts = [sum(lens[:row]) for row in range(rows)]
        spans.copy_(torch.tensor([firsts, lens, lens]))
        place = torch.arange(tokens + rows, device=device)
        self._nothing = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._first, self._one = place.clamp(max=tokens), (place < tokens).long()
        self.batch = StepBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            page_table=table,
            spans=spans,
            query_lens=lens,
            context_lens=(table.shape[1] * page_size,) * rows,
            sample_index=self._nothing[:0],
            sample_lens=(0,) * rows,
            sample_spans=torch.zeros(2, rows, dtype=torch.int64, device=device),
            drafts=self._nothing[:0].view(rows, 0),
            draft_probs=None,
            sampling=SamplingBatch.none(device),
            logprobs=(None,) * rows,
        )

    def takes(self, batch: StepBatch) -> bool:
        """Whether there is room, and a row for every padding token."""
        rows, pages = batch.page_table.shape
        return 0 <= self.tokens - batch.token_ids.shape[0] <= self.rows - rows and pages <= self._table.shape[1]

    def fill(self, batch: StepBatch) -> None:
        """Copy a step that fits, and make the rest padding: three launches, whatever the step."""
        count, (rows, pages) = batch.token_ids.shape[0], batch.page_table.shape
        nothing = self._nothing[: self.tokens - count]
        # Padding rows open where the step's tokens end, and hold a token each until there are none left.
        rest = slice(count, count + self.rows - rows)
        firsts, counts, contexts = batch.spans
        first, one = self._first[rest], self._one[rest]
        parts = [batch.token_ids, nothing, batch.positions, nothing, batch.slots, nothing]
        torch.cat([*parts, firsts, first, counts, one, contexts, one], out=self._flat)
        self._table.zero_()
        self._table[:rows, :pages].copy_(batch.page_table)


class BlockInputs:
    """Inputs of a drafter's pass over `rows` rows, likewise: a padding row has no context, and drafts for nobody."""

    def __init__(self, table: Tensor, page_size: int, longest: int) -> None:
        """table: [rows, max_pages] int64, zeroed; smaller tiers use the first rows of the same."""
        rows, device = table.shape[0], table.device
        self._flat = torch.zeros(2 * rows, dtype=torch.int64, device=device)
        self._nothing = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rows = DraftRows(
            anchors=self._flat[:rows],
            start=self._flat[rows:],
            pages=table,
            page_size=page_size,
            counts=(0,) * rows,
            longest=longest,
            sampling=SamplingBatch.none(device),
        )

    def takes(self, rows: DraftRows) -> bool:
        return all(given <= room for given, room in zip(rows.pages.shape, self.rows.pages.shape, strict=True))

    def fill(self, rows: DraftRows) -> None:
        count, pages = rows.pages.shape
        nothing, table = self._nothing[count:], self.rows.pages
        torch.cat([rows.anchors, nothing, rows.start, nothing], out=self._flat)
        table.zero_()
        table[:count, :pages].copy_(rows.pages)
