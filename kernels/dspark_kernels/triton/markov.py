"""The sequential part of a DSpark head in one launch: bias by the token before, draw, next slot (DSpark paper 3.1).

Every slot needs the token of the slot before it over the whole vocabulary, so all programs run at once, each on its
share of the vocabulary, and wait for each other twice per slot. Must not know: requests, attention, confidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.noise import GUMBEL
from dspark_kernels.triton import tiles
from dspark_kernels.triton.noise import (
    GREEDY_TEMPERATURE,
    NOWHERE,
    better_of,
    gumbel_at,
    gumbel_rows,
    sanitised,
)

RANK_BLOCK = 64  # of the bias's products
PART_CHUNK = 1024  # parts joined at once


@dataclass(frozen=True)
class MarkovDrafts:
    """What a block's slots drew."""

    tokens: Tensor  # [rows, width] int64
    log_mass: Tensor  # [rows, width] float32: logsumexp of biased logits / temperature, for accept.DraftLogits
    largest: Tensor  # [rows, width] float32: largest probability of softmax(biased logits)


@triton.jit
def wait_for_all(counter, target):
    """Returns once every program has come here: what they wrote before is then visible to all."""
    tl.debug_barrier()  # all threads of this program have written
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def score_tile(
    base_ptr, w1_ptr, w2_ptr, ids_ptr, temperature_ptr, seed_ptr, position_ptr,
    parts_ptr, part_token_ptr, previous_ptr, previous_stride, slot, tile, start,
    rows, vocab, parts, base_row_stride, base_slot_stride, stream, greedy_temperature,
    RANK: tl.constexpr, KEEP: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MISSING: tl.constexpr,
):  # fmt: skip
    """M rows from `start` on times N tokens: biased logits, scores, and what remains of them per row."""
    row = start + tl.arange(0, M)
    real = row < rows
    column = tile * N + tl.arange(0, N)
    inside = column < vocab
    previous = tl.load(previous_ptr + row * previous_stride, mask=real, other=0, cache_modifier=".cg")
    bias = tl.zeros([M, N], tl.float32)
    for k in range(0, RANK, K):
        dim = k + tl.arange(0, K)
        in_rank = dim < RANK
        e = tl.load(w1_ptr + previous[:, None] * RANK + dim[None, :], mask=real[:, None] & in_rank[None, :], other=0.0)
        w = tl.load(
            w2_ptr + column[:, None].to(tl.int64) * RANK + dim[None, :],
            mask=inside[:, None] & in_rank[None, :],
            other=0.0,
        )
        bias = tl.dot(e, tl.trans(w), bias, input_precision=PRECISION)
    at = row[:, None].to(tl.int64) * base_row_stride + slot * base_slot_stride + column[None, :]
    seen = real[:, None] & inside[None, :]
    logits = tl.load(base_ptr + at, mask=seen, other=float("-inf")).to(tl.float32) + bias
    if KEEP:
        tl.store(base_ptr + at, logits, mask=seen)
    t = tl.load(temperature_ptr + row, mask=real, other=1.0)
    greedy = t <= greedy_temperature
    divisor = tl.where(greedy, 1.0, t)
    scaled = tl.div_rn(logits, tl.broadcast_to(divisor[:, None], [M, N]))
    seed = tl.load(seed_ptr + row, mask=real, other=0)
    position = tl.load(position_ptr + row, mask=real, other=0) + slot
    if HAS_IDS:
        token = tl.load(ids_ptr + column, mask=inside, other=MISSING).to(tl.int32)
        gumbel = gumbel_at(seed[:, None], position[:, None], token[None, :], stream)
    else:
        token = column
        gumbel = gumbel_rows(seed, position, tile * N, stream, M, N)
    score = sanitised(scaled + tl.where(greedy[:, None], 0.0, gumbel))
    score = tl.where(seen, score, float("-inf"))
    best = tl.max(score, 1)
    best_token = tl.min(tl.where((score == best[:, None]) & seen, token[None, :], MISSING), 1)
    top = tl.max(logits, 1)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    scaled_anchor = tl.div_rn(anchor, divisor)
    mass = tl.sum(tl.exp(scaled - scaled_anchor[:, None]), 1)
    plain_mass = tl.sum(tl.exp(logits - anchor[:, None]), 1)
    plane = rows * parts
    to = row * parts + tile
    tl.store(part_token_ptr + to, best_token, mask=real)
    tl.store(parts_ptr + to, best, mask=real)
    tl.store(parts_ptr + plane + to, top, mask=real)
    tl.store(parts_ptr + 2 * plane + to, mass, mask=real)
    tl.store(parts_ptr + 3 * plane + to, plain_mass, mask=real)


