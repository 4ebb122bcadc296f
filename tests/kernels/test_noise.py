"""The noise is a specification: known answers, equal bits everywhere, and the shape of the distributions."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dspark_kernels import noise

FULL = 0xFFFFFFFF
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
EXTREME = [0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, -(2**63)]

FIXED_GUMBEL = [
    [
        "-0x1.7281680000000p-1",
        "0x1.d7a3a40000000p+0",
        "-0x1.209d440000000p-2",
        "0x1.7a60240000000p+0",
        "0x1.06b9960000000p+2",
    ],
    [
        "0x1.d1c8200000000p-1",
        "-0x1.ea0a940000000p-1",
        "0x1.d4ca480000000p+0",
        "0x1.a03c140000000p-1",
        "0x1.ea3e3a0000000p+0",
    ],
]
FIXED_UNIFORM = "0x1.dbe64e0000000p-1"


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in noise.philox_np(counter, key)) == expected
    words = noise.philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in words) == expected


def test_address_layout() -> None:
    """Which word of key and counter each part of an address goes to, and which output a token takes."""
    seed, position, token, stream = 0x299F31D0A4093822, 0x85A308D3, 4 * 0x243F6A88 + 2, 0x13198A2E
    expected = noise.philox_np((0x243F6A88, 0x85A308D3, 0x13198A2E, 0), (0xA4093822, 0x299F31D0))[2]
    assert noise.bits_np(seed, position, token, stream) == expected


def test_fixed_gumbel_values() -> None:
    """Any change here changes the text of every seed ever used."""
    got = noise.gumbel_np(1234, np.array([[0], [7]]), np.array([0, 1, 2, 3, 49151]), noise.GUMBEL)
    assert [[float(x).hex() for x in row] for row in got] == FIXED_GUMBEL
    assert float(noise.uniform_np(1234, 7, noise.ACCEPT)).hex() == FIXED_UNIFORM


@given(st.lists(st.tuples(INT64, INT64, INT64), min_size=1, max_size=12), st.sampled_from([0, 1, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_torch_equals_numpy(addresses: list[tuple[int, int, int]], stream: int) -> None:
    seed, position, token = torch.tensor(addresses).unbind(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_NUMPY_CALLS", 0)  # else so few addresses would be numpy's on both sides
        got, uniform = noise.gumbel(seed, position, token, stream), noise.uniform(seed, position, stream)
    assert_same(got, noise.gumbel_np(seed.numpy(), position.numpy(), token.numpy(), stream))
    assert_same(uniform, noise.uniform_np(seed.numpy(), position.numpy(), stream))
    assert_same(noise.gumbel(seed, position, token, stream), got.numpy())


def test_torch_equals_numpy_at_extremes_and_broadcast() -> None:
    extreme = torch.tensor(EXTREME)
    seed, position, token = extreme[:, None, None], extreme[None, :, None], extreme.abs()
    many = torch.cat([token, torch.arange(1000)])
    got = noise.gumbel(seed, position, many)
    assert got.shape == (len(EXTREME), len(EXTREME), len(EXTREME) + 1000)
    assert_same(got, noise.gumbel_np(seed.numpy(), position.numpy(), many.numpy()))


def test_python_integers_wrap() -> None:
    assert noise.gumbel_np(2**64 - 5, 3, 9) == noise.gumbel_np(-5, 3, 9)
    assert noise.gumbel_np(2**64 - 5, 3, 9) == noise.gumbel_np(np.array([2**64 - 5], dtype=np.uint64), 3, 9)
    assert noise.gumbel_np(1, 3, 9) != noise.gumbel_np(1 + 2**32, 3, 9)  # the high half of the seed counts


@pytest.mark.parametrize("vocab", [1, 3, 4, 1003, 20000])
@pytest.mark.parametrize("numpy_calls", [0, 1 << 12])
def test_dense_equals_sparse(vocab: int, numpy_calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_NUMPY_CALLS", numpy_calls)
    monkeypatch.setattr(noise, "_CHUNK", 600)  # several passes, also an incomplete one
    seed, position = torch.tensor([5, -7, 2**62, 0, 1]), torch.tensor([0, 2**31, 17, 1, 1])
    sparse = noise.gumbel_np(seed.numpy()[:, None], position.numpy()[:, None], np.arange(vocab), noise.DRAFT)
    assert_same(noise.gumbel_dense(seed, position, vocab, noise.DRAFT), sparse)
    assert_same(noise.gumbel(seed[:, None], position[:, None], torch.arange(vocab), noise.DRAFT), sparse)


def test_grid_runs_start_anywhere() -> None:
    seed, position, first = torch.arange(50), torch.arange(50) * 3, torch.arange(50) * 64
    got = noise.grid_gumbel(noise.grid_runs(seed, position, first, 6, noise.RESIDUAL))
    tokens = first[:, None] + torch.arange(6)
    assert_same(got, noise.gumbel_np(seed.numpy()[:, None], position.numpy()[:, None], tokens.numpy(), noise.RESIDUAL))


def test_whole_grid() -> None:
    """All 2^23 values: the stated bounds are attained, the order is kept, and grid_floor never prunes too much."""
    index = torch.arange(1 << 23, dtype=torch.int32)
    gumbel = torch.cat([noise.grid_gumbel(part) for part in index.split(1 << 18)])
    assert float(gumbel.max()) == noise.GUMBEL_MAX
    assert float(gumbel.min()) == noise.GUMBEL_MIN
    assert bool((gumbel[1:] >= gumbel[:-1]).all())
    floor = torch.cat([noise.grid_floor(part) for part in gumbel.split(1 << 18)])
    assert bool((floor <= index).all())
    assert float((index - floor).float().mean()) < 50  # and hardly too little
    exact = -np.log(-np.log((np.arange(1 << 23) + 0.5) * 2.0**-23))
    np.testing.assert_allclose(gumbel.numpy(), exact, rtol=1e-6, atol=1e-6)


def test_grid_floor_beyond_the_range() -> None:
    floor = noise.grid_floor(torch.tensor([-torch.inf, -50.0, noise.GUMBEL_MAX, 40.0, torch.inf]))
    assert floor[:2].max() <= 0
    assert floor[2] < 1 << 23
    assert floor.max() <= 1 << 23


def test_log_accuracy_and_bits() -> None:
    x = torch.cat([torch.linspace(1e-7, 2.0, 100_003), torch.logspace(-37, 38, 5003)])
    np.testing.assert_allclose(noise.log(x).numpy(), np.log(x.numpy().astype(np.float64)), rtol=2e-7, atol=3e-8)
    assert_same(noise.log(x), noise.log_np(x.numpy()))
    assert_same(noise.log(x[::3]), noise.log_np(x.numpy()[::3].copy()))  # strided input


@pytest.mark.parametrize("axis", ["seed", "position", "token", "stream"])
def test_distribution_along_every_axis(axis: str) -> None:
    n = 200_000
    count = np.arange(n)
    address = {"seed": 3, "position": 5, "token": 8, "stream": 0} | {axis: count}
    if axis == "stream":
        words = noise.philox_np((2, 5, count, 0), (3, 0))[0]
    else:
        words = noise.bits_np(address["seed"], address["position"], address["token"])  # type: ignore[arg-type]
    uniform = ((words >> 9) + 0.5) / 2**23
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    assert stats.chisquare(np.bincount((uniform * 256).astype(int), minlength=256)).pvalue > 1e-4
    assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 4.5 / np.sqrt(n)
    gumbel = -np.log(-np.log(uniform))
    assert stats.kstest(gumbel, "gumbel_r").pvalue > 1e-4


def test_streams_are_unrelated() -> None:
    values = [noise.uniform_np(np.arange(20_000), 1, stream) for stream in range(4)]
    for a, b in pairwise(values):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(20_000)


TRITON = """
import numpy as np, torch, triton, triton.language as tl
from dspark_kernels import noise

