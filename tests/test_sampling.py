"""Sampling against slow and obvious references, and bitwise independence of batch, padding and pruning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from dspark_kernels import native, noise
from dspark_serve import sampling as module
from dspark_serve.sampling import (
    Support,
    apply_adjustments,
    argmax,
    draw,
    draw_logits,
    draw_target,
    logprob_table,
    target_probs,
    target_support,
)
from dspark_serve.tensors import Penalties, SamplingBatch, unpacked
from dspark_serve.types import GREEDY_TEMPERATURE


@pytest.fixture(scope="module", autouse=True, params=["torch", "c++", "unpruned"])
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """All ways to filter and draw, each through every test here; "unpruned" is what other devices than a CPU take."""
    if request.param == "c++" and native.load() is None:
        pytest.skip("the kernels are not built: this needs a C++ compiler when the package is installed")
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "c++":
            patch.setattr(module, "_kernels", lambda logits: None)
        if request.param == "unpruned":
            patch.setattr(module, "_prunes", lambda logits: False)
        yield


def sampling_batch(rows: list[dict[str, float]], first_seed: int = 0) -> SamplingBatch:
    """Parameters per sample; what a row leaves out is off. Row i has seed first_seed + i and position 10 * i."""
    default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    full = [default | row for row in rows]
    seeds = torch.arange(first_seed, first_seed + len(rows))
    return SamplingBatch(
        temperature=torch.tensor([r["temperature"] for r in full], dtype=torch.float32),
        top_k=torch.tensor([int(r["top_k"]) for r in full]),
        top_p=torch.tensor([r["top_p"] for r in full], dtype=torch.float32),
        min_p=torch.tensor([r["min_p"] for r in full], dtype=torch.float32),
        seed=seeds,
        position=torch.arange(len(rows)) * 10,
        all_greedy=all(r["temperature"] <= GREEDY_TEMPERATURE for r in full),
        any_filter=any(r["top_k"] > 0 or r["top_p"] < 1 or r["min_p"] > 0 for r in full),
    )


def rows_of(batch: SamplingBatch, index: list[int], any_filter: bool | None = None) -> SamplingBatch:
    i = torch.tensor(index)
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    return replace(
        batch,
        **{name: getattr(batch, name)[i] for name in names},
        all_greedy=bool((batch.temperature[i] <= GREEDY_TEMPERATURE).all()),
        any_filter=batch.any_filter if any_filter is None else any_filter,
    )


def reference_probs(logits: Tensor, batch: SamplingBatch) -> np.ndarray:
    """float64, one row at a time, sorting everything."""
    out = np.zeros(logits.shape)
    for i, row in enumerate(logits.numpy().astype(np.float64)):
        temperature, top_k = float(batch.temperature[i]), int(batch.top_k[i])
        if temperature <= GREEDY_TEMPERATURE:
            out[i, int(np.argmax(row))] = 1.0
            continue
        scaled = row / temperature
        probs = np.exp(scaled - scaled.max())
        probs /= probs.sum()
        keep = np.ones(len(row), dtype=bool)
        if top_k:
            keep &= scaled >= np.sort(scaled)[::-1][min(top_k, len(row)) - 1]
        if batch.top_p[i] < 1:
            renormalised = np.where(keep, probs, 0) / probs[keep].sum()
            order = np.argsort(-scaled, kind="stable")
            mass = np.cumsum(renormalised[order])
            last = order[min(int((mass < float(batch.top_p[i])).sum()), len(row) - 1)]
            keep &= scaled >= scaled[last]
        keep &= probs >= float(batch.min_p[i]) * probs.max() * (1 - 1e-6)
        out[i] = np.where(keep, probs, 0) / probs[keep].sum()
    return out


def dense_probs(support: Support, vocab: int) -> Tensor:
    return torch.zeros(len(support.ids), vocab).scatter_add_(1, support.ids, target_probs(support))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def some_logits(samples: int, vocab: int, spread: float = 3.0, seed: int = 0, grid: float = 0.0) -> Tensor:
    """Normal logits; `grid` rounds them to multiples, so that ties abound."""
    logits = torch.randn(samples, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return (logits / grid).round() * grid if grid else logits


ROWS: list[dict[str, float]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 5},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"top_k": 100_000},
    {"temperature": 0.3, "top_k": 1},
    {"top_p": 1e-6},
]

PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 63, 64, 65, 500]),
        "top_p": st.sampled_from([1.0, 0.05, 0.5, 0.95, 0.999]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5]),
    }
)


# The distribution.


@pytest.mark.parametrize("vocab", [7, 200, 3001])
@pytest.mark.parametrize("grid", [0.0, 0.5])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_support_equals_reference(vocab: int, grid: float, spread: float) -> None:
    logits, batch = some_logits(len(ROWS), vocab, spread, grid=grid), sampling_batch(ROWS)
    for i in range(len(ROWS)):  # alone and together: dense and compact supports
        alone = rows_of(batch, [i])
        got = dense_probs(target_support(logits[i : i + 1], alone), vocab)
        np.testing.assert_allclose(got, reference_probs(logits[i : i + 1], alone), atol=2e-6)
    got = dense_probs(target_support(logits, batch), vocab)
    np.testing.assert_allclose(got, reference_probs(logits, batch), atol=2e-6)


@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 10**6), st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_support_equals_reference_for_any_parameters(rows: list[dict[str, float]], seed: int, grid: float) -> None:
    logits, batch = some_logits(len(rows), 600, seed=seed, grid=grid), sampling_batch(rows)
    got = dense_probs(target_support(logits, batch), 600).numpy()
    want = reference_probs(logits, batch)
    if grid:  # a whole tie group may stand at the very edge of top_p, where the last bit decides
        agree = np.isclose(got, want, atol=2e-6).all(-1)
        edge = np.array([row["top_p"] < 1 for row in rows])
        assert (agree | edge).all()
    else:
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_ties_at_the_threshold_are_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0, 0.0]])
    assert dense_probs(target_support(logits, sampling_batch([{"top_k": 2}])), 6)[0].gt(0).tolist() == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    flat = torch.zeros(1, 1000)
    for row in ({"top_k": 3}, {"top_p": 0.01}):  # more ties than candidates
        assert dense_probs(target_support(flat, sampling_batch([row])), 1000).gt(0).all()


def test_greedy_takes_the_lowest_id_of_ties() -> None:
    logits = torch.zeros(3, 300)
    logits[2] = torch.arange(300)  # settled among the candidates: a compact support beside the greedy rows
    logits[0, 70:] = 1.0  # so many that topk happens on another first
    logits[1, [0, 299]] = 2.0
    for rows in ([{"temperature": 0.0}] * 3, [{"temperature": 0.0}] * 2 + [{"top_k": 2}]):
        batch = sampling_batch(rows)
        assert draw_target(logits, batch)[:2].tolist() == [70, 0]
        assert draw(target_support(logits, batch), batch.seed, batch.position)[:2].tolist() == [70, 0]


def test_greedy_is_a_support_of_one_token() -> None:
    support = target_support(some_logits(4, 500), sampling_batch([{"temperature": 0.0}] * 4))
    assert support.ids.shape == (4, 1)
    assert target_probs(support).tolist() == [[1.0]] * 4


@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_candidate_width_does_not_matter(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-p and top-k settled among few candidates are bitwise what sorting the whole row gives."""
    rows = [row for row in ROWS if row]
    logits, batch = some_logits(len(rows), 4000, spread), sampling_batch(rows)
    seen = []
    for width in (4000, 8, 64, 1024):
        monkeypatch.setattr(module, "_CANDIDATES", width)
        support = target_support(logits, batch)
        weights = torch.full_like(logits, -torch.inf).scatter_reduce_(1, support.ids, support.log_weights, "amax")
        seen.append((weights, draw_target(logits, batch)))
    for weights, tokens in seen[1:]:
        assert torch.equal(bits(weights), bits(seen[0][0]))
        assert torch.equal(tokens, seen[0][1])


