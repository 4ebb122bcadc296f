"""Acceptance over ragged rows in rejection mode, from logits: Leviathan et al. 2023; accept.py has the coupled mode.

No distribution is written to memory: all logits are read once, and those of one sample per row, where the next token
is drawn, once more. Must not know: requests, who drafted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.noise import ACCEPT, RESIDUAL
from dspark_kernels.triton.accept import check_rows
from dspark_kernels.triton.noise import (
    BLOCK,
    BLOCKS,
    GREEDY_TEMPERATURE,
    NOWHERE,
    PART,
    best_part,
    better_of,
    check_logits,
    gumbel_run,
    sanitised,
    uniform,
)


@dataclass(frozen=True)
class DraftLogits:
    """What drafts were drawn from: softmax(logits / temperature), the sample's own temperature."""

    logits: Tensor  # [rows, width, vocab], columns adjacent, as they were when the drafts were drawn
    log_mass: Tensor  # [rows, width] float32: logsumexp of logits / temperature


@triton.jit
def mass_kernel(
    logits,  # [samples, vocab], rows `stride` apart
    temperature,  # [samples] float32
    threshold,  # [samples] float32; not read without HAS_THRESHOLD
    part_top,  # [samples, parts] float32, written: largest scaled logit
    part_token,  # [samples, parts] int32, written: its lowest token
    part_mass,  # [samples, parts] float32, written: sum of exp(scaled - top)
    vocab,
    stride,
    parts,
    greedy_temperature,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MISSING: tl.constexpr = NOWHERE,
):
    """What a softmax needs of each part of the vocabulary: grid (samples, parts)."""
    sample = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    t = tl.load(temperature + sample)
    divisor = tl.where(t <= greedy_temperature, 1.0, t)
    if HAS_THRESHOLD:
        floor = tl.load(threshold + sample)
    top = float("-inf")
    top_id = part * BLOCK * BLOCKS
    mass = 0.0
    for block in range(tl.minimum(BLOCKS, tl.cdiv(vocab, BLOCK) - part * BLOCKS)):
        token = (part * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + sample * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        scaled = tl.div_rn(x, divisor)
        if HAS_THRESHOLD:
            scaled = tl.where(scaled < floor, float("-inf"), scaled)
        scaled = sanitised(scaled)
        before = top
        top, top_id = better_of(top, top_id, scaled, token, MISSING)
        anchor = tl.where(top == float("-inf"), 0.0, top)
        mass = mass * tl.exp(before - anchor) + tl.sum(tl.exp(scaled - anchor), 0)
    tl.store(part_top + sample * parts + part, top)
    tl.store(part_token + sample * parts + part, top_id)
    tl.store(part_mass + sample * parts + part, mass)


@triton.jit
def rejection_kernel(
    logits,  # [samples, vocab], rows `stride` apart
    temperature,
    threshold,
    seed,
    position,
    part_top,  # [samples, parts], from mass_kernel; likewise the next two
    part_token,
    part_mass,
    draft_logits,  # [rows, draft slots, vocab]; not read without HAS_PROBS: then every draft was certain
    draft_log_mass,  # [rows, draft slots] float32, likewise
    first_ptr,  # [rows] int64
    count_ptr,  # [rows] int64
    drafts_ptr,  # [rows, width - 1] int64
    accepted_ptr,  # [rows] int64, written
    last_ptr,  # [rows] int64, written: the sample that decides the next token
    log_mass_ptr,  # [rows] float32, written: logsumexp of that sample
    stride,
    draft_row_stride,
    draft_slot_stride,
    log_mass_stride,
    parts,
    width,
    greedy_temperature,
    stream,
    HAS_THRESHOLD: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    PARTS: tl.constexpr,
    MISSING: tl.constexpr = NOWHERE,
):
    """How many drafts of a row stay: grid (rows,). Draft x stays with probability min(1, target / draft)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(first_ptr + row)
    count = tl.load(count_ptr + row)
    part = tl.arange(0, PARTS)
    in_parts = part < parts
    going = (count > 0).to(tl.int64)
    accepted = going * 0
    log_mass = 0.0
    for slot in range(width):
        here = (slot < count) & (going > 0)
        sample = tl.where(here, first + slot, 0)
        tops = tl.load(part_top + sample * parts + part, mask=in_parts, other=float("-inf"))
        masses = tl.load(part_mass + sample * parts + part, mask=in_parts, other=0.0)
        top, best = best_part(part_top, part_token, sample, parts, PARTS, MISSING)
        mass = tl.sum(masses * tl.exp(tops - top), 0)
        log_mass = tl.where(here, top + tl.log(mass), log_mass)

        has_draft = here & (slot + 1 < count)
        draft = tl.load(drafts_ptr + row * (width - 1) + slot, mask=has_draft, other=-1)
        has_draft = has_draft & (draft >= 0)
        t = tl.load(temperature + sample)
        greedy = t <= greedy_temperature
        divisor = tl.where(greedy, 1.0, t)
        x = tl.load(logits + sample * stride + draft, mask=has_draft, other=float("-inf")).to(tl.float32)
        scaled = tl.div_rn(x, divisor)
        if HAS_THRESHOLD:
            scaled = tl.where(scaled < tl.load(threshold + sample), float("-inf"), scaled)
        target_prob = tl.where(greedy, (draft == best).to(tl.float32), tl.exp(scaled - log_mass))
        draft_prob = 1.0
        if HAS_PROBS:
            at = row * draft_row_stride + slot * draft_slot_stride + draft
            y = tl.load(draft_logits + at, mask=has_draft, other=float("-inf")).to(tl.float32)
            mass_at = tl.load(draft_log_mass + row * log_mass_stride + slot, mask=has_draft, other=0.0)
            draft_prob = tl.where(greedy, 1.0, tl.exp(tl.div_rn(y, divisor) - mass_at))
        u = uniform(tl.load(seed + sample), tl.load(position + sample), stream)
        stays = has_draft & (u * draft_prob < target_prob)
        going = going * stays.to(tl.int64)
        accepted += going
    tl.store(accepted_ptr + row, accepted)
    tl.store(last_ptr + row, tl.where(count > 0, first + accepted, 0))
    tl.store(log_mass_ptr + row, log_mass)


@triton.jit
def residual_kernel(
    logits,  # [samples, vocab], rows `stride` apart
    temperature,
    threshold,
    seed,
    position,
    draft_logits,
    draft_log_mass,
    count_ptr,  # [rows] int64
    drafts_ptr,  # [rows, width - 1] int64
    accepted_ptr,  # [rows] int64
    last_ptr,  # [rows] int64
    log_mass_ptr,  # [rows] float32
    part_score,  # [2, rows, parts] float32, written: of the residual, then of the target itself
    part_token,  # [2, rows, parts] int32, written
    vocab,
    stride,
    draft_row_stride,
    draft_slot_stride,
    log_mass_stride,
    parts,
    width,
    greedy_temperature,
    stream,
    HAS_THRESHOLD: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MISSING: tl.constexpr = NOWHERE,
):
    """Gumbel argmax of max(target - draft, 0) at each row's deciding sample, per part: grid (rows, parts)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    sample = tl.load(last_ptr + row)
    slot = tl.load(accepted_ptr + row)
    refused = slot + 1 < tl.load(count_ptr + row)  # else the token is a bonus: nothing is subtracted
    draft = tl.load(drafts_ptr + row * (width - 1) + slot, mask=refused, other=-1)
    t = tl.load(temperature + sample)
    greedy = t <= greedy_temperature
    divisor = tl.where(greedy, 1.0, t)
    seed_here = tl.load(seed + sample)
    position_here = tl.load(position + sample)
    log_mass = tl.load(log_mass_ptr + row)
    if HAS_THRESHOLD:
        floor = tl.load(threshold + sample)
    if HAS_PROBS:
        draft_mass = tl.load(draft_log_mass + row * log_mass_stride + slot, mask=refused, other=0.0)
    top = float("-inf")
    top_id = part * BLOCK * BLOCKS
    own = float("-inf")
    own_id = top_id
    for block in range(tl.minimum(BLOCKS, tl.cdiv(vocab, BLOCK) - part * BLOCKS)):
        start = (part * BLOCKS + block) * BLOCK
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + sample * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        scaled = tl.div_rn(x, divisor)
        if HAS_THRESHOLD:
            scaled = tl.where(scaled < floor, float("-inf"), scaled)
        gumbel = tl.where(greedy, 0.0, gumbel_run(seed_here, position_here, start, stream, BLOCK))
        own, own_id = better_of(own, own_id, sanitised(scaled + gumbel), token, MISSING)
        if HAS_PROBS:
            at = row * draft_row_stride + slot * draft_slot_stride + token
            y = tl.load(draft_logits + at, mask=token < tl.where(refused, vocab, 0), other=float("-inf")).to(tl.float32)
            draft_prob = tl.exp(tl.div_rn(y, divisor) - draft_mass)
        else:
            draft_prob = (token == draft).to(tl.float32)
        weight = tl.where(greedy, 0.0, tl.exp(scaled - log_mass) - draft_prob)
        positive = weight > 0.0
        score = tl.where(positive, tl.log(tl.where(positive, weight, 1.0)) + gumbel, float("-inf"))
        top, top_id = better_of(top, top_id, score, token, MISSING)
    at = row * parts + part
    plane = tl.num_programs(0).to(tl.int64) * parts
    tl.store(part_score + at, top)
    tl.store(part_token + at, top_id)
    tl.store(part_score + plane + at, own)
    tl.store(part_token + plane + at, own_id)


@triton.jit
def append_kernel(
    part_score,  # [2, rows, parts]
    part_token,
    count_ptr,
    drafts_ptr,
    accepted_ptr,
    tokens_ptr,  # [rows, width] int64, written: accepted drafts, the next token, -1
    rows,
    parts,
    width,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    MISSING: tl.constexpr = NOWHERE,
):
    """Grid (rows,). Equal distributions leave no residual and refuse only by rounding: then the target's own draw."""
    row = tl.program_id(0).to(tl.int64)
    score, token = best_part(part_score, part_token, row, parts, PARTS, MISSING)
    _, own = best_part(part_score, part_token, rows + row, parts, PARTS, MISSING)
    following = tl.where(score > float("-inf"), token, own).to(tl.int64)
    accepted = tl.load(accepted_ptr + row)
    samples = tl.load(count_ptr + row) > 0
    slot = tl.arange(0, WIDTH)
    draft = tl.load(drafts_ptr + row * (width - 1) + slot, mask=slot < accepted, other=-1)
    value = tl.where(slot == accepted, following, draft)
    value = tl.where(slot <= tl.where(samples, accepted, -1), value, -1)
    tl.store(tokens_ptr + row * width + slot, value, mask=slot < width)


def accept_rejection(
    logits: Tensor,
    drafts: Tensor,
    first: Tensor,
    count: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    draft: DraftLogits | None,
    threshold: Tensor | None = None,
    greedy_temperature: float = GREEDY_TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """As accept.accept_coupled, by the rejection rule; `draft` None: every draft was certain.

    Draft probabilities are recomputed from the logits the drafts were drawn from; none is stored.
    """
    rows, width = check_rows(drafts, first, count)
    check_logits(logits, temperature, seed, position, threshold)
    device, vocab = logits.device, logits.shape[1]
    accepted = torch.zeros(rows, dtype=torch.int64, device=device)
    tokens = torch.full((rows, width), -1, dtype=torch.int64, device=device)
    if not (rows and len(logits)):
        return accepted, tokens
    if draft is not None:
        _check_draft(draft, rows, width, vocab)
    parts = triton.cdiv(vocab, PART)
    samples = (len(logits), parts)
    part_top, part_mass = (torch.empty(samples, dtype=torch.float32, device=device) for _ in range(2))
    part_token = torch.empty(samples, dtype=torch.int32, device=device)
    cut = temperature if threshold is None else threshold
    options = {"BLOCK": BLOCK, "BLOCKS": BLOCKS, "num_warps": 8, "enable_fp_fusion": False}
    parts_pad, has_threshold, has_probs = triton.next_power_of_2(parts), threshold is not None, draft is not None
    stride = logits.stride(0)
    mass_kernel[samples](
        *(logits, temperature, cut, part_top, part_token, part_mass),
        *(vocab, stride, parts, greedy_temperature),
        HAS_THRESHOLD=has_threshold,
        **options,
    )
    last = torch.empty(rows, dtype=torch.int64, device=device)
    log_mass = torch.empty(rows, dtype=torch.float32, device=device)
    drawn, drawn_mass = (logits, part_mass) if draft is None else (draft.logits, draft.log_mass)
    strides = (0, 0, 0) if draft is None else (*drawn.stride()[:2], drawn_mass.stride(0))
    rejection_kernel[(rows,)](
        *(logits, temperature, cut, seed, position, part_top, part_token, part_mass, drawn, drawn_mass),
        *(first, count, drafts, accepted, last, log_mass),
        *(stride, *strides, parts, width, greedy_temperature, ACCEPT),
        HAS_THRESHOLD=has_threshold,
        HAS_PROBS=has_probs,
        PARTS=parts_pad,
        num_warps=1,
        enable_fp_fusion=False,
    )
    both = (2, rows, parts)
    part_score = torch.empty(both, dtype=torch.float32, device=device)
    part_token = torch.empty(both, dtype=torch.int32, device=device)
    residual_kernel[(rows, parts)](
        *(logits, temperature, cut, seed, position, drawn, drawn_mass, count, drafts, accepted, last, log_mass),
        *(part_score, part_token, vocab, stride, *strides, parts, width, greedy_temperature, RESIDUAL),
        HAS_THRESHOLD=has_threshold,
        HAS_PROBS=has_probs,
        **options,
    )
    append_kernel[(rows,)](
        *(part_score, part_token, count, drafts, accepted, tokens, rows, parts, width),
        PARTS=parts_pad,
        WIDTH=triton.next_power_of_2(width),
        num_warps=1,
        enable_fp_fusion=False,
    )
    return accepted, tokens


def _check_draft(draft: DraftLogits, rows: int, width: int, vocab: int) -> None:
    shape, mass = draft.logits.shape, draft.log_mass
    if shape[0] != rows or shape[1] < width - 1 or shape[2] != vocab or draft.logits.stride(2) != 1:
        raise ValueError(f"draft logits {list(shape)} do not fit {rows} rows of {width - 1} drafts over {vocab} tokens")
    if mass.shape != shape[:2] or mass.dtype != torch.float32 or mass.stride(1) != 1:
        raise ValueError(f"log_mass must be float32 {list(shape[:2])}, columns adjacent, not {list(mass.shape)}")