@triton.jit
def kernel(out, seed, position, stream, BLOCK: tl.constexpr):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.int32)
    a, b, c, d = tl.philox(seed, group, zero + position, zero + stream, zero)
    tl.store(out + 4 * group, a.to(tl.int32, bitcast=True))
    tl.store(out + 4 * group + 1, b.to(tl.int32, bitcast=True))
    tl.store(out + 4 * group + 2, c.to(tl.int32, bitcast=True))
    tl.store(out + 4 * group + 3, d.to(tl.int32, bitcast=True))

for seed in (0, 1234, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822):
    for position, stream in ((0, 0), (77, 1), (2**31 - 1, 3)):
        out = torch.zeros(4 * 64, dtype=torch.int32)
        kernel[(2,)](out, torch.tensor(seed).item(), position, stream, BLOCK=32)
        want = noise.bits_np(seed, position, np.arange(4 * 64), stream)
        assert np.array_equal(out.numpy().view(np.uint32), want), (seed, position, stream)
print("equal")
"""


def test_equals_triton_philox(tmp_path: object) -> None:
    """Triton's own Philox, interpreted: a kernel may call tl.philox(seed, token >> 2, position, stream, 0)."""
    pytest.importorskip("triton")
    script = f"{tmp_path}/interpreted.py"  # triton reads a kernel's source from its file
    with open(script, "w") as file:
        file.write(TRITON)
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


def assert_same(got: torch.Tensor, want: np.ndarray) -> None:
    """Equal bit for bit, shape included."""
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert np.array_equal(got.contiguous().numpy().view(np.int32), np.ascontiguousarray(want).view(np.int32))
