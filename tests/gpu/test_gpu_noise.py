"""Noise on the device has the specification's bits, all of them; draws over a real vocabulary are the server's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_device import DEVICE, ON_KERNELS, REHEARSAL, there
from test_interpreted_noise import addresses, rows_kernel, run_kernel, same, samples, uniform_kernel

from dspark_kernels import noise as specification
from dspark_kernels.triton import noise
from dspark_serve.sampling import draw_logits, draw_target
from dspark_serve.tensors import SamplingBatch
from dspark_serve.types import GREEDY_TEMPERATURE

pytestmark = ON_KERNELS
VOCAB = 9001 if REHEARSAL else 151_936
GRID = 1 << 23  # values there are
WIDTH = 1024
# As the kernels of the engine are launched: a fused multiply-add would round once where the specification rounds twice.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def grid_kernel(out, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(out + at, noise.grid_gumbel(at))


def nans(*shape: int) -> torch.Tensor:
    return there(torch.full(shape, torch.nan))


def test_every_value_there_is() -> None:
    size = 1 << 16 if REHEARSAL else GRID
    out = nans(size)
    grid_kernel[(size // WIDTH,)](out, WIDTH=WIDTH, **EXACT)
    same(out.cpu(), specification.grid_gumbel_np(np.arange(size)))


@pytest.mark.parametrize("first", [0, 64, 151_936])
def test_runs_have_the_bits_of_the_specification(first: int) -> None:
    for seed, position in zip(*addresses(), strict=True):
        out = nans(64)
        run_kernel[(1,)](out, there(seed), there(position), first, specification.DRAFT, WIDTH=64, **EXACT)
        tokens = np.arange(first, first + 64)
        same(out.cpu(), specification.gumbel_np(int(seed), int(position), tokens, specification.DRAFT))


def test_rows_and_uniforms_have_the_bits_of_the_specification() -> None:
    seed, position = addresses()
    some_seeds, some_positions = seed[:16].contiguous(), position[:16].contiguous()
    out = nans(16, 32)
    rows_kernel[(1,)](
        out, there(some_seeds), there(some_positions), 96, specification.GUMBEL, ROWS=16, WIDTH=32, **EXACT
    )
    want = specification.gumbel_np(some_seeds.numpy()[:, None], some_positions.numpy()[:, None], np.arange(96, 128))
    same(out.cpu(), want)
    out = nans(len(seed))
    uniform_kernel[(len(seed),)](out, there(seed), there(position), specification.ACCEPT, **EXACT)
    same(out.cpu(), specification.uniform(seed, position, specification.ACCEPT))


def test_scores_have_the_bits_of_single_operations() -> None:
    """A quotient and a sum, each rounded on its own: what decides a tie must not differ between devices."""
    logits, temperature, seed, position = samples(7, VOCAB)
    score, token = noise.scan(*there((logits, temperature, seed, position)))
    divisor = temperature.masked_fill(temperature <= GREEDY_TEMPERATURE, 1.0)
    gumbel = specification.gumbel_dense(seed, position, VOCAB)
    want = logits / divisor[:, None] + gumbel.masked_fill_(temperature[:, None] <= GREEDY_TEMPERATURE, 0.0)
    for part, columns in enumerate(want.split(noise.PART, dim=1)):
        same(score[:, part].cpu().contiguous(), columns.amax(-1))
        assert token[:, part].tolist() == (columns.argmax(-1) + part * noise.PART).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_draws_are_the_servers_together_and_alone(dtype: torch.dtype) -> None:
    given = samples(7, VOCAB, dtype)
    got = noise.draw(*there(given)).tolist()
    assert got == draw_logits(given[0].float(), *given[1:]).tolist()
    for row in range(7):
        assert noise.draw(*there([x[row : row + 1] for x in given])).tolist() == [got[row]]


def test_torch_draws_on_the_device_as_on_the_cpu() -> None:
    """The server's own sampling, which serves where the kernels do not: the same tokens on both."""
    given = samples(7, VOCAB)
    there_too = draw_logits(*(x.to(DEVICE) for x in given))
    assert there_too.tolist() == draw_logits(*given).tolist()


def test_filters_and_draws_never_wait() -> None:
    """What tests/engine/test_transfers.py counts on a pretended device, asked of the real one; and the CPU's tokens."""
    logits, temperature, seed, position = samples(7, VOCAB)
    top_k, min_p = torch.tensor([0, 1, 50, 700, 0, 3, VOCAB]), torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.05])
    batch = SamplingBatch(temperature, top_k, torch.ones(7), min_p, seed, position, all_greedy=False, any_filter=True)
    on_device, batch_there = there(logits), there(batch)
    if not REHEARSAL:
        torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = draw_target(on_device, batch_there)
    finally:
        if not REHEARSAL:
            torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist() == draw_target(logits, batch).tolist()


def test_thresholds_cut_scaled_logits() -> None:
    logits, temperature, seed, position = samples(7, VOCAB)
    divisor = temperature.masked_fill(temperature <= GREEDY_TEMPERATURE, 1.0)
    scaled = logits / divisor[:, None]
    threshold = scaled.topk(5).values[:, -1].contiguous()
    cut = scaled.masked_fill(scaled < threshold[:, None], -torch.inf) * divisor[:, None]
    got = noise.draw(*there((logits, temperature, seed, position)), threshold=there(threshold))
    assert got.tolist() == draw_logits(cut, temperature, seed, position).tolist()
