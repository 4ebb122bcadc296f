"""The rule: coupled equals plain sampling token for token, rejection equals it in distribution, goldens reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from dspark_kernels import noise
from dspark_serve.sampling import draw_target, target_probs, target_support
from dspark_serve.speculation import verify as module
from dspark_serve.speculation.verify import accept_lengths, residual_probs, verify
from dspark_serve.tensors import SamplingBatch, StepBatch
from dspark_serve.types import GREEDY_TEMPERATURE, VerifyMode

GOLDEN = Path(__file__).parent.parent / "data" / "verify_vectors.safetensors"
MODES: tuple[VerifyMode, ...] = ("coupled", "rejection")


def step_batch(
    drafts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    samples: Sequence[bool] | None = None,
    draft_probs: Tensor | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    first_seed: int = 0,
) -> StepBatch:
    """Rows with the given drafts, one temperature per row; row r has seed first_seed + r and starts at position 7 r."""
    samples = samples or [True] * len(drafts)
    lens = tuple(len(d) + 1 if s else 0 for d, s in zip(drafts, samples, strict=True))
    width = max(len(d) for d in drafts)
    row = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))  # [samples]
    slot = torch.cat([torch.arange(n) for n in lens])
    temperature = torch.tensor(temperatures, dtype=torch.float32)[row]
    n = len(row)
    sampling = SamplingBatch(
        temperature=temperature,
        top_k=torch.full((n,), top_k),
        top_p=torch.full((n,), top_p),
        min_p=torch.zeros(n),
        seed=row + first_seed,
        position=7 * row + slot,
        all_greedy=bool((temperature <= GREEDY_TEMPERATURE).all()),
        any_filter=bool(top_k or top_p < 1),
    )
    empty = torch.empty(0, dtype=torch.int64)
    padded = [[*d, *([-1] * (width - len(d)))] for d in drafts]
    return StepBatch(
        token_ids=empty,
        positions=empty,
        slots=empty,
        page_table=empty,
        query_lens=tuple(len(d) + 1 for d in drafts),
        context_lens=tuple(len(d) + 9 for d in drafts),
        sample_index=torch.arange(n),
        sample_lens=lens,
        drafts=torch.tensor(padded, dtype=torch.int64).reshape(len(drafts), width),
        draft_probs=draft_probs,
        sampling=sampling,
        logprobs=(None,) * len(drafts),
    )


def some_logits(samples: int, vocab: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    return torch.randn(samples, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def plausible_drafts(logits: Tensor, lens: Sequence[int], temperature: float, seed: int) -> list[list[int]]:
    """Drafts that often match: the target's own draws, some of them replaced."""
    rng = np.random.default_rng(seed)
    shapes = step_batch([[0] * n for n in lens], [temperature] * len(lens))
    own = draw_target(logits[: shapes.num_samples], shapes.sampling).tolist()
    drafts = []
    for n in lens:
        row, own = own[:n], own[n + 1 :]
        drafts.append([t if rng.random() < 0.8 else int(rng.integers(logits.shape[1])) for t in row])
    return drafts


# Coupled.


def slow_coupled(logits: Tensor, batch: StepBatch) -> tuple[list[int], list[list[int]]]:
    """One token at a time, as a plain decoder would."""
    counts, out, start = [], [], 0
    for r, n in enumerate(batch.sample_lens):
        tokens: list[int] = []
        accepted = 0
        for i in range(n):
            s = start + i
            row = logits[s].numpy()
            temperature = float(batch.sampling.temperature[s])
            if temperature > GREEDY_TEMPERATURE:
                seed, position = int(batch.sampling.seed[s]), int(batch.sampling.position[s])
                row = row / np.float32(temperature) + noise.gumbel_np(seed, position, np.arange(len(row)))
            token = int(np.argmax(row))
            tokens.append(token)
            if i == n - 1 or token != int(batch.drafts[r, i]):
                break
            accepted += 1
        start += n
        counts.append(accepted)
        out.append(tokens + [-1] * (batch.drafts.shape[1] + 1 - len(tokens)))
    return counts, out


ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.booleans(), st.sampled_from([0.0, 0.7, 1.0, 2.0])), min_size=1, max_size=7
)


