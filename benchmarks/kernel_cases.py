"""Launches of the Triton kernels at Qwen3-4B's shapes, each with what it must read, write and multiply.

Must not know: clocks, what is fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import shapes
import torch
from shapes import QWEN3_4B, Cost

SHAPE = QWEN3_4B
DEVICE = torch.device("cuda")
SIZE = 2  # bytes of a bfloat16
PAGE, DRAFTS, RANK = 16, 7, 256
Case = tuple[Callable[[], object], Cost]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def attention_case(rows: list[tuple[int, int]]) -> Case:
    """Rows of (tokens, keys the last sees) over pages in random order."""
    from dspark_kernels.triton.attention import attend

    s, tokens = SHAPE, sum(count for count, _ in rows)
    needed = [-(-context // PAGE) for _, context in rows]
    order = torch.randperm(sum(needed), device=DEVICE)
    table = torch.zeros(len(rows), max(needed), dtype=torch.int64, device=DEVICE)
    for row, (start, count) in enumerate(zip(itertools.accumulate([0, *needed]), needed, strict=False)):
        table[row, :count] = order[start : start + count]
    keys, values = (random(sum(needed), PAGE, s.kv_heads, s.head_dim) for _ in range(2))
    counts = [count for count, _ in rows]
    spans = [[0, *itertools.accumulate(counts)][:-1], counts, [context for _, context in rows]]
    q, where = random(tokens, s.heads, s.head_dim), torch.tensor(spans, device=DEVICE)
    cost = shapes.attention_cost(rows, s, SIZE)
    return (lambda: attend(q, keys, values, table, where, scale=s.head_dim**-0.5)), cost


def layer_cases(rows: int) -> dict[str, Case]:
    """What surrounds products and attention in a layer."""
    from dspark_kernels.triton import norms, rope

    s = SHAPE
    x, residual, weight = random(rows, s.hidden), random(rows, s.hidden), random(s.hidden)
    gate_up = random(rows, 2 * s.intermediate)
    q, k, v = (random(rows, heads, s.head_dim) for heads in (s.heads, s.kv_heads, s.kv_heads))
    table, index = random(rows, 2, s.head_dim), torch.arange(rows, device=DEVICE)
    pages = [random(-(-rows // PAGE), PAGE, s.kv_heads, s.head_dim) for _ in range(2)]
    scale = random(s.head_dim)

    def rotate() -> None:
        rope.rotate_and_keep(q, k, v, (index, table), (index, pages[0], pages[1]), (scale, scale, 1e-6))

    return {
        f"norm of a sum, {rows} tokens": (
            lambda: norms.rms_norm(x, weight, 1e-6, residual),
            shapes.norm_cost(rows, s.hidden, SIZE, residual=True),
        ),
        f"SwiGLU, {rows} tokens": (
            lambda: norms.swiglu(gate_up),
            shapes.swiglu_cost(rows, s.intermediate, SIZE),
        ),
        f"rotation and scatter, {rows} tokens": (rotate, shapes.rotation_cost(rows, s, SIZE)),
    }


def sampling_cases(rows: int) -> dict[str, Case]:
    """What comes after the target's logits, and the sampler that makes drafts."""
    from dspark_kernels.triton import accept, markov, noise

    samples, vocab = rows * (DRAFTS + 1), SHAPE.vocab
    logits = random(samples, vocab, dtype=torch.float32)
    index, ones = torch.arange(samples, device=DEVICE), torch.ones(samples, device=DEVICE)
    drafts = torch.zeros(rows, DRAFTS, dtype=torch.int64, device=DEVICE)
    first, count = index[:rows] * (DRAFTS + 1), torch.full((rows,), DRAFTS + 1, device=DEVICE)
    draft_logits = random(rows, DRAFTS, vocab, dtype=torch.float32)
    draft = accept.DraftLogits(draft_logits, draft_logits.logsumexp(-1))
    w1, w2 = random(vocab, RANK), random(vocab, RANK)
    rule = (logits, drafts, first, count, ones, index, index)
    one_pass = shapes.draw_cost(samples, vocab, 4)
    return {
        f"draw, {samples} samples": (lambda: noise.draw(logits, ones, index, index), one_pass),
        f"coupled acceptance, {rows} rows": (lambda: accept.accept_coupled(*rule), one_pass),
        # One sample of each row is read again, and with it what its draft was drawn from.
        f"rejection, {rows} rows": (
            lambda: accept.accept_rejection(*rule, draft),
            one_pass + shapes.draw_cost(2 * rows, vocab, 4),
        ),
        f"Markov drafts, {rows} rows": (
            lambda: markov.draft_block(draft_logits, w1, w2, first, ones[:rows], index[:rows], index[:rows]),
            shapes.markov_cost(rows, DRAFTS, vocab, RANK, SIZE),
        ),
    }