# Independence of neighbours and padding.


@pytest.mark.parametrize("vocab", [130, 3001])
def test_rows_do_not_depend_on_the_batch(vocab: int) -> None:
    rows = ROWS * 3
    logits, batch = some_logits(len(rows), vocab), sampling_batch(rows)
    together = draw_target(logits, batch)
    for index in ([0], [3], [1, 2], [2, 8, 1], [4, 9, 3, 6], list(range(13)), list(reversed(range(len(rows))))):
        part = rows_of(batch, index)
        assert torch.equal(draw_target(logits[index], part), together[index])
        support = target_support(logits[index], part)
        assert torch.equal(draw(support, part.seed, part.position), together[index])
    for i, row in enumerate(rows):
        plain = rows_of(batch, [i], any_filter=any(k != "temperature" for k in row))
        assert torch.equal(draw_target(logits[i : i + 1], plain), together[i : i + 1])


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 16, 33])
def test_probabilities_behind_top_p_do_not_depend_on_the_batch(samples: int) -> None:
    """The one reduction that a threshold rests on: torch's softmax must treat rows alone."""
    logits = some_logits(64, 49152)
    assert torch.equal(bits(logits[:samples].softmax(-1)), bits(logits.softmax(-1)[:samples]))


def test_padding_does_not_matter() -> None:
    support = target_support(some_logits(4, 900), sampling_batch([{"top_k": 30}] * 4))
    ids = torch.cat([torch.zeros(4, 9, dtype=torch.int64), support.ids, torch.full((4, 5), 899)], dim=1)
    wide = torch.nn.functional.pad(support.log_weights, (9, 5), value=-torch.inf)
    shuffled = torch.randperm(ids.shape[1])
    for seed in range(30):
        where = torch.full((4,), seed), torch.arange(4)
        expected = draw(support, *where)
        assert torch.equal(draw(Support(ids, wide), *where), expected)
        assert torch.equal(draw(Support(ids[:, shuffled], wide[:, shuffled]), *where), expected)