@given(ROWS, st.integers(0, 10**6), st.sampled_from([11, 130]))
@settings(max_examples=80, deadline=None)
def test_coupled_equals_plain_sampling(rows: list[tuple[int, bool, float]], seed: int, vocab: int) -> None:
    lens = [n for n, _, _ in rows]
    logits = some_logits(sum(lens) + len(lens) + 3, vocab, seed)  # more rows than samples: scores follow
    drafts = plausible_drafts(logits, lens, rows[0][2], seed)
    batch = step_batch(drafts, [t for _, _, t in rows], [s for _, s, _ in rows])
    verdict = verify(logits, batch, "coupled")
    counts, tokens = slow_coupled(logits, batch)
    assert verdict.n_accepted.tolist() == counts
    assert verdict.tokens.tolist() == tokens
    for row, result, n in zip(rows, verdict.to_host(), counts, strict=True):
        assert len(result.tokens) == (n + 1 if row[1] else 0)


@pytest.mark.parametrize("top", [{"top_k": 4}, {"top_p": 0.8}])
def test_coupled_text_does_not_depend_on_drafts(top: dict[str, float]) -> None:
    """With any drafts the tokens are a prefix of the target's own draws."""
    logits = some_logits(5 * 6, 50)
    own = draw_target(logits, step_batch([[0] * 5] * 5, [1.0] * 5, **top).sampling).view(5, 6)  # type: ignore[arg-type]
    for seed in range(10):
        drafts = np.random.default_rng(seed).integers(0, 50, (5, 5))
        mine = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)) < 0.7
        drafts = torch.where(mine, own[:, :5], torch.from_numpy(drafts))
        verdict = verify(logits, step_batch(drafts.tolist(), [1.0] * 5, **top), "coupled")  # type: ignore[arg-type]
        for r, n in enumerate(verdict.n_accepted.tolist()):
            assert verdict.tokens[r, : n + 1].tolist() == own[r, : n + 1].tolist()
            assert n == 5 or drafts[r, n] != own[r, n]


# Both modes.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("certain", [True, False])
def test_greedy_is_exact_match(mode: VerifyMode, certain: bool) -> None:
    lens = [0, 3, 5, 1, 4, 5]
    logits = some_logits(sum(lens) + len(lens), 40)
    drafts = plausible_drafts(logits, lens, 0.0, seed=3)
    probs = torch.rand(len(lens), 5, 40).softmax(-1)
    batch = step_batch(drafts, [0.0] * 6, draft_probs=None if certain else probs)
    mixed = step_batch(drafts, [0.0] * 5 + [1.0], draft_probs=None if certain else probs)
    counts, tokens = slow_coupled(logits, batch)
    assert 0 < sum(counts) < sum(lens)
    verdict, neighbour = verify(logits, batch, mode), verify(logits, mixed, mode)
    assert (verdict.n_accepted.tolist(), verdict.tokens.tolist()) == (counts, tokens)
    assert (neighbour.n_accepted.tolist()[:5], neighbour.tokens.tolist()[:5]) == (counts[:5], tokens[:5])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [0, 3])
