"""Addressed noise in Triton, with the bits of dspark_kernels.noise, and the Gumbel argmax of whole vocabularies.

No float operation here may be fused with another, so every launch passes enable_fp_fusion=False. Divisions are IEEE's:
Triton's own `/` is approximate. Must not know: requests, acceptance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.noise import GUMBEL

GREEDY_TEMPERATURE = 1e-5  # at or below it a sample takes the argmax
BLOCK = 4096  # tokens scored at once
BLOCKS = 2  # blocks per program: a part of the vocabulary. Neither may follow the batch
PART = BLOCK * BLOCKS
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def portable_log(x):
    """noise.log_np: ln of normal positive float32 (Cephes logf) from single IEEE operations and bit operations."""
    shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    y = f * 7.0376836292e-2 + -1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f + -1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f + -1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f + -2.4999993993e-1
    y = y * f + 3.3333331174e-1
    square = f * f
    y = f * square * y
    y = y + exponent * -2.12194440e-4
    y = y - 0.5 * square
    return (f + y) + exponent * 0.693359375


@triton.jit
def grid_uniform(index):
    """Uniform of the open interval (0, 1) at a grid index below 2^23: an odd multiple of 2^-24, exact."""
    return (index.to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def grid_gumbel(index):
    """noise.grid_gumbel_np."""
    return -portable_log(-portable_log(grid_uniform(index)))


@triton.jit
def philox(seed, position, group, stream):
    """The four words of token group `group`, an int32 block of token // 4; seed int64, position and stream integers."""
    zero = group * 0
    return tl.philox(seed, group, zero + position.to(tl.int32), zero + stream, zero)


@triton.jit
def uniform(seed, position, stream):
    """noise.uniform_np at a scalar address."""
    group = tl.zeros([1], tl.int32)
    word, _, _, _ = philox(seed, position, group, stream)
    return tl.max(grid_uniform(word >> 9), 0)  # a block of one, as a scalar


@triton.jit
def gumbel_run(seed, position, first, stream, WIDTH: tl.constexpr):
    """Noise of tokens [first, first + WIDTH) at a scalar address: [WIDTH] float32. `first` must be a multiple of 4."""
    group = first // 4 + tl.arange(0, WIDTH // 4)
    a, b, c, d = philox(seed, position, group, stream)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [WIDTH])  # a, b, c, d, a, b, ...
    return grid_gumbel(words >> 9)