# Draws.


def dense_argmax(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    gumbel = noise.gumbel_np(seed.numpy()[:, None], position.numpy()[:, None], np.arange(logits.shape[1]), stream)
    return torch.from_numpy(np.argmax((logits / temperature[:, None]).numpy() + gumbel, axis=1))


@given(
    st.integers(1, 6),
    st.sampled_from([1, 2, 5, 64, 65, 200, 1003]),
    st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]),
    st.sampled_from([0.02, 0.5, 1.0, 3.0, 100.0]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 10**9),
)
@settings(max_examples=150, deadline=None)
def test_pruned_draw_is_the_dense_argmax(
    samples: int, vocab: int, spread: float, temperature: float, grid: float, seed: int
) -> None:
    logits = some_logits(samples, vocab, spread, seed, grid) + seed % 50  # an offset tests the rounding slack
    if seed % 3 == 0:
        logits[:, seed % vocab :: 3] = -torch.inf
        logits[:, 0] = 1.0
    temperatures = torch.full((samples,), temperature)
    address = torch.arange(samples) + seed, torch.arange(samples) * 5
    for stream in (noise.GUMBEL, noise.RESIDUAL):
        want = dense_argmax(logits, temperatures, *address, stream)
        assert torch.equal(draw_logits(logits, temperatures, *address, stream), want)
        dense = Support(torch.arange(vocab).expand(samples, vocab), logits / temperatures[:, None], dense=True)
        assert torch.equal(draw(dense, *address, stream), want)
        assert torch.equal(draw(replace(dense, dense=False), *address, stream), want)


def test_rare_winners_survive_the_pruning() -> None:
    """A token far below the best wins when its noise is among the largest there are."""
    seed, positions = torch.zeros(1, dtype=torch.int64), torch.arange(400)
    gumbel = noise.gumbel_dense(seed.expand(400), positions, 2000)
    row, token = divmod(int(gumbel.flatten().argmax()), 2000)
    assert gumbel[row, token] > 12
    best = int(gumbel[row].argmin())
    logits = torch.full((1, 2000), -40.0)
    logits[0, best], logits[0, token] = 0.0, float(gumbel[row, best] - gumbel[row, token]) + 1e-3
    args = torch.ones(1), seed, positions[row : row + 1]
    assert int(draw_logits(logits, *args)) == token
    logits[0, token] -= 2e-3
    assert int(draw_logits(logits, *args)) == best


def test_equal_scores_take_the_lowest_id() -> None:
    logits = torch.zeros(1, 500)
    logits[0, [130, 131, 400]] = 1e9  # next to which any noise is lost in rounding
    address = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert draw_logits(logits, torch.ones(1), *address).tolist() == [130]
    support = Support(torch.tensor([[400, 131, 5, 130]]), torch.tensor([[1e9, 1e9, 0.0, 1e9]]))
    assert draw(support, *address).tolist() == [130]


