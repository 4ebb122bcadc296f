"""Acceptance over ragged rows in coupled mode, from logits: which drafts stay and the token that follows them.

A draft stays iff it is the target's own draw with the addressed noise; rejection.py has the other mode. All logits are
read once, and no distribution is written to memory. Must not know: requests, who drafted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.triton.noise import GREEDY_TEMPERATURE, NOWHERE, best_part, scan


@triton.jit
def coupled_kernel(
    part_score,  # [samples, parts]
    part_token,
    first_ptr,  # [rows] int64: the row's first sample
    count_ptr,  # [rows] int64: its samples, 0 or 1 + drafts
    drafts_ptr,  # [rows, width - 1] int64, padded with -1
    accepted_ptr,  # [rows] int64, written
    tokens_ptr,  # [rows, width] int64, written
    parts,
    width,
    PARTS: tl.constexpr,
    MISSING: tl.constexpr = NOWHERE,
):
    """The target's tokens up to and with the first that differs from the draft: grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(first_ptr + row)
    count = tl.load(count_ptr + row)
    going = (count > 0).to(tl.int64)
    accepted = going * 0
    for slot in range(width):
        wanted = (slot < count) & (going > 0)
        sample = tl.where(wanted, first + slot, 0)  # of some sample that exists: not used
        _, token = best_part(part_score, part_token, sample, parts, PARTS, MISSING)
        tl.store(tokens_ptr + row * width + slot, tl.where(wanted, token.to(tl.int64), -1))
        draft = tl.load(drafts_ptr + row * (width - 1) + slot, mask=slot + 1 < count, other=-1)
        going = going * (draft == token).to(tl.int64)
        accepted += going
    tl.store(accepted_ptr + row, accepted)


def accept_coupled(
    logits: Tensor,
    drafts: Tensor,
    first: Tensor,
    count: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    threshold: Tensor | None = None,
    greedy_temperature: float = GREEDY_TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """Accepted drafts per row [rows] int64, and the tokens [rows, width + 1] int64: those drafts, the next token, -1.

    logits [samples, vocab] float32, bfloat16 or float16, after penalties and masks; temperature and threshold (tokens
    whose scaled logit is below it are out) [samples] float32; seed and position [samples] int64. Row r's samples are
    first[r] .. first[r] + count[r] - 1, both [rows] int64: none, or one more than it has drafts. drafts [rows, width]
    int64, padded with -1. The same bits as noise.draw and a comparison. Raises ValueError for shapes that do not fit.
    """
    rows, width = check_rows(drafts, first, count)
    part_score, part_token = scan(
        logits, temperature, seed, position, threshold=threshold, greedy_temperature=greedy_temperature
    )
    accepted = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    tokens = torch.full((rows, width), -1, dtype=torch.int64, device=logits.device)
    if rows and len(logits):
        parts = part_score.shape[1]
        coupled_kernel[(rows,)](
            part_score,
            part_token,
            first,
            count,
            drafts,
            accepted,
            tokens,
            parts,
            width,
            PARTS=triton.next_power_of_2(parts),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return accepted, tokens


def check_rows(drafts: Tensor, first: Tensor, count: Tensor) -> tuple[int, int]:
    """Rows, and tokens a row may get; drafts [rows, width], the rest [rows]. ValueError: they do not fit each other."""
    rows, width = drafts.shape
    for tensor in (drafts, first, count):
        if tensor.dtype != torch.int64 or not tensor.is_contiguous() or len(tensor) != rows:
            raise ValueError(f"drafts, first and count must be contiguous int64 of {rows} rows, not {tensor.dtype}")
    return rows, width + 1