@triton.jit
def join_parts(parts_ptr, part_token_ptr, divisor, row, rows, parts, CHUNK: tl.constexpr, MISSING: tl.constexpr):
    """Token, log mass and largest probability of a row, from what score_tile left of it."""
    plane = rows * parts
    best = float("-inf")
    best_token = 0
    top = float("-inf")
    for start in range(0, parts, CHUNK):  # first the maxima, so that every sum has one scale
        part = start + tl.arange(0, CHUNK)
        at = row * parts + part
        score = tl.load(parts_ptr + at, mask=part < parts, other=float("-inf"), cache_modifier=".cg")
        token = tl.load(part_token_ptr + at, mask=part < parts, other=MISSING, cache_modifier=".cg")
        if start == 0:  # a valid token even where no score is finite
            best_token = tl.min(token, 0)
        best, best_token = better_of(best, best_token, score, token, MISSING)
        tops = tl.load(parts_ptr + plane + at, mask=part < parts, other=float("-inf"), cache_modifier=".cg")
        top = tl.maximum(top, tl.max(tops, 0))
    scaled_top = tl.div_rn(top, divisor)
    mass = 0.0
    plain_mass = 0.0
    for start in range(0, parts, CHUNK):
        part = start + tl.arange(0, CHUNK)
        at = row * parts + part
        tops = tl.load(parts_ptr + plane + at, mask=part < parts, other=float("-inf"), cache_modifier=".cg")
        masses = tl.load(parts_ptr + 2 * plane + at, mask=part < parts, other=0.0, cache_modifier=".cg")
        plain = tl.load(parts_ptr + 3 * plane + at, mask=part < parts, other=0.0, cache_modifier=".cg")
        mass += tl.sum(masses * tl.exp(tl.div_rn(tops, divisor) - scaled_top), 0)
        plain_mass += tl.sum(plain * tl.exp(tops - top), 0)
    return best_token, scaled_top + tl.log(mass), 1.0 / plain_mass


