"""The C++ products against float64 arithmetic, and their bits: nothing but a row's own numbers may decide them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels import native, noise
from dspark_kernels.native import Kernels
from dspark_kernels.packed import PackedWeight
from dspark_serve.models.loader import load_model, resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from helpers import INSTRUCTION_SETS, load_kernels, run_one

SHAPES = [(1, 1), (5, 3), (33, 16), (64, 48), (100, 576), (70, 1536)]  # [outputs, inputs]
ROWS = (1, 2, 3, 5, 6, 7, 8, 12, 13, 16, 25, 64)


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, atol=1e-5 * float(want.abs().max() + 1), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_products(kernels: Kernels, shape: tuple[int, int], rows: int) -> None:
    weight, bias, x, residual = randoms(shape, shape[:1], (rows, shape[1]), (rows, shape[0]))
    plain = x.double() @ weight.double().T
    close(kernels.product(x, PackedWeight(kernels, weight, None, False)), plain)
    packed = PackedWeight(kernels, weight, bias, False)
    close(kernels.product(x, packed), plain + bias)
    close(kernels.product(x, packed, residual=residual), plain + bias + residual)


@pytest.mark.parametrize("half", [1, 20, 64, 112])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_products(kernels: Kernels, half: int, biased: bool) -> None:
    weight, bias, x = randoms((2 * half, 48), (2 * half,), (7, 48))
    both = x.double() @ weight.double().T + (bias if biased else 0)
    gate, up = both.split(half, dim=1)
    close(kernels.product(x, PackedWeight(kernels, weight, bias if biased else None, True)), F.silu(gate) * up)


def test_gates_of_any_size(kernels: Kernels) -> None:
    """The exponential over its whole range: gates far out must give 0 or themselves, not infinity or NaN."""
    gates = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e30, 1e30, 0.0, -0.0, 1e-40])])
    x = torch.stack([gates, torch.ones_like(gates)], dim=1)  # one gate, one up per row
    got = kernels.product(x, PackedWeight(kernels, torch.eye(2), None, True))
    torch.testing.assert_close(got[:, 0], F.silu(gates.double()).float(), atol=1e-34, rtol=3e-7)


@pytest.mark.parametrize("rows", [1, 4, 30])
def test_the_norm_comes_first(kernels: Kernels, rows: int) -> None:
    weight, norm, x = randoms((70, 96), (96,), (rows, 96))
    normed = F.rms_norm(x.double(), (96,), norm.double(), 1e-5)
    got = kernels.product(x, PackedWeight(kernels, weight, None, False), norm, 1e-5)
    close(got, normed @ weight.double().T)


def every_product(kernels: Kernels, weights: list[PackedWeight], x: Tensor, norm: Tensor, residual: Tensor) -> Tensor:
    plain, gated = weights
    parts = [
        kernels.product(x, plain),
        kernels.product(x, plain, norm, 1e-5),
        kernels.product(x, plain, residual=residual),
        kernels.product(x, gated, norm, 1e-5),
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_rows_place_or_threads(kernels: Kernels) -> None:
    weight, bias, norm, x, residual = randoms((200, 576), (200,), (576,), (80, 576), (80, 200))
    weights = [PackedWeight(kernels, weight, bias, gated) for gated in (False, True)]
    whole = every_product(kernels, weights, x, norm, residual)
    for count in (1, 2, 3, 4, 8, 64):
        torch.set_num_threads(count)
        for rows in (1, 2, 5, 7, 13, 80):
            for first in {0, 80 - rows, (80 - rows) // 2}:
                some = slice(first, first + rows)
                got = every_product(kernels, weights, x[some], norm, residual[some].contiguous())
                assert torch.equal(got, whole[some]), (count, rows, first)


def test_bits_do_not_depend_on_alignment(kernels: Kernels) -> None:
    weight, x = randoms((50, 48), (9, 48))
    packed = PackedWeight(kernels, weight, None, False)
    shifted = torch.empty(9, 53)[:, 3:51]
    shifted.copy_(x)
    assert torch.equal(kernels.product(shifted, packed), kernels.product(x, packed))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_leaves_the_others_alone(kernels: Kernels, poison: float) -> None:
    weight, bias, norm, x, residual = randoms((200, 576), (200,), (576,), (14, 576), (14, 200))
    weights = [PackedWeight(kernels, weight, bias, gated) for gated in (False, True)]
    clean = every_product(kernels, weights, x, norm, residual)
    x[6, 100] = poison
    dirty = every_product(kernels, weights, x, norm, residual)
    others = [row for row in range(14) if row != 6]
    assert torch.equal(dirty[others], clean[others])
    assert not dirty[6].isfinite().all()


def test_denormals_are_numbers(kernels: Kernels) -> None:
    x = torch.full((3, 16), 1e-40)
    got = kernels.product(x, PackedWeight(kernels, torch.full((5, 16), 0.5), None, False))
    torch.testing.assert_close(got, torch.full((3, 5), 8e-40), atol=1e-44, rtol=1e-4)


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    packed = PackedWeight(kernels, torch.ones(4, 8), None, False)
    with pytest.raises(ValueError, match="does not fit a weight of 8 inputs"):
        kernels.product(torch.ones(2, 7), packed)
    with pytest.raises(ValueError, match="not row-major"):
        kernels.product(torch.ones(8, 2).T, packed)
    with pytest.raises(ValueError, match="main memory"):
        PackedWeight(kernels, torch.ones(4, 8, device="meta"), None, False)


TARGET = Path(__file__).parents[1] / "goldens" / "target"
SERVE = f"""
from dspark_serve.models.loader import load_model, resolve
print(load_model(resolve({str(TARGET)!r}), device="cpu").info.backend)
"""


@pytest.mark.parametrize(("capability", "isa"), [("default", "portable"), ("avx2", "avx2")])
def test_the_instruction_set_is_limited_as_torch_is(capability: str, isa: str) -> None:
    """A machine without AVX runs the portable kernels, and its start-up line says so: seen by masking what it has."""
    load_kernels("base")
    if isa == "avx2" and "avx2" not in INSTRUCTION_SETS:
        pytest.skip("needs a CPU with AVX2")
    if isa == "portable" and os.uname().machine not in ("x86_64", "AMD64"):
        isa = "neon"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", SERVE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"native {isa} float32, weights in ")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Kernels are looked for anew, now and afterwards."""
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_built_kernels_there_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.load() is None
    assert not caplog.records


