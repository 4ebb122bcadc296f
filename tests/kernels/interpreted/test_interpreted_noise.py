"""Noise of the kernels has the specification's bits; whole-vocabulary draws are those of the server's sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fence import fenced
from torch import Tensor

from dspark_kernels import noise as specification
from dspark_kernels.triton import noise
from dspark_serve.sampling import draw_logits
from dspark_serve.types import GREEDY_TEMPERATURE

SEEDS = [0, 1234, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822]
POSITIONS = [0, 77, 2**31 - 1]


@triton.jit
def run_kernel(out, seed, position, first, stream, WIDTH: tl.constexpr):
    tl.store(out + tl.arange(0, WIDTH), noise.gumbel_run(tl.load(seed), tl.load(position), first, stream, WIDTH))


@triton.jit
def rows_kernel(out, seed, position, first, stream, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, ROWS)
    gumbel = noise.gumbel_rows(tl.load(seed + row), tl.load(position + row), first, stream, ROWS, WIDTH)
    tl.store(out + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], gumbel)


@triton.jit
def uniform_kernel(out, seed, position, stream):
    at = tl.program_id(0)
    tl.store(out + at, noise.uniform(tl.load(seed + at), tl.load(position + at), stream))


@triton.jit
def grid_kernel(out, step, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.store(out + at, noise.grid_gumbel(at * step))


def same(got: Tensor, want: np.ndarray | Tensor) -> None:
    assert np.array_equal(got.numpy().view(np.int32), np.asarray(want).view(np.int32))


def addresses() -> tuple[Tensor, Tensor]:
    seed, position = torch.tensor(SEEDS), torch.tensor(POSITIONS)
    return seed.repeat_interleave(len(position)), position.repeat(len(seed))


@pytest.mark.parametrize("first", [0, 64, 151_936])
def test_runs_have_the_bits_of_the_specification(first: int) -> None:
    for seed, position in zip(*addresses(), strict=True):
        out = torch.full((64,), torch.nan)
        run_kernel[(1,)](out, seed, position, first, specification.DRAFT, WIDTH=64)
        tokens = np.arange(first, first + 64)
        same(out, specification.gumbel_np(int(seed), int(position), tokens, specification.DRAFT))


def test_rows_have_the_bits_of_the_specification() -> None:
    seed, position = (x[:16].contiguous() for x in addresses())
    out = torch.full((16, 32), torch.nan)
    rows_kernel[(1,)](out, seed, position, 96, specification.GUMBEL, ROWS=16, WIDTH=32)
    want = specification.gumbel_np(seed.numpy()[:, None], position.numpy()[:, None], np.arange(96, 128))
    same(out, want)


def test_uniforms_have_the_bits_of_the_specification() -> None:
    seed, position = addresses()
    out = torch.full(seed.shape, torch.nan)
    uniform_kernel[(len(seed),)](out, seed, position, specification.ACCEPT)
    same(out, specification.uniform(seed, position, specification.ACCEPT))


@pytest.mark.parametrize("step", [1, 127])
def test_the_grid_has_the_bits_of_the_specification(step: int) -> None:
    """65,536 values at its start and all over it; the whole grid was compared once."""
    out = torch.full((1 << 16,), torch.nan)
    grid_kernel[(1,)](out, step, WIDTH=1 << 16)
    same(out, specification.grid_gumbel_np(np.arange(1 << 16) * step))


def samples(count: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count * vocab)
    logits = (torch.randn(count, vocab, generator=generator) * 4).to(dtype)
    temperature = torch.tensor([0.0, 1.0, 0.3, 2.5, GREEDY_TEMPERATURE, 0.7, 1.3])[:count]
    return logits, temperature, torch.arange(count) * 12345 - 3, torch.arange(count) * 7 + 2


def test_the_server_calls_the_same_samples_greedy() -> None:
    assert noise.GREEDY_TEMPERATURE == GREEDY_TEMPERATURE


@pytest.mark.parametrize("vocab", [1, 4099, noise.PART + 5])
def test_draws_are_the_servers(vocab: int) -> None:
    logits, temperature, seed, position = samples(7, vocab)
    got = noise.draw(*(fenced(x) for x in (logits, temperature, seed, position)))
    assert got.tolist() == draw_logits(logits, temperature, seed, position).tolist()


def test_scores_have_the_bits_of_single_operations() -> None:
    """A quotient and a sum, each rounded on its own: what decides a tie must not differ between backends."""
    logits, temperature, seed, position = samples(7, 4099)
    score, token = noise.scan(logits, temperature, seed, position)
    divisor = temperature.masked_fill(temperature <= GREEDY_TEMPERATURE, 1.0)
    gumbel = specification.gumbel_dense(seed, position, 4099)
    want = logits / divisor[:, None] + gumbel.masked_fill_(temperature[:, None] <= GREEDY_TEMPERATURE, 0.0)
    same(score[:, 0], want.amax(-1))
    assert token[:, 0].tolist() == want.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_widened(dtype: torch.dtype) -> None:
    logits, temperature, seed, position = samples(7, 4099, dtype)
    got = noise.draw(fenced(logits), temperature, seed, position, specification.DRAFT)
    assert got.tolist() == draw_logits(logits.float(), temperature, seed, position, specification.DRAFT).tolist()


def test_rows_apart_and_alone() -> None:
    logits, temperature, seed, position = samples(7, 4099)
    wide = torch.full((7, 5000), torch.inf)
    wide[:, :4099] = logits
    got = noise.draw(wide[:, :4099], temperature, seed, position)
    assert got.tolist() == noise.draw(logits, temperature, seed, position).tolist()
    for row in (0, 3, 6):
        some = slice(row, row + 1)
        assert noise.draw(logits[some], temperature[some], seed[some], position[some]).tolist() == [got[row]]


def test_thresholds_cut_scaled_logits() -> None:
    logits, temperature, seed, position = samples(7, 4099)
    divisor = temperature.masked_fill(temperature <= GREEDY_TEMPERATURE, 1.0)
    scaled = logits / divisor[:, None]
    threshold = scaled.topk(5).values[:, -1].contiguous()
    cut = scaled.masked_fill(scaled < threshold[:, None], -torch.inf) * divisor[:, None]
    got = noise.draw(logits, temperature, seed, position, threshold=threshold)
    assert got.tolist() == draw_logits(cut, temperature, seed, position).tolist()
    assert got.tolist() != noise.draw(logits, temperature, seed, position).tolist()


def test_ties_go_to_the_lowest_and_odd_rows_to_a_valid_token() -> None:
    logits = torch.zeros(4, 9000)
    logits[0, [100, 8500]] = 1.0
    logits[1] = -torch.inf
    logits[2, [8300, 8400]] = torch.nan
    logits[3, 8999] = torch.inf
    temperature, seed, position = torch.zeros(4), torch.arange(4), torch.arange(4)
    assert noise.draw(logits, temperature, seed, position).tolist() == [100, 0, 8300, 8999]
    assert noise.draw(logits, temperature + 1, seed, position).tolist()[1:] == [0, 8300, 8999]


def test_what_does_not_fit_is_refused() -> None:
    logits, temperature, seed, position = samples(7, 16)
    with pytest.raises(ValueError, match="seed must be 7"):
        noise.draw(logits, temperature, seed[:3], position)
    with pytest.raises(ValueError, match="position must be 7"):
        noise.draw(logits, temperature, seed, position.int())
    with pytest.raises(ValueError, match="rows of adjacent"):
        noise.draw(logits.T, temperature, seed, position)
    assert noise.draw(logits[:0], temperature[:0], seed[:0], position[:0]).tolist() == []