@triton.jit
def markov_kernel(
    base_ptr,  # [rows, width, vocab]: logits before the bias; overwritten with those after it if KEEP
    w1_ptr,  # [tokens, RANK]
    w2_ptr,  # [vocab, RANK]
    ids_ptr,  # [vocab] int64; not read without HAS_IDS
    anchors_ptr,  # [rows] int64
    temperature_ptr,  # [rows] float32
    seed_ptr,  # [rows] int64
    position_ptr,  # [rows] int64, of the first slot's token
    tokens_ptr,  # [rows, width] int64, written
    log_mass_ptr,  # [rows, width] float32, written
    largest_ptr,  # [rows, width] float32, written
    parts_ptr,  # [4, rows, parts] float32: scores, largest logits, masses at the temperature, masses at 1
    part_token_ptr,  # [rows, parts] int32
    counter_ptr,  # [1] int32, zero
    rows,
    width,
    vocab,
    parts,
    base_row_stride,
    base_slot_stride,
    stream,
    greedy_temperature,
    RANK: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    MISSING: tl.constexpr = NOWHERE,
):
    """Grid (programs,), all of them resident at once; results do not depend on how many there are."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    for slot in range(width):
        previous_ptr = anchors_ptr
        previous_stride = 1
        if slot > 0:
            previous_ptr = tokens_ptr + slot - 1
            previous_stride = width
        for tile in range(program, parts, programs):
            for start in range(0, rows, M):
                score_tile(
                    base_ptr, w1_ptr, w2_ptr, ids_ptr, temperature_ptr, seed_ptr, position_ptr,
                    parts_ptr, part_token_ptr, previous_ptr, previous_stride, slot, tile, start,
                    rows, vocab, parts, base_row_stride, base_slot_stride, stream, greedy_temperature,
                    RANK, KEEP, HAS_IDS, PRECISION, M, N, K, MISSING,
                )  # fmt: skip
        wait_for_all(counter_ptr, (2 * slot + 1) * programs)
        for row in range(program, rows, programs):
            t = tl.load(temperature_ptr + row)
            divisor = tl.where(t <= greedy_temperature, 1.0, t)
            token, log_mass, largest = join_parts(parts_ptr, part_token_ptr, divisor, row, rows, parts, CHUNK, MISSING)
            to = row * width + slot
            tl.store(tokens_ptr + to, token.to(tl.int64))
            tl.store(log_mass_ptr + to, log_mass)
            tl.store(largest_ptr + to, largest)
        wait_for_all(counter_ptr, (2 * slot + 2) * programs)


def draft_block(
    base: Tensor,  # [rows, width, vocab] float32, bfloat16 or float16, columns adjacent
    w1: Tensor,  # [tokens, rank] contiguous
    w2: Tensor,  # [vocab, rank] contiguous, of w1's dtype
    anchors: Tensor,  # [rows] int64
    temperature: Tensor,  # [rows] float32
    seed: Tensor,  # [rows] int64
    position: Tensor,  # [rows] int64, of the first slot's token
    *,
    stream: int = GUMBEL,
    keep: bool = False,
    ids: Tensor | None = None,  # [vocab] int64 ascending: the tokens that columns stand for; None: themselves
    greedy_temperature: float = GREEDY_TEMPERATURE,
    programs: int | None = None,  # None: one per multiprocessor, or one on a CPU
) -> MarkovDrafts:
    """Draws slot after slot from softmax((base[slot] + w2 w1[token before]) / temperature) with addressed noise.

    The vanilla head; its gated and recurrent kin have no kernel. `keep` writes the biased logits over `base`, then
    to be float32: what accept_rejection recomputes draft probabilities from. Sums in float32, row by row in an
    order that neither the batch nor `programs` changes. Raises ValueError for shapes that do not fit.
    """
    rows, width, vocab = base.shape
    _check(base, w1, w2, anchors, temperature, seed, position, keep, ids)
    device = base.device
    tokens = torch.empty((rows, width), dtype=torch.int64, device=device)
    log_mass, largest = (torch.empty((rows, width), dtype=torch.float32, device=device) for _ in range(2))
    if not (rows and width):
        return MarkovDrafts(tokens, log_mass, largest)
    tile = tiles.markov_tile(tiles.architecture(device), ids is not None)
    parts = triton.cdiv(vocab, tile.columns)
    if programs is None:
        programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    markov_kernel[(programs,)](
        *(base, w1, w2, anchors if ids is None else ids, anchors, temperature, seed, position),
        *(tokens, log_mass, largest),
        torch.empty((4, rows, parts), dtype=torch.float32, device=device),
        torch.empty((rows, parts), dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        *(rows, width, vocab, parts, base.stride(0), base.stride(1), stream, greedy_temperature),
        RANK=w1.shape[1],
        KEEP=keep,
        HAS_IDS=ids is not None,
        PRECISION="ieee",
        CHUNK=min(PART_CHUNK, triton.next_power_of_2(parts)),
        M=tile.rows,
        N=tile.columns,
        K=RANK_BLOCK,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
        launch_cooperative_grid=True,  # refused where not all programs fit at once, which would wait forever
    )
    return MarkovDrafts(tokens, log_mass, largest)


def _check(
    base: Tensor,
    w1: Tensor,
    w2: Tensor,
    anchors: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    keep: bool,
    ids: Tensor | None,
) -> None:
    rows, _, vocab = base.shape
    if base.stride(2) != 1 or (keep and base.dtype != torch.float32):
        raise ValueError(f"logits must have adjacent columns, and be float32 to be kept, not {base.dtype}")
    fits = w2.shape == (vocab, w1.shape[1]) and w1.dtype == w2.dtype
    if not fits or not (w1.is_contiguous() and w2.is_contiguous()):
        raise ValueError(
            f"w1 {list(w1.shape)} and w2 {list(w2.shape)} do not fit {vocab} tokens, or are not contiguous"
        )
    wanted = {"anchors": torch.int64, "temperature": torch.float32, "seed": torch.int64, "position": torch.int64}
    for (name, dtype), x in zip(wanted.items(), (anchors, temperature, seed, position), strict=True):
        if x.shape != (rows,) or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(f"{name} must be {rows} adjacent {dtype}, not {x.dtype} {list(x.shape)}")
    if ids is not None and (ids.shape != (vocab,) or ids.dtype != torch.int64 or not ids.is_contiguous()):
        raise ValueError(f"ids must be {vocab} adjacent int64, not {ids.dtype} {list(ids.shape)}")
