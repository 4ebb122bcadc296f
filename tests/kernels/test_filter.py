"""Top-k and top-p without sorting: the tokens that `sampling` keeps by sorting, whatever the row holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dspark_kernels import native
from dspark_kernels.native import Kernels
from dspark_serve import sampling
from dspark_serve.tensors import SamplingBatch

INF, NAN = float("inf"), float("nan")
TOP_K = (0, 1, 3, 64, 10**6)
TOP_P = (1.0, 0.999999, 0.95, 0.5, 1e-6)


def rows_of(width: int) -> dict[str, Tensor]:
    """Rows of every kind that there is, each [width]."""
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(width, generator=generator)
    rows = {f"normal {scale}": normal * scale for scale in (1e-6, 0.1, 1.0, 4.0, 60.0)}
    rows |= {"ties": (normal * 2).round(), "negative": normal - 50.0, "denormal": normal * 2.0**-140}
    rows |= {"equal": torch.full((width,), -3.5), "zeros": torch.where(normal > 0, 0.0, -0.0)}
    # Most of what the 64 likeliest tie with are zeros, of either sign: all of them count for top-p.
    rows["zeros below"] = torch.where(normal > 1.8, normal + 1.5, rows["zeros"])
    for name, odd in (
        ("forbidden", -INF),
        ("infinite", INF),
        ("nan", NAN),
        ("negative nan", -torch.tensor(NAN).item()),
    ):
        rows[name] = torch.where(torch.rand(width, generator=generator) < 0.3, odd, normal)
    rows |= {"nothing": torch.full((width,), -INF), "all nan": torch.full((width,), NAN)}
    rows["highest"] = torch.where(normal > 0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min)
    return rows


def by_sorting(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    values, ids = logits.topk(logits.shape[1])
    settled, threshold = sampling._nucleus(logits, values, ids, top_k, top_p)
    assert settled.all()
    return threshold


@pytest.mark.parametrize("width", [1, 2, 63, 1003, 6001])
def test_keeps_what_sorting_keeps(kernels: Kernels, width: int) -> None:
    rows = rows_of(width)
    names, filters = zip(*itertools.product(rows, itertools.product(TOP_K, TOP_P)), strict=True)
    logits = torch.stack([rows[name] for name in names])
    top_k, top_p = torch.tensor([k for k, _ in filters]), torch.tensor([p for _, p in filters])
    got, want = (f(logits, top_k, top_p) for f in (lambda x, *a: kernels.nucleus(x, x.softmax(-1), *a), by_sorting))
    wrong = (got.isnan() != want.isnan()) | ((logits >= got[:, None]) != (logits >= want[:, None])).any(1)
    assert not wrong.any(), [(names[i], filters[i], float(got[i]), float(want[i])) for i in wrong.nonzero().flatten()]
    if width > 1:
        assert len(want.unique()) > 50  # the filters do cut at many places


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_has_the_threshold_it_has_alone(kernels: Kernels, threads: None, count: int) -> None:
    logits = torch.stack(list(rows_of(1003).values()))
    probs, top_k = logits.softmax(-1), torch.full((len(logits),), 500)
    top_p = torch.full((len(logits),), 0.9)
    torch.set_num_threads(1)
    alone = [kernels.nucleus(logits[i : i + 1], probs[i : i + 1], top_k[:1], top_p[:1]) for i in range(len(logits))]
    torch.set_num_threads(count)
    got = kernels.nucleus(logits, probs, top_k, top_p)
    torch.testing.assert_close(got, torch.cat(alone), atol=0, rtol=0, equal_nan=True)
    # A view whose rows are not adjacent is read as what it stands for.
    strided = kernels.nucleus(logits.T.contiguous().T, probs, top_k, top_p)
    torch.testing.assert_close(strided, got, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
def test_distributions_with_and_without_the_kernels(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """All of it, in rows that are settled early and rows that keep most of a vocabulary."""
    if native.load() is None:
        pytest.skip("the C++ kernels are not built")
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(8, 5000, generator=generator) * torch.linspace(0.2, 3, 8).unsqueeze(1) * scale
    batch = SamplingBatch(
        temperature=torch.tensor([1.0, 0.7, 1.0, 2.0, 0.0, 1.0, 1.0, 1.3]),
        top_k=torch.tensor([0, 0, 900, 100, 50, 4999, 0, 0]),
        top_p=torch.tensor([0.95, 0.99, 0.9, 1.0, 0.5, 0.95, 1.0, 0.3]),
        min_p=torch.tensor([0.0, 1e-3, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0]),
        seed=torch.zeros(8, dtype=torch.int64),
        position=torch.arange(8),
        all_greedy=False,
        any_filter=True,
    )
    calls, nucleus = [], Kernels.nucleus
    monkeypatch.setattr(Kernels, "nucleus", lambda self, *a: calls.append(a) or nucleus(self, *a))
    ours = sampling.target_support(logits, batch)
    assert bool(calls) == (scale < 8 or (ours.log_weights > -INF).sum(-1).max() > 64)
    monkeypatch.setattr(sampling, "_kernels", lambda logits: None)
    plain = sampling.target_support(logits, batch)
    assert torch.equal(ours.ids, plain.ids)
    assert torch.equal(ours.log_weights, plain.log_weights)


def test_nothing_to_choose_from_is_refused(kernels: Kernels) -> None:
    empty = torch.empty(2, 0)
    with pytest.raises(ValueError, match="no tokens"):
        kernels.nucleus(empty, empty, torch.ones(2, dtype=torch.int64), torch.ones(2))
