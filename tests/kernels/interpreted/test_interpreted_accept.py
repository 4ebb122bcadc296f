"""Acceptance from logits equals the server's rule, row by row; both modes, ragged rows, mixed temperatures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fence import fenced
from torch import Tensor

from dspark_kernels import noise as specification
from dspark_kernels.triton import accept, rejection
from dspark_kernels.triton.noise import PART
from dspark_serve.sampling import argmax, draw_logits, target_support
from dspark_serve.speculation import triton_verify
from dspark_serve.speculation.verify import verify
from dspark_serve.tensors import DraftLogits, Penalties, StepBatch

sys.path.insert(0, str(Path(__file__).parents[2] / "speculation"))
from batches import plausible_drafts, some_logits, step_batch

LENS = [3, 0, 7, 1, 5, 2]
TEMPERATURES = [1.0, 0.7, 0.0, 1.0, 2.0, 0.0]
SAMPLING = [True, True, True, True, True, True]


def spans(batch: StepBatch) -> tuple[Tensor, Tensor]:
    count = torch.tensor(batch.sample_lens)
    return count.cumsum(0) - count, count


def kernel(
    logits: Tensor, batch: StepBatch, mode: str, draft: rejection.DraftLogits | None = None
) -> tuple[Tensor, Tensor]:
    """The kernels on a StepBatch; filters become thresholds, here read off the kept tokens."""
    sampling = batch.sampling
    threshold = None
    if sampling.any_filter:
        support = target_support(logits.float(), sampling)
        kept = support.log_weights.masked_fill(support.log_weights == -torch.inf, torch.inf).amin(-1)
        threshold = fenced(kept)
    shared = [fenced(x) for x in (logits, batch.drafts, *spans(batch))]
    shared += [fenced(x) for x in (sampling.temperature, sampling.seed, sampling.position)]
    if mode == "coupled":
        return accept.accept_coupled(*shared, threshold=threshold)
    return rejection.accept_rejection(*shared, draft, threshold=threshold)


def ragged(vocab: int, dtype: torch.dtype = torch.float32, **options: object) -> tuple[Tensor, StepBatch]:
    logits = some_logits(sum(LENS) + len(LENS), vocab, seed=vocab).to(dtype)
    drafts = []
    for row, n in enumerate(LENS):  # mostly what the target draws, for long accepted runs
        at = sum(LENS[:row]) + row
        some = slice(at, at + n + 1)
        own = plausible_drafts(logits[some].float(), [n], TEMPERATURES[row], row)[0] if n else []
        drafts.append(own)
    return logits, step_batch(drafts, TEMPERATURES, **options)  # type: ignore[arg-type]


def same(got: tuple[Tensor, Tensor], logits: Tensor, batch: StepBatch, mode: str) -> None:
    want = verify(logits.float(), batch, mode)  # type: ignore[arg-type]
    assert got[0].tolist() == want.n_accepted.tolist()
    assert got[1].tolist() == want.tokens.tolist()


@pytest.mark.parametrize("vocab", [7, 4099, PART + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_coupled_rows_are_the_servers(vocab: int, dtype: torch.dtype) -> None:
    logits, batch = ragged(vocab, dtype)
    drafts = batch.drafts.clone()
    tokens = verify(logits.float(), batch, "coupled").tokens[:, :-1]
    drafts[2:5] = torch.where(drafts[2:5] >= 0, tokens[2:5], -1)  # rows that go through, rows that stop
    drafts = torch.where((drafts < 0) & (batch.drafts >= 0), 0, drafts)
    drafts[4] = torch.where(drafts[4] >= 0, tokens[0, 0], -1)  # nothing stays after the first that differs
    drafts[4, 0] = (tokens[4, 0] + 1) % vocab
    batch = replace(batch, drafts=drafts)
    got = kernel(logits, batch, "coupled")
    same(got, logits, batch, "coupled")
    assert int(got[0].max()) > 0


def draft_logits_for(batch: StepBatch, vocab: int, seed: int) -> tuple[StepBatch, rejection.DraftLogits, Tensor]:
    """Draft distributions near the target's, with drafts drawn from them: the batch with dense probabilities."""
    rows, width = batch.drafts.shape
    first, count = spans(batch)
    target = some_logits(int(count.sum()), vocab, seed=vocab)
    target += torch.linspace(-6, 0, vocab)  # sums over blocks of tokens must follow a growing maximum
    at = (first[:, None] + torch.arange(width)).clamp(max=len(target) - 1)
    logits = target[at] + some_logits(rows * width, vocab, seed=seed, spread=0.4).view(rows, width, vocab)
    temperature = torch.tensor(TEMPERATURES)[:, None].expand(rows, width)
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)[..., None]
    probs = scaled.softmax(-1)
    greedy = temperature <= 0
    probs[greedy] = torch.nn.functional.one_hot(argmax(logits[greedy]), vocab).float()
    flat = draw_logits(
        logits.flatten(0, 1),
        temperature.flatten().contiguous(),
        torch.arange(rows * width) + 100,
        torch.arange(rows * width),
        specification.DRAFT,
    ).view(rows, width)
    drafts = torch.where(batch.drafts >= 0, flat, -1)
    return replace(batch, drafts=drafts, draft_probs=probs), rejection.DraftLogits(logits, scaled.logsumexp(-1)), target