@pytest.mark.parametrize("row", [{}, {"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 4, "temperature": 2.0}])
def test_draw_frequencies(row: dict[str, float]) -> None:
    n, vocab = 20_000, 12
    logits = some_logits(1, vocab, 1.5, seed=4)
    one = sampling_batch([row])
    batch = replace(rows_of(one, [0] * n), seed=torch.arange(n), position=torch.full((n,), 3))
    counts = np.bincount(draw_target(logits.expand(n, vocab), batch).numpy(), minlength=vocab)
    expected = reference_probs(logits, one)[0] * n
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    assert stats.chisquare(counts[seen], expected[seen]).pvalue > 1e-4


@given(st.integers(1, 400), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_argmax(vocab: int, samples: int, seed: int) -> None:
    logits = some_logits(samples, vocab, 1.0, seed, grid=0.5)
    assert torch.equal(argmax(logits), torch.from_numpy(logits.numpy().argmax(-1)))
    logits[0, seed % vocab] = torch.nan
    assert int(argmax(logits)[0]) == seed % vocab


@pytest.mark.parametrize("vocab", [50, 3000])
@pytest.mark.parametrize("poison", ["nan", "all nan", "all -inf", "inf"])
def test_poisoned_rows_yield_a_valid_token_and_harm_nobody(vocab: int, poison: str) -> None:
    clean = some_logits(len(ROWS), vocab)
    batch = sampling_batch(ROWS)
    for target in range(len(ROWS)):
        logits = clean.clone()
        logits[target, slice(17, 18) if poison in ("nan", "inf") else slice(None)] = float(poison.split()[-1])
        for b in (batch, rows_of(batch, list(range(len(ROWS))), any_filter=False)):
            tokens = draw_target(logits, b)
            assert ((tokens >= 0) & (tokens < vocab)).all()
            others = torch.arange(len(ROWS)) != target
            assert torch.equal(tokens[others], draw_target(clean, b)[others])


# Adjustments and log-probabilities.


def test_no_adjustment_is_no_copy() -> None:
    logits = some_logits(2, 50)
    assert apply_adjustments(logits, sampling_batch([{}, {}])) is logits


def test_adjustments_against_a_loop() -> None:
    logits = some_logits(3, 40)
    entries = [  # sample, token, times generated, presence, frequency, repetition
        (0, 3, 2.0, 0.5, 0.25, 1.0),
        (0, 7, 0.0, 0.5, 0.25, 1.0),
        (2, 3, 1.0, -0.5, 0.0, 1.3),
        (2, 39, 0.0, -0.5, 0.0, 1.3),
        (2, 5, 4.0, 0.0, -0.1, 0.8),
    ]
    bias = [(1, 4, 2.5), (2, 3, -1.0), (0, 0, -torch.inf), (1, 4, 1.0)]
    columns = list(zip(*entries, strict=True))
    batch = replace(
        sampling_batch([{}] * 3),
        penalties=Penalties(*[torch.tensor(c) for c in columns]),
        bias_sample=torch.tensor([b[0] for b in bias]),
        bias_token=torch.tensor([b[1] for b in bias]),
        bias_value=torch.tensor([b[2] for b in bias]),
    )
    want = logits.double().numpy().copy()
    for s, t, generated, presence, frequency, repetition in entries:
        want[s, t] = want[s, t] / repetition if want[s, t] > 0 else want[s, t] * repetition
        want[s, t] -= presence * (generated > 0) + frequency * generated
    for s, t, value in bias:
        want[s, t] += value
    before = logits.clone()
    np.testing.assert_allclose(apply_adjustments(logits, batch), want, atol=1e-6)
    assert torch.equal(logits, before)
    # All ways in see them, and the forbidden token is never drawn.
    assert dense_probs(target_support(logits, batch), 40)[0, 0] == 0
    greedy = replace(batch, temperature=torch.zeros(3), all_greedy=True)
    assert draw_target(logits, greedy).tolist() == want.argmax(-1).tolist()


def test_logprob_table() -> None:
    logits = some_logits(5, 3000)
    chosen = torch.tensor([int(logits[0].argmax()), 1, 2, 3, int(logits[4].argmin())])
    table = logprob_table(logits, chosen, 4)
    want = logits.double().log_softmax(-1)
    np.testing.assert_allclose(table.chosen, want.gather(1, chosen[:, None])[:, 0], atol=1e-5)
    assert table.rank.tolist() == [1 + int((row > row[c]).sum()) for row, c in zip(logits, chosen, strict=True)]
    assert (table.rank[0], table.rank[4]) == (1, 3000)
    assert torch.equal(table.top_ids, logits.topk(4).indices)
    np.testing.assert_allclose(table.top_values, want.topk(4).values, atol=1e-5)
    told = unpacked(table.packed().numpy(), 3)
    assert [each.token_id for each in told] == chosen.tolist()
    assert [each.rank for each in told] == table.rank.tolist()
    np.testing.assert_array_equal([each.logprob for each in told], table.chosen)
    assert [[token for token, _ in each.top] for each in told] == table.top_ids[:, :3].tolist()
    np.testing.assert_array_equal([[value for _, value in each.top] for each in told], table.top_values[:, :3])
    alone = logprob_table(logits, chosen, 0)
    assert alone.top_ids.shape == (5, 0)
    assert [each.top for each in unpacked(alone.packed().numpy(), 0)] == [()] * 5
