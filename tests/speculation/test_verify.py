"""The rule: coupled equals plain sampling token for token, rejection equals it in distribution, goldens reproduce."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from batches import MODES, plausible_drafts, some_logits, step_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dspark_kernels import noise
from dspark_serve.sampling import draw_target
from dspark_serve.speculation import verify as module
from dspark_serve.speculation.verify import accept_lengths, residual_probs, verify
from dspark_serve.tensors import StepBatch
from dspark_serve.types import GREEDY_TEMPERATURE, VerifyMode

GOLDEN = Path(__file__).parent.parent / "data" / "verify_vectors.safetensors"


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