@pytest.mark.parametrize("vocab", [7, 4099, PART + 3])
def test_rejection_rows_are_the_servers(vocab: int) -> None:
    accepted = set()
    for seed in range(2):
        batch = step_batch([[0] * n for n in LENS], TEMPERATURES, first_seed=10 * seed)
        batch, draft, target = draft_logits_for(batch, vocab, seed)
        fences = rejection.DraftLogits(fenced(draft.logits), fenced(draft.log_mass))
        got = kernel(target, batch, "rejection", fences)
        same(got, target, batch, "rejection")
        accepted |= set((got[0] - torch.tensor(LENS)).tolist())
    assert 0 in accepted  # bonus tokens
    assert min(accepted) < 0  # and residual draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_certain_drafts_are_refused_as_the_server_does(dtype: torch.dtype) -> None:
    logits, batch = ragged(50, dtype)
    same(kernel(logits, batch, "rejection"), logits, batch, "rejection")


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_filters_as_thresholds(mode: str) -> None:
    logits, batch = ragged(600, top_k=4, top_p=0.9)
    same(kernel(logits, batch, mode), logits, batch, mode)


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_rows_that_do_not_sample_and_rows_alone(mode: str) -> None:
    logits, batch = ragged(64, samples=[True, False, True, False, True, True])
    logits = logits[: batch.num_samples]
    accepted, tokens = kernel(logits, batch, mode)
    same((accepted, tokens), logits, batch, mode)
    first, count = spans(batch)
    for row in range(len(LENS)):
        some = slice(int(first[row]), int(first[row] + count[row]))
        sampling = batch.sampling
        mine = [x[some] for x in (sampling.temperature, sampling.seed, sampling.position)]
        arguments = [logits[some], batch.drafts[row : row + 1], first[:1] * 0, count[row : row + 1], *mine]
        alone = accept.accept_coupled(*arguments) if mode == "coupled" else rejection.accept_rejection(*arguments, None)
        assert alone[0].tolist() == [accepted[row]]
        assert alone[1].tolist() == [tokens[row].tolist()]


