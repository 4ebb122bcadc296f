"""Sizes that steps are padded to, and the padding: a row of its own per token, one key, page 0 for all it writes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serve.engine.padding import SIZES, Limits, StepInputs, tiers
from dspark_serve.tensors import StepBatch
from tests.engine.ragged import PAGE, ragged_step, written_store
from tests.toy import VOCAB, toy_model

PAGES, LENGTH = 60, 24
rows = st.lists(st.tuples(st.integers(1, 9), st.integers(0, LENGTH - 9)), min_size=1, max_size=8)


def inputs_of(tokens: int, limits: Limits) -> StepInputs:
    pages = -(-limits.max_model_len // PAGE)
    return StepInputs(tokens, torch.zeros(limits.rows_of(tokens), pages, dtype=torch.int64), PAGE)


def size_for(count: int, sizes: tuple[int, ...]) -> int:
    return next(size for size in sizes if size >= count)


@pytest.mark.parametrize("most", [*range(1, 70), 100, 255, 256, 257, 10_000])
def test_every_step_has_a_size_that_is_not_much_larger(most: int) -> None:
    sizes = tiers(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == min(most, SIZES[-1])
    assert set(sizes[:-1]) <= set(SIZES)
    for count in range(1, sizes[-1] + 1):
        assert size_for(count, sizes) < 2 * count or count == 1


def test_there_are_few_sizes() -> None:
    assert len(SIZES) == 13
    assert all(b <= 2 * a for a, b in pairwise(SIZES))


@pytest.mark.parametrize("seqs", [1, 3, 8, 64])
@pytest.mark.parametrize("most", [1, 7, 20, 256])
def test_every_padding_token_finds_a_row(seqs: int, most: int) -> None:
    """Whatever rows and tokens a step of the scheduler has, down to the fewest tokens that are padded to a size."""
    limits, smaller = Limits(seqs, most, LENGTH), 0
    for size in tiers(most):
        free = limits.rows_of(size)
        for count in (smaller + 1, size):
            for used in {1, min(count, seqs)}:
                assert size - count <= free - used
        inputs = inputs_of(size, limits)
        assert inputs.batch.query_lens == tuple(inputs.batch.spans[1].tolist())
        assert sum(inputs.batch.query_lens) == size
        smaller = size


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(0, 5), st.data())
def test_layout(shape: list[tuple[int, int]], seed: int, data: st.DataObject) -> None:
    """The step's own part is as it was; the rest is rows of one token, then rows of none, all of them on page 0."""
    limits = Limits(8, 80, LENGTH)
    step = ragged_step(shape, PAGES, VOCAB, seed)
    count, used = len(step.token_ids), len(shape)
    size = size_for(count, tiers(80))
    inputs = inputs_of(size, limits)
    for _ in range(data.draw(st.integers(0, 1))):  # what was there before does not matter
        before = ragged_step([(size // 8 + 1, 9)] * min(8, size), 200, VOCAB, seed + 1)
        if inputs.takes(before):
            inputs.fill(before)
    assert inputs.takes(step)
    inputs.fill(step)
    got, padding = inputs.batch, size - count
    for name in ("token_ids", "positions", "slots"):
        assert getattr(got, name)[:count].equal(getattr(step, name))
        assert getattr(got, name)[count:].tolist() == [0] * padding
    assert got.spans[:, :used].equal(step.spans)
    firsts, lens, contexts = got.spans[:, used:].tolist()
    empty = inputs.rows - used - padding
    assert empty >= 0
    assert firsts == [*range(count, size), *[size] * empty]
    assert lens == contexts == [1] * padding + [0] * empty
    assert got.page_table[:used, : step.page_table.shape[1]].equal(step.page_table)
    assert not got.page_table[:used, step.page_table.shape[1] :].any()
    assert not got.page_table[used:].any()


def test_what_does_not_fit_is_not_taken() -> None:
    limits = Limits(3, 16, LENGTH)
    inputs = inputs_of(16, limits)
    assert inputs.rows == 3 + 7
    assert inputs.takes(ragged_step([(8, 0), (8, 3)], PAGES, VOCAB))
    assert not inputs.takes(ragged_step([(9, 0), (8, 3)], PAGES, VOCAB))  # 17 tokens
    assert inputs.takes(ragged_step([(1, LENGTH - 1)] + [(4, 0)] * 2, PAGES, VOCAB))
    assert not inputs.takes(ragged_step([(1, LENGTH)] + [(4, 0)] * 2, PAGES, VOCAB))  # a page more than a row has
    assert inputs.takes(ragged_step([(3, 0)] * 3, PAGES, VOCAB))
    assert not inputs.takes(ragged_step([(1, 0)] * 8, PAGES, VOCAB))  # 8 padding tokens, 2 rows


def by_lengths(padded: StepBatch) -> StepBatch:
    """A padded step for attention in plain torch, which reads host integers, and knows no rows without tokens."""
    full = padded.spans[1] > 0
    spans = padded.spans[:, full].contiguous()
    lens, contexts = (tuple(part.tolist()) for part in spans[1:])
    return replace(padded, spans=spans, page_table=padded.page_table[full], query_lens=lens, context_lens=contexts)


@settings(max_examples=40, deadline=None)
@given(rows, st.integers(0, 5), st.sampled_from(["auto", "torch"]))
def test_padding_changes_no_bit(shape: list[tuple[int, int]], seed: int, kernels: str) -> None:
    """Logits, taps and every page but page 0, of which padding gets the first slot and nobody another."""
    model, step = toy_model(kernels=kernels), ragged_step(shape, PAGES, VOCAB, seed)
    count, taps = len(step.token_ids), (0, 1)
    size = size_for(count, tiers(80))
    inputs = inputs_of(size, Limits(8, 80, LENGTH))
    inputs.fill(step)
    padded = inputs.batch if model.recordable(written_store(model.info, 2)) else by_lengths(inputs.batch)
    plain, other = (written_store(model.info, PAGES, seed=seed) for _ in range(2))
    want = model.forward(step, plain, taps)
    hidden, tapped = model.trunk(padded, other, taps)
    assert want.taps is not None
    assert tapped is not None
    assert torch.equal(model.logits(hidden[:count], step), want.logits)
    assert torch.equal(tapped[:count], want.taps)
    untouched = written_store(model.info, PAGES, seed=seed)
    for a, b, before in zip(
        (*plain.keys, *plain.values), (*other.keys, *other.values), (*untouched.keys, *untouched.values), strict=True
    ):
        assert torch.equal(a[1:], b[1:])
        assert torch.equal(a[0], before[0])
        assert torch.equal(b[0, 1:], before[0, 1:])
        assert torch.equal(b[0, 0], before[0, 0]) == (size == count)


def test_padding_that_says_something_else_would_be_seen() -> None:
    """The comparison can fail: a row that sees a key fewer than it has, a token that is written elsewhere."""
    model, step = toy_model(), ragged_step([(3, 5), (1, 9)], PAGES, VOCAB)
    want = model.forward(step, written_store(model.info, PAGES)).logits
    inputs = inputs_of(8, Limits(8, 80, LENGTH))

    def logits() -> torch.Tensor:
        return model.logits(model.trunk(inputs.batch, written_store(model.info, PAGES))[0][:4], step)

    inputs.fill(step)
    assert torch.equal(logits(), want)
    inputs.batch.spans[2, 0] -= 1
    assert not torch.equal(logits(), want)
    inputs.fill(step)
    inputs.batch.slots[-1] = inputs.batch.slots[0]  # padding into a slot of the first row
    assert not torch.equal(logits(), want)