def test_rows_that_do_not_sample(mode: VerifyMode, width: int) -> None:
    logits = some_logits(4, 20)
    verdict = verify(logits, step_batch([[1] * width] * 2, [1.0] * 2, [False, False]), mode)
    assert verdict.n_accepted.tolist() == [0, 0]
    assert verdict.tokens.tolist() == [[-1] * (width + 1)] * 2
    assert [r.tokens for r in verdict.to_host()] == [(), ()]
    # A non-sampling row whose clamped samples belong to others stays silent, first, middle and last.
    batch = step_batch([[], [5, 6], [], [7]], [1.0] * 4, [False, True, False, False])
    verdict = verify(logits, batch, mode)
    assert (verdict.tokens[[0, 2, 3]] == -1).all()
    assert (verdict.tokens[1] >= 0).any()
    assert verdict.n_accepted[[0, 2, 3]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_nan_rows_do_not_crash(mode: VerifyMode) -> None:
    logits = some_logits(8, 30)
    logits[2] = torch.nan
    for temperature in (0.0, 1.0):
        verdict = verify(logits, step_batch([[1, 2, 3], [4, 5, 6]], [temperature] * 2), mode)
        for result in verdict.to_host():
            assert result.tokens
            assert all(0 <= token < 30 for token in result.tokens)


# Rejection.


def slow_rejection(logits: Tensor, batch: StepBatch) -> tuple[list[int], list[list[int]]]:
    """Leviathan et al. 2023, algorithm 1, row by row in float64."""
    counts, out, start = [], [], 0
    for r, n in enumerate(batch.sample_lens):
        tokens: list[int] = []
        for i in range(n):
            s = start + i
            address = int(batch.sampling.seed[s]), int(batch.sampling.position[s])
            target = (logits[s].double() / float(batch.sampling.temperature[s])).softmax(-1).numpy()
            weights = target
            if i < n - 1:
                draft = int(batch.drafts[r, i])
                drafted = np.eye(len(target))[draft] if batch.draft_probs is None else batch.draft_probs[r, i].numpy()
                if noise.uniform_np(*address, noise.ACCEPT) < target[draft] / drafted[draft]:
                    tokens.append(draft)
                    continue
                weights = np.maximum(target - drafted, 0)
            with np.errstate(divide="ignore"):
                score = np.log(weights) + noise.gumbel_np(*address, np.arange(len(weights)), noise.RESIDUAL)
            tokens.append(int(np.argmax(score)))
            break
        start += n
        counts.append(max(0, len(tokens) - 1))
        out.append(tokens + [-1] * (batch.drafts.shape[1] + 1 - len(tokens)))
    return counts, out


@given(ROWS, st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rejection_equals_the_algorithm(rows: list[tuple[int, bool, float]], seed: int, certain: bool) -> None:
    lens, vocab = [n for n, _, _ in rows], 13
    logits = some_logits(sum(lens) + len(lens), vocab, seed)
    drafts = plausible_drafts(logits, lens, 1.0, seed)
    probs = None if certain else some_logits(len(rows) * max(lens), vocab, seed + 1).softmax(-1)
    probs = probs if probs is None else probs.view(len(rows), max(lens), vocab)
    batch = step_batch(drafts, [t or 1.3 for _, _, t in rows], [s for _, s, _ in rows], probs, first_seed=seed)
    verdict = verify(logits, batch, "rejection")
    counts, tokens = slow_rejection(logits, batch)
    assert verdict.n_accepted.tolist() == counts
    assert verdict.tokens.tolist() == tokens


def first_two_tokens(trials: int, certain: bool, top: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Tokens of `trials` independent speculative steps with two drafts each -> histograms [6, 6], expected [6, 6].

    Target logits depend on the token before, drafts come from a similar but different distribution, and a step that
    accepts nothing takes its second token from a plain draw, as the next step would.
    """
    vocab = 6
    target = some_logits(vocab + 1, vocab, seed=1)  # row v: after token v; the last row: after the anchor
    drafter = (target + some_logits(vocab + 1, vocab, seed=2, spread=0.7)).softmax(-1)
    seeds, n = torch.arange(trials), torch.arange(trials) * 0
    if certain:  # the most likely token, without randomness
        first = drafter[vocab].argmax() + n
        second = drafter[first].argmax(-1)
    else:
        rng = torch.Generator().manual_seed(9)
        first = torch.multinomial(drafter[vocab].expand(trials, -1), 1, generator=rng)[:, 0]
        second = torch.multinomial(drafter[first], 1, generator=rng)[:, 0]
    probs = torch.stack([drafter[vocab].expand(trials, -1), drafter[first]], dim=1)
    drafts = torch.stack([first, second], dim=1)
    logits = torch.stack([target[vocab].expand(trials, -1), target[first], target[second]], dim=1).flatten(0, 1)
    batch = step_batch(drafts.tolist(), [1.0] * trials, draft_probs=None if certain else probs, **top)  # type: ignore[arg-type]
    tokens = verify(logits, batch, "rejection").tokens
    plain = step_batch([[]] * trials, [1.0] * trials, first_seed=10**6, **top)  # type: ignore[arg-type]
    plain = replace(plain, sampling=replace(plain.sampling, position=seeds))
    after = verify(target[tokens[:, 0]], plain, "rejection").tokens[:, 0]
    second_token = torch.where(tokens[:, 1] >= 0, tokens[:, 1], after)
    counts = torch.bincount(tokens[:, 0] * vocab + second_token, minlength=vocab * vocab)

    shapes = step_batch([[]] * (vocab + 1), [1.0] * (vocab + 1), **top)  # type: ignore[arg-type]
    support = target_support(target, shapes.sampling)
    exact = torch.zeros(vocab + 1, vocab).scatter_add_(1, support.ids, target_probs(support)).double()
    return counts, (exact[vocab].unsqueeze(1) * exact[:vocab]).flatten() * trials


def chi_square_pvalue(counts: Tensor, expected: Tensor) -> float:
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    observed, wanted = counts[seen].double(), expected[seen]
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("top", [{}, {"top_k": 4}])
def test_rejection_has_the_targets_distribution(certain: bool, top: dict[str, float]) -> None:
    assert chi_square_pvalue(*first_two_tokens(20_000, certain, top)) > 1e-4


@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("bias", ["accept too much", "accept too little", "residual is the target"])
def test_biased_rules_are_caught(certain: bool, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above has the power to see a rule that is only slightly wrong."""
    if bias == "residual is the target":
        monkeypatch.setattr(module, "residual_probs", lambda target, draft: target)
    else:
        factor = 0.9 if bias == "accept too much" else 1.15
        monkeypatch.setattr(module, "accept_lengths", lambda t, d, u: accept_lengths(t, d, u * factor))
    assert chi_square_pvalue(*first_two_tokens(20_000, certain, {})) < 1e-6


# Pure parts.


def test_residual_of_equal_distributions_is_the_target() -> None:
    probs = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    assert torch.equal(residual_probs(probs, probs), probs)
    assert torch.equal(residual_probs(probs, torch.zeros_like(probs)), probs)
    assert torch.equal(residual_probs(probs, 1 - probs), torch.tensor([[0.0, 0.5], [1.0, 0.0]]))


def test_golden_vectors() -> None:
    """64 cases of an independent implementation, driven by its own uniforms."""
    data = load_file(GOLDEN)
    temperature, drafts = data["temperature"], data["draft_tokens"].long()
    greedy = temperature <= GREEDY_TEMPERATURE

    def distribution(logits: Tensor) -> Tensor:
        scaled = (logits / temperature.masked_fill(greedy, 1.0)[:, None, None]).softmax(-1)
        one_hot = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        return torch.where(greedy[:, None, None], one_hot, scaled)

    target, draft = distribution(data["target_logits"]), distribution(data["draft_logits"])
    at_draft = drafts.unsqueeze(-1)
    n_accepted = accept_lengths(
        target[:, :-1].gather(-1, at_draft).squeeze(-1), draft.gather(-1, at_draft).squeeze(-1), data["uniforms"]
    )
    assert n_accepted.tolist() == data["accepted"].tolist()
    drafted = torch.nn.functional.pad(draft, (0, 0, 0, 1))  # nothing drafted for the bonus token
    case = torch.arange(len(drafts))
    weights = residual_probs(target[case, n_accepted], drafted[case, n_accepted])
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), data["next_token_dist"], atol=2e-6, rtol=1e-4)


def test_golden_vectors_through_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cases through the whole rule: acceptance, and the distribution that the next token is drawn from."""
    data = load_file(GOLDEN)
    temperature, drafts = data["temperature"], data["draft_tokens"].long()
    divisor = temperature.masked_fill(temperature <= GREEDY_TEMPERATURE, 1e-9)[:, None, None]
    draft_probs = (data["draft_logits"].double() / divisor).softmax(-1).float()
    batch = step_batch(drafts.tolist(), temperature.tolist(), draft_probs=draft_probs)
    seen: list[Tensor] = []

    def residual(target: Tensor, draft: Tensor) -> Tensor:
        seen.append(residual_probs(target, draft))
        return seen[-1]

    monkeypatch.setattr(noise, "uniform", lambda *args: data["uniforms"])
    monkeypatch.setattr(module, "residual_probs", residual)
    verdict = verify(data["target_logits"].flatten(0, 1), batch, "rejection")
    assert verdict.n_accepted.tolist() == data["accepted"].tolist()
    weights = seen[0] / seen[0].sum(-1, keepdim=True)
    torch.testing.assert_close(weights, data["next_token_dist"], atol=2e-6, rtol=1e-4)
    for r, n in enumerate(verdict.n_accepted.tolist()):
        assert verdict.tokens[r, :n].tolist() == drafts[r, :n].tolist()
        assert data["next_token_dist"][r, verdict.tokens[r, n]] > 0


# --- the paper's Appendix A: what a budget may look at ---------------------------------------------------------------

SPEED = (1.0, 0.5, 0.45)  # steps per second at 1, 2 and 3 tokens
TARGET_A, ROWS = 0.7, 4000


def best_of_the_curve(first_draft: int, looks_ahead: bool) -> int:
    """Drafts kept for one request: survival 0.8 for the first, and for the second 0.9 of that or nothing, by what the
    first one is. A causal budget stops at the first draft that does not pay; the other one sees both and picks."""
    expected = (1.0, 1.8, 1.8 + 0.8 * (0.9 if first_draft == 0 else 0.0))
    rates = [tokens * speed for tokens, speed in zip(expected, SPEED, strict=True)]
    if looks_ahead:
        return int(np.argmax(rates))
    return next((kept for kept in (0, 1) if rates[kept + 1] <= rates[kept]), 2)


def first_tokens(looks_ahead: bool, mode: VerifyMode) -> Tensor:
    """The first token of many requests whose target says A with 0.7, drafted by fair coins."""
    first = torch.randint(0, 2, (ROWS,), generator=torch.Generator().manual_seed(1)).tolist()
    drafts = [[token, 0][: best_of_the_curve(token, looks_ahead)] for token in first]
    width = max(map(len, drafts))
    probs = torch.full((ROWS, width, 2), 0.5) if width else None
    batch = step_batch(drafts, [1.0] * ROWS, draft_probs=probs)
    logits = torch.tensor([TARGET_A, 1 - TARGET_A]).log().expand(batch.num_samples, 2).contiguous()
    return verify(logits, batch, mode).tokens[:, 0]


def p_value(tokens: Tensor) -> float:
    counts = torch.bincount(tokens, minlength=2).tolist()
    return float(stats.chisquare(counts, [TARGET_A * ROWS, (1 - TARGET_A) * ROWS]).pvalue)


def test_a_budget_that_looks_ahead_biases_rejection() -> None:
    biased = first_tokens(looks_ahead=True, mode="rejection")
    assert p_value(biased) < 1e-20
    assert abs(float((biased == 0).float().mean()) - 0.85) < 0.02  # the figure of the paper
    assert p_value(first_tokens(looks_ahead=False, mode="rejection")) > 1e-3


def test_a_budget_may_look_ahead_in_coupled_mode() -> None:
    ahead = first_tokens(looks_ahead=True, mode="coupled")
    assert torch.equal(ahead, first_tokens(looks_ahead=False, mode="coupled"))
    assert p_value(ahead) > 1e-3