def entries(batch: StepBatch, vocab: int) -> dict[str, object]:
    """Penalties and biases on some tokens of every sample, heavy enough to decide."""
    samples = batch.num_samples
    sample, token = torch.arange(samples).repeat_interleave(3), torch.arange(3 * samples) * 7 % vocab
    strength = torch.full((3 * samples,), 2.0)
    penalties = Penalties(sample, token, strength, strength, strength, strength)
    return {"penalties": penalties, "bias_sample": sample, "bias_token": (token + 1) % vocab, "bias_value": strength}


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize(
    ("what", "launches"),
    [("plain", True), ("adjusted", True), ("logits", True), ("filters", True), ("probs", False), ("nothing", False)],
)
def test_the_servers_rule_by_kernels_where_they_have_it(
    what: str, launches: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """triton_verify decides as verify does, whichever of the two really decides."""
    vocab, launched = 4099, []
    for module, name in ((accept, "accept_coupled"), (rejection, "accept_rejection")):
        intact = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, i=intact, n=name, **o: launched.append(n) or i(*a, **o))
    if what in ("logits", "probs"):
        batch = step_batch([[0] * n for n in LENS], TEMPERATURES)
        batch, draft, logits = draft_logits_for(batch, vocab, seed=0)
        temperature = torch.tensor(TEMPERATURES)
        if what == "logits":
            batch = replace(batch, draft_probs=DraftLogits(draft.logits, draft.log_mass, temperature))
    else:
        samples = [False] * len(LENS) if what == "nothing" else None
        logits, batch = ragged(vocab, samples=samples, top_k=4 if what == "filters" else 0)
    if what == "adjusted":
        plainly = verify(logits, batch, mode)  # type: ignore[arg-type]
        batch = replace(batch, sampling=replace(batch.sampling, **entries(batch, vocab)))
    given = torch.cat([logits[: batch.num_samples], torch.full((2, vocab), torch.nan)])  # scores follow the samples
    got, want = (rule(given, batch, mode) for rule in (triton_verify.verify, verify))  # type: ignore[arg-type]
    assert got.n_accepted.tolist() == want.n_accepted.tolist()
    assert got.tokens.tolist() == want.tokens.tolist()
    by_kernels = launches or (what == "probs" and mode == "coupled")
    assert launched == ([f"accept_{mode}"] if by_kernels else [])
    if what == "adjusted":
        assert got.tokens.tolist() != plainly.tokens.tolist()


def test_a_step_without_drafts_is_a_draw() -> None:
    logits = some_logits(3, 100)
    batch = step_batch([[], [], []], [1.0, 0.0, 0.5])
    for mode in ("coupled", "rejection"):
        same(kernel(logits, batch, mode), logits, batch, mode)


def test_equal_distributions_leave_the_targets_own_draw() -> None:
    """Drafts from the target itself are accepted but for rounding; nothing is ever drawn from an empty residual."""
    logits = some_logits(2, 40)
    log_mass = logits[:1].logsumexp(-1)[None] - 1.0  # as if rounding had made the draft e times as likely
    draft = rejection.DraftLogits(logits[None, :1], log_mass)
    batch = step_batch([[int(argmax(logits[:1]))]], [1.0])
    batch = replace(batch, sampling=replace(batch.sampling, seed=torch.tensor([3, 3])))
    refused = 0
    for seed in range(6):
        sampling = replace(batch.sampling, seed=torch.tensor([seed, seed]))
        accepted, tokens = kernel(logits, replace(batch, sampling=sampling), "rejection", draft)
        if not accepted[0]:
            refused += 1
            want = draw_logits(
                logits[:1], sampling.temperature[:1], sampling.seed[:1], sampling.position[:1], specification.RESIDUAL
            )
            assert tokens[0].tolist() == [int(want), -1]
    assert refused


def test_what_does_not_fit_is_refused() -> None:
    logits, batch = ragged(64)
    first, count = spans(batch)
    sampling = [batch.sampling.temperature, batch.sampling.seed, batch.sampling.position]
    with pytest.raises(ValueError, match="contiguous int64 of 6 rows"):
        accept.accept_coupled(logits, batch.drafts, first[:5], count, *sampling)
    with pytest.raises(ValueError, match="temperature must be"):
        rejection.accept_rejection(logits[1:], batch.drafts, first, count, *sampling, None)
    short = rejection.DraftLogits(torch.zeros(6, 2, 64), torch.zeros(6, 2))
    with pytest.raises(ValueError, match="do not fit 6 rows of 7 drafts"):
        rejection.accept_rejection(logits, batch.drafts, first, count, *sampling, short)
    bad = rejection.DraftLogits(torch.zeros(6, 7, 64), torch.zeros(6, 6))
    with pytest.raises(ValueError, match="log_mass must be"):
        rejection.accept_rejection(logits, batch.drafts, first, count, *sampling, bad)
    none = accept.accept_coupled(logits[:0], batch.drafts, first * 0, count * 0, *(x[:0] for x in sampling))
    assert none[0].tolist() == [0] * 6