@triton.jit
def gumbel_rows(seed, position, first, stream, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The same for seeds and positions [ROWS]: [ROWS, WIDTH]."""
    group = tl.zeros([ROWS, WIDTH // 4], tl.int32) + (first // 4 + tl.arange(0, WIDTH // 4))[None, :]
    a, b, c, d = philox(seed[:, None], position[:, None], group, stream)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, WIDTH])
    return grid_gumbel(words >> 9)


@triton.jit
def gumbel_at(seed, position, token, stream):
    """Noise of any tokens, an int32 block into which seed and position broadcast: four times the work of a run."""
    a, b, c, d = philox(seed, position, token // 4, stream)
    lane = token % 4
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    return grid_gumbel(word >> 9)


@triton.jit
def sanitised(score):
    """NaN as infinity: the first NaN of a row then wins, and some valid token always does."""
    return tl.where(score == score, score, float("inf"))


@triton.jit
def better_of(top, top_id, score, token, MISSING: tl.constexpr):
    """A running (best score, its lowest id) joined with a block's, whose ids are all higher."""
    block_top = tl.max(score, 0)
    block_id = tl.min(tl.where(score == block_top, token, MISSING), 0)
    top_id = tl.where(block_top > top, block_id, top_id)
    return tl.maximum(top, block_top), top_id


@triton.jit
def scan_kernel(
    logits,  # [samples, vocab] of any float type, rows `stride` apart
    temperature,  # [samples] float32
    threshold,  # [samples] float32: scaled logits below it are out; not read without HAS_THRESHOLD
    seed,  # [samples] int64
    position,  # [samples] int64
    part_score,  # [samples, parts] float32, written
    part_token,  # [samples, parts] int32, written
    vocab,
    stride,
    parts,
    stream,
    greedy_temperature,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MISSING: tl.constexpr = NOWHERE,
):
    """The best token of each part of the vocabulary: grid (samples, parts)."""
    sample = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    t = tl.load(temperature + sample)
    greedy = t <= greedy_temperature
    divisor = tl.where(greedy, 1.0, t)
    seed_here = tl.load(seed + sample)
    position_here = tl.load(position + sample)
    if HAS_THRESHOLD:
        floor = tl.load(threshold + sample)
    top = float("-inf")
    top_id = part * BLOCK * BLOCKS  # a valid token even where no score is finite
    for block in range(tl.minimum(BLOCKS, tl.cdiv(vocab, BLOCK) - part * BLOCKS)):
        first = (part * BLOCKS + block) * BLOCK
        token = first + tl.arange(0, BLOCK)
        x = tl.load(logits + sample * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        scaled = tl.div_rn(x, divisor)
        if HAS_THRESHOLD:
            scaled = tl.where(scaled < floor, float("-inf"), scaled)
        gumbel = gumbel_run(seed_here, position_here, first, stream, BLOCK)
        score = sanitised(scaled + tl.where(greedy, 0.0, gumbel))
        top, top_id = better_of(top, top_id, score, token, MISSING)
    tl.store(part_score + sample * parts + part, top)
    tl.store(part_token + sample * parts + part, top_id)


@triton.jit
def best_part(part_score, part_token, row, parts, PARTS: tl.constexpr, MISSING: tl.constexpr):
    """Score and token of the best of a row's parts, the lowest token on ties."""
    part = tl.arange(0, PARTS)
    score = tl.load(part_score + row * parts + part, mask=part < parts, other=float("-inf"))
    token = tl.load(part_token + row * parts + part, mask=part < parts, other=MISSING)
    top = tl.max(score, 0)
    return top, tl.min(tl.where(score == top, token, MISSING), 0)


@triton.jit
def pick_kernel(part_score, part_token, out, parts, PARTS: tl.constexpr, MISSING: tl.constexpr = NOWHERE):
    """The best of a sample's parts -> out [samples] int64: grid (samples,)."""
    sample = tl.program_id(0).to(tl.int64)
    _, token = best_part(part_score, part_token, sample, parts, PARTS, MISSING)
    tl.store(out + sample, token.to(tl.int64))


def scan(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: int = GUMBEL,
    threshold: Tensor | None = None,
    greedy_temperature: float = GREEDY_TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """Best score and token of each part of PART tokens: [samples, parts] float32 and int32. See `draw`."""
    samples, vocab = logits.shape
    check_logits(logits, temperature, seed, position, threshold)
    parts = triton.cdiv(vocab, PART)
    part_score = torch.empty((samples, parts), dtype=torch.float32, device=logits.device)
    part_token = torch.empty((samples, parts), dtype=torch.int32, device=logits.device)
    if samples:
        scan_kernel[(samples, parts)](
            logits,
            temperature,
            temperature if threshold is None else threshold,
            seed,
            position,
            part_score,
            part_token,
            vocab,
            logits.stride(0),
            parts,
            stream,
            greedy_temperature,
            HAS_THRESHOLD=threshold is not None,
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return part_score, part_token


def draw(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: int = GUMBEL,
    threshold: Tensor | None = None,
    greedy_temperature: float = GREEDY_TEMPERATURE,
) -> Tensor:
    """argmax over the vocabulary of logits / temperature + noise(seed, position, token) -> [samples] int64.

    logits: [samples, vocab] float32, bfloat16 or float16, columns adjacent; temperature and threshold [samples]
    float32; seed and position [samples] int64. Tokens whose scaled logit is below `threshold` are out. Samples at or
    below greedy_temperature take the argmax. The lowest id wins ties, and the first NaN wins over all.
    The Gumbel-max trick (Gumbel 1954; Maddison et al. 2014). Raises ValueError for shapes that do not fit.
    """
    part_score, part_token = scan(logits, temperature, seed, position, stream, threshold, greedy_temperature)
    samples, parts = part_score.shape
    out = torch.empty(samples, dtype=torch.int64, device=logits.device)
    if samples:
        pick_kernel[(samples,)](
            part_score, part_token, out, parts, PARTS=triton.next_power_of_2(parts), num_warps=1, enable_fp_fusion=False
        )
    return out


def check_logits(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, threshold: Tensor | None = None
) -> None:
    """ValueError where samples do not fit their parameters: what would be read out of bounds."""
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.is_floating_point() or logits.dtype == torch.float64:
        raise ValueError(f"logits must be rows of adjacent float32 or half numbers, not {logits.dtype} {logits.shape}")
    wanted = {"temperature": torch.float32, "seed": torch.int64, "position": torch.int64, "threshold": torch.float32}
    for (name, dtype), tensor in zip(wanted.items(), (temperature, seed, position, threshold), strict=True):
        if tensor is not None and (
            tensor.shape != logits.shape[:1] or tensor.dtype != dtype or not tensor.is_contiguous()
        ):
            raise ValueError(f"{name} must be {len(logits)} adjacent {dtype}, not {tensor.dtype} {list(tensor.shape)}")
