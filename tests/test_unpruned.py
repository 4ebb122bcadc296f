"""What a GPU computes without being asked, against a CPU's pruning: the same thresholds, the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark_kernels import noise
from dspark_serve import sampling as module
from dspark_serve import unpruned
from dspark_serve.sampling import Support, draw_target, filter_thresholds, target_support
from dspark_serve.tensors import SamplingBatch
from dspark_serve.types import GREEDY_TEMPERATURE
from tests.test_sampling import PARAMS, bits, sampling_batch

NAN, INF, TINY = float("nan"), float("inf"), 1e-45
# What rows of logits are made of, each a way to go wrong: values, which one per token.
KINDS = {
    "normal": lambda g, n: torch.randn(n, generator=g) * 3,
    "flat": lambda g, n: torch.full((n,), -1.5),
    "ties": lambda g, n: torch.randn(n, generator=g).round(),
    "close": lambda g, n: 1 + torch.randint(0, 4, (n,), generator=g) * 2.0**-23,  # neighbours among floats
    "zeros": lambda g, n: torch.tensor([0.0, -0.0])[torch.randint(0, 2, (n,), generator=g)],
    "denormals": lambda g, n: (torch.randint(-9, 9, (n,), generator=g) * TINY).float(),
    "one token": lambda g, n: torch.zeros(n).index_fill_(0, torch.randint(0, n, (1,), generator=g), 200.0),
    "masked": lambda g, n: torch.randn(n, generator=g).masked_fill_(torch.rand(n, generator=g) < 0.9, -INF),
    "all masked": lambda g, n: torch.full((n,), -INF),
    "large": lambda g, n: torch.randn(n, generator=g) * 1e38,  # overflows below a temperature of 1
    "infinite": lambda g, n: torch.randn(n, generator=g).index_fill_(0, torch.randint(0, n, (2,), generator=g), INF),
    "nan": lambda g, n: torch.randn(n, generator=g).index_fill_(0, torch.randint(0, n, (2,), generator=g), NAN),
    "negative nan": lambda g, n: torch.randn(n, generator=g).index_fill_(0, torch.tensor(n // 2), -NAN),
    "all nan": lambda g, n: torch.full((n,), NAN),
}  # fmt: skip
ROW = st.tuples(st.sampled_from(list(KINDS)), PARAMS)
EVERY_KIND = [(kind, {"temperature": 0.3, "top_k": 3, "top_p": 0.95, "min_p": 0.02}) for kind in KINDS]


def rows_of_kinds(rows: list[tuple[str, dict[str, float]]], vocab: int, seed: int) -> tuple[Tensor, SamplingBatch]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([KINDS[kind](generator, vocab) for kind, _ in rows])
    return logits, sampling_batch([params for _, params in rows], first_seed=seed)


def without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernels", lambda logits: None)
    monkeypatch.setattr(module, "_prunes", lambda logits: False)


@given(st.lists(ROW, min_size=1, max_size=6), st.sampled_from([1, 2, 63, 700, 2500]), st.integers(0, 10**6))
@example(EVERY_KIND, 700, 0)
@example([(kind, {"top_p": 0.5}) for kind in KINDS], 700, 1)
@example([(kind, {"top_k": 65}) for kind in KINDS], 700, 2)
@example([(kind, {"top_k": 1, "top_p": 1e-9}) for kind in KINDS], 63, 3)
@settings(max_examples=60, deadline=None)
def test_thresholds_and_tokens_are_those_of_pruning(
    rows: list[tuple[str, dict[str, float]]], vocab: int, seed: int
) -> None:
    logits, batch = rows_of_kinds(rows, vocab, seed)
    batch = replace(batch, any_filter=True)
    plain = replace(batch, any_filter=False)
    found = {}
    for way in ("c++", "torch", "unpruned"):
        with pytest.MonkeyPatch.context() as patch:
            if way == "unpruned":
                without_asking(patch)
            elif way == "torch":
                patch.setattr(module, "_kernels", lambda logits: None)
            tokens = torch.stack([draw_target(logits, batch), draw_target(logits, plain)], dim=1)
            found[way] = filter_thresholds(logits, batch), tokens
    thresholds, tokens = found.pop("unpruned")
    nan = logits.isnan().any(-1)
    first = logits.isnan().int().argmax(-1)
    assert torch.equal(tokens[nan], first[nan].unsqueeze(1).expand(-1, 2))
    # Quotients that overflow tie, and pruning in torch then prefers the largest logit: elsewhere the lowest id wins.
    scaled = logits / batch.temperature.clamp(min=GREEDY_TEMPERATURE).unsqueeze(1)
    overflow = (scaled.isinf() & logits.isfinite()).any(-1)
    for way, (others, other_tokens) in found.items():
        torch.testing.assert_close(thresholds, others, rtol=0, atol=0, equal_nan=True)
        told = ~nan & ~overflow if way == "torch" else ~nan
        assert tokens[told].tolist() == other_tokens[told].tolist()


@pytest.mark.parametrize("passes", [1, 3, 50])
def test_passes_change_no_bit(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(kind, {"top_k": 40, "top_p": 0.9, "min_p": 1e-4}) for kind in KINDS]
    logits, batch = rows_of_kinds(rows, 300, 5)
    filters = logits, batch.top_k, batch.top_p, batch.min_p
    address = batch.temperature, batch.seed, batch.position, noise.GUMBEL
    want = unpruned.thresholds(*filters), unpruned.draw(logits, *address)
    monkeypatch.setattr(unpruned, "_ELEMENTS", -(-len(rows) // passes) * 2048)
    assert len(list(unpruned._passes(logits))) >= min(passes, len(rows))
    got = unpruned.thresholds(*filters), unpruned.draw(logits, *address)
    assert torch.equal(bits(got[0]), bits(want[0]))
    assert torch.equal(got[1], want[1])
    for row in range(len(rows)):
        alone = unpruned.thresholds(*(x[row : row + 1] for x in filters))
        assert torch.equal(bits(alone), bits(want[0][row : row + 1]))


def test_no_rows_have_no_thresholds_and_no_tokens() -> None:
    nothing, whole = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert unpruned.thresholds(torch.zeros(0, 9), whole, nothing, nothing).shape == (0,)
    assert unpruned.draw(torch.zeros(0, 9), nothing, whole, whole, noise.GUMBEL).tolist() == []


def test_keys_are_in_the_order_of_the_numbers() -> None:
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    special = np.array([0.0, -0.0, TINY, -TINY, 1.0, -1.0, INF, -INF, NAN, -NAN], dtype=np.float32)
    numbers = np.concatenate([patterns.view(np.float32), special])
    keys = unpruned._ordered(torch.from_numpy(numbers))
    assert int(keys.min()) >= 0
    assert int(keys.max()) < 1 << 32
    order = numbers[keys.argsort().numpy()]
    assert np.array_equal(order, np.sort(numbers), equal_nan=True)  # NaN last, the two zeros equal
    assert len(keys.unique()) == len(np.unique(numbers))
    assert np.array_equal(unpruned._number(keys).numpy(), numbers, equal_nan=True)


def test_a_large_vocabulary_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of 2^40 parts over as many tokens as models have; a support compared bit by bit."""
    logits, batch = rows_of_kinds(
        [("normal", {"top_p": 0.95}), ("flat", {"top_p": 0.3}), ("ties", {"top_k": 700, "top_p": 0.99})], 151_936, 9
    )
    want = target_support(logits, batch), draw_target(logits, batch)
    without_asking(monkeypatch)
    got = target_support(logits, batch), draw_target(logits, batch)
    assert torch.equal(got[1], want[1])

    def dense(support: Support) -> Tensor:
        return torch.full_like(logits, -INF).scatter_reduce_(1, support.ids, support.log_weights, "amax")

    assert torch.equal(bits(dense(got[0])), bits(dense(want[0])))