@pytest.mark.usefixtures("fresh")
def test_without_an_openmp_runtime_torch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_kernels("base")
    served = run_one(load_model(resolve(str(TARGET)), device="cpu"), [5, 9, 100, 7]).logits
    native.load.cache_clear()

    def missing() -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(native, "_share_openmp", missing)
    model = load_model(resolve(str(TARGET)), device="cpu")
    assert not model.info.backend.startswith("native")
    close(run_one(model, [5, 9, 100, 7]).logits, served.double())
    (record,) = caplog.records  # one sentence, however many libraries there are and however often they are asked for
    assert "cannot be loaded, torch serves instead" in record.getMessage()
    assert "libgomp.so.1: cannot open" in record.getMessage()


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="needs a CPU with AVX2: a set below which there is another")
def test_a_broken_library_leaves_the_next_one_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = Path(load_kernels(INSTRUCTION_SETS[-2]).library._name)
    (tmp_path / good.name).symlink_to(good)
    broken = tmp_path / f"_cpu_{INSTRUCTION_SETS[-1]}.so"
    broken.write_bytes(b"a library of another machine")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.load.cache_clear()
    kernels = native.load()
    assert kernels is not None
    assert kernels.isa in ("portable", INSTRUCTION_SETS[-2])
    assert f"{broken.name}: " in caplog.text
    assert f"C++ kernels for {kernels.isa} serve" in caplog.text


@pytest.mark.parametrize("rows", [1, 5, 14])
def test_the_end_of_a_layer_has_the_bits_of_its_parts(kernels: Kernels, rows: int) -> None:
    attended, hidden, norm = randoms((rows, 48), (rows, 96), (96,))
    shapes = [((96, 48), False), ((2 * 80, 96), True), ((96, 80), False)]
    out, gate_up, down = (PackedWeight(kernels, *randoms(s, s[:1]), gated) for s, gated in shapes)
    got = kernels.finish_layer(attended, hidden, out, norm, 1e-5, gate_up, down)
    middle = kernels.product(attended, out, residual=hidden)
    assert torch.equal(got, kernels.product(kernels.product(middle, gate_up, norm, 1e-5), down, residual=middle))


@pytest.mark.parametrize("width", [1, 3, 63, 64, 65, 200, 1003, 49152])
def test_draws_are_those_of_the_noise(kernels: Kernels, width: int) -> None:
    """Against the argmax over dense numpy noise: any width, streams, seeds of 64 bits, greedy rows, tokens by id."""
    rows = 9
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(rows, width, generator=generator) * 2
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), generator=generator)
    position = torch.randint(0, 1 << 31, (rows,), generator=generator)
    temperature = torch.tensor([0.0, 0.01, 0.3, 0.7, 1.0, 1.3, 2.0, 50.0, 1e-6])
    greedy = temperature <= 1e-5
    few = torch.randperm(3 * width, generator=generator)[:width]
    for stream, ids in ((noise.GUMBEL, None), (noise.DRAFT, few), (noise.GUMBEL, few.expand(rows, width))):
        tokens = torch.arange(width) if ids is None else few
        gumbel = noise.gumbel_np(seed.numpy()[:, None], position.numpy()[:, None], tokens.numpy()[None], stream)
        scores = logits / temperature.masked_fill(greedy, 1.0)[:, None] + torch.from_numpy(gumbel)
        want = tokens[torch.where(greedy, logits.argmax(-1), scores.argmax(-1))]
        assert torch.equal(kernels.draw(logits, temperature, seed, position, stream, 1e-5, ids), want)
        wide = torch.randn(rows, width + 5)
        wide[:, :width] = logits  # rows with a gap between them
        assert torch.equal(kernels.draw(wide[:, :width], temperature, seed, position, stream, 1e-5, ids), want)
        alone = [kernels.draw(*(t[i : i + 1] for t in (logits, temperature, seed, position)), stream, 1e-5, few_of)
                 for i in range(rows) for few_of in (None if ids is None else few,)]  # fmt: skip
        assert torch.equal(torch.cat(alone), want)


def test_a_draw_from_nan_is_its_first(kernels: Kernels) -> None:
    logits = torch.zeros(2, 100)
    logits[0, 70:72] = torch.nan
    where = torch.ones(2), torch.arange(2), torch.arange(2)
    assert int(kernels.draw(logits, *where, noise.GUMBEL, 1e-5)[0]) == 70
