"""The Markov sampler on the device: programs that wait for each other across multiprocessors, against the loop."""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE, ON_KERNELS, REHEARSAL, there
from test_interpreted_markov import DTYPES, check, inputs, loop

from dspark_kernels import noise as specification
from dspark_kernels.triton import markov
from dspark_kernels.triton.markov import MarkovDrafts

pytestmark = ON_KERNELS
VOCAB, RANK = (1000, 48) if REHEARSAL else (151_936, 256)
MANY = 2 if REHEARSAL else 100


def back(drafts: MarkovDrafts) -> MarkovDrafts:
    return MarkovDrafts(drafts.tokens.cpu(), drafts.log_mass.cpu(), drafts.largest.cpu())


def same_bits(got: MarkovDrafts, want: MarkovDrafts) -> None:
    for name in ("tokens", "log_mass", "largest"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1000), (5, 333), (17, 70)])
def test_a_block_is_the_loops(dtype: torch.dtype, rows: int, vocab: int) -> None:
    given = inputs(rows, 3, vocab, dtype)
    check(back(markov.draft_block(**there(given))), loop(given))


def test_a_block_of_a_real_head() -> None:
    given = inputs(5, 2 if REHEARSAL else 7, VOCAB, torch.bfloat16, RANK)
    given["w2"] = given["w2"] * (48 / RANK) ** 0.5  # biases of the size they have at the rank of the other cases
    check(back(markov.draft_block(**there(given), stream=specification.DRAFT)), loop(given, specification.DRAFT))


def test_a_draft_vocabulary_and_kept_logits() -> None:
    given = inputs(5, 3, 150)
    ids = torch.arange(150) * 7 + 2
    given["w1"] = torch.randn(150 * 7 + 2, 48, generator=torch.Generator().manual_seed(1))
    given["anchors"] = given["anchors"] * 7
    placed = there(given)
    got = markov.draft_block(**placed, ids=there(ids), keep=True)
    want = loop(given, ids=ids)
    check(back(got), want)
    torch.testing.assert_close(placed["base"].cpu(), want[3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_are_its_own(dtype: torch.dtype) -> None:
    given = inputs(18, 2, 130, dtype)
    together = back(markov.draft_block(**there(given)))
    for row in (0, 3, 15, 17):
        some = {name: x if name in ("w1", "w2") else x[row : row + 1] for name, x in given.items()}
        alone = back(markov.draft_block(**there(some)))
        span = slice(row, row + 1)
        same_bits(alone, MarkovDrafts(together.tokens[span], together.log_mass[span], together.largest[span]))


def test_bits_do_not_depend_on_how_many_programs_there_are() -> None:
    """Nor on luck: a program that ran ahead of the others would read numbers that are not there yet."""
    given = there(inputs(17, 3, VOCAB, torch.bfloat16, RANK))
    alone = back(markov.draft_block(**given, programs=1))
    processors = 1 if REHEARSAL else torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for programs in {1, min(3, processors), processors}:
        for _ in range(MANY):
            same_bits(back(markov.draft_block(**given, programs=programs)), alone)
