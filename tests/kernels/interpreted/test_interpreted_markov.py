"""The Markov sampler against the slot-by-slot loop it replaces, alone and as programs that really run side by side."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import torch
from fence import fenced
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from dspark_kernels import noise as specification
from dspark_kernels.triton import markov, rejection, tiles
from dspark_serve.sampling import Support, draw, draw_logits
from dspark_serve.speculation.verify import verify

RANK = 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, rank: int = RANK
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    temperature = torch.tensor([1.0, 0.0, 0.6, 2.0, 1.0])
    return {
        "base": torch.randn(rows, width, vocab, generator=generator) * 2,
        "w1": torch.randn(vocab, rank, generator=generator).to(dtype),
        "w2": (torch.randn(vocab, rank, generator=generator) * 0.4).to(dtype),
        "anchors": torch.randint(vocab, (rows,), generator=generator),
        "temperature": temperature.repeat(rows // 5 + 1)[:rows].contiguous(),
        "seed": torch.arange(rows) * 1001 - 7,
        "position": torch.arange(rows) * 3 + 50,
    }


def loop(given: dict[str, Tensor], stream: int = specification.GUMBEL, ids: Tensor | None = None) -> list[Tensor]:
    """Tokens, log masses, largest probabilities and biased logits, a slot at a time."""
    previous, slots = given["anchors"], []
    temperature, seed = given["temperature"], given["seed"]
    for slot in range(given["base"].shape[1]):
        bias = given["w1"].double()[previous] @ given["w2"].double().T
        logits = (given["base"][:, slot].double() + bias).float()
        position = given["position"] + slot
        scaled = logits / temperature.masked_fill(temperature <= 0, 1.0)[:, None]
        if ids is None:
            previous = draw_logits(logits, temperature, seed, position, stream)
        else:
            token = draw(Support(ids.expand_as(scaled), scaled), seed, position, stream)
            previous = torch.where(temperature > 0, token, ids[logits.argmax(-1)])
        slots.append([previous, scaled.logsumexp(-1), logits.softmax(-1).amax(-1), logits])
    return [torch.stack(parts, dim=1) for parts in zip(*slots, strict=True)]


def check(got: markov.MarkovDrafts, want: list[Tensor]) -> None:
    assert got.tokens.tolist() == want[0].tolist()
    torch.testing.assert_close(got.log_mass, want[1], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.largest, want[2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1000), (5, 333), (17, 70)])
def test_a_block_is_the_loops(dtype: torch.dtype, rows: int, vocab: int) -> None:
    given = inputs(rows, 3, vocab, dtype)
    got = markov.draft_block(**{name: fenced(x) for name, x in given.items()})  # type: ignore[arg-type]
    check(got, loop(given))


def test_half_logits_other_streams_and_ranks() -> None:
    given = inputs(5, 2, 200, rank=3)
    given["base"] = given["base"].bfloat16()
    wide = torch.full((5, 4, 210), torch.nan, dtype=torch.bfloat16)
    wide[:, 1:3, 5:205] = given["base"]
    got = markov.draft_block(**{**given, "base": wide[:, 1:3, 5:205]}, stream=specification.DRAFT)  # type: ignore[arg-type]
    check(got, loop(given, specification.DRAFT))


def test_a_draft_vocabulary_is_drawn_from_under_its_own_ids() -> None:
    given = inputs(5, 3, 150)
    ids = torch.arange(150) * 7 + 2
    given["w1"] = torch.randn(150 * 7 + 2, RANK, generator=torch.Generator().manual_seed(1))
    given["anchors"] = given["anchors"] * 7
    got = markov.draft_block(**given, ids=fenced(ids))  # type: ignore[arg-type]
    check(got, loop(given, ids=ids))
    assert not torch.equal(got.tokens, loop(given)[0] * 7 + 2)


def test_kept_logits_are_what_was_drawn_from() -> None:
    given = inputs(3, 3, 300)
    base = fenced(given["base"])
    got = markov.draft_block(**{**given, "base": base}, stream=specification.DRAFT, keep=True)  # type: ignore[arg-type]
    want = loop(given, specification.DRAFT)
    check(got, want)
    torch.testing.assert_close(base, want[3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_are_its_own(dtype: torch.dtype) -> None:
    given = inputs(18, 2, 130, dtype)
    together = markov.draft_block(**given)  # type: ignore[arg-type]
    for row in (0, 3, 15, 17):
        some = {name: x if name in ("w1", "w2") else x[row : row + 1] for name, x in given.items()}
        alone = markov.draft_block(**some)  # type: ignore[arg-type]
        for name in ("tokens", "log_mass", "largest"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[row : row + 1]), (name, row)


def run_program(program: int, programs: int, given: dict[str, Tensor], shared: list[Tensor]) -> None:
    """One program of the grid, in a process of its own; all that it allocates is the memory all of them share."""
    set_dim, set_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    InterpreterBuilder.set_grid_dim = lambda self, *size: set_dim(self, programs, 1, 1)
    InterpreterBuilder.set_grid_idx = lambda self, *index: set_index(self, program, 0, 0)
    places = iter(shared)
    markov.torch = type("Torch", (), dict(vars(torch)))
    markov.torch.empty = markov.torch.zeros = staticmethod(lambda *args, **kwargs: next(places))
    markov.draft_block(**given, programs=1)  # type: ignore[arg-type]


def test_programs_that_run_side_by_side_wait_for_each_other() -> None:
    """The interpreter runs programs one after the other, and they would wait forever; processes do not."""
    rows, width, vocab, programs = 5, 3, 500, 3
    given = inputs(rows, width, vocab)
    parts = -(-vocab // tiles.markov_tile(121, has_ids=False).columns)
    assert parts > programs
    like = torch.float32
    shared = [torch.full((rows, width), -7), torch.zeros(rows, width), torch.zeros(rows, width)]
    shared += [torch.full((4, rows, parts), torch.nan, dtype=like), torch.zeros(rows, parts, dtype=torch.int32)]
    shared += [torch.zeros(1, dtype=torch.int32)]
    for tensor in (*shared, *given.values()):
        tensor.share_memory_()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_program, args=(n, programs, given, shared)) for n in range(programs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    for process in processes:
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * programs
    alone = markov.draft_block(**given)  # type: ignore[arg-type]
    assert int(shared[-1]) == 2 * width * programs
    for got, want in zip(shared, (alone.tokens, alone.log_mass, alone.largest), strict=False):
        assert torch.equal(got, want)


def test_a_block_is_verified_by_the_rejection_rule_it_was_drawn_for() -> None:
    """Sampler and acceptance together, against the server's rule with dense draft probabilities."""
    from test_interpreted_accept import kernel, some_logits, step_batch

    rows, width, vocab = 4, 3, 90
    given = inputs(rows, width, vocab)
    biased = loop(given, specification.DRAFT)[3]
    drawn = markov.draft_block(**given, stream=specification.DRAFT, keep=True)  # type: ignore[arg-type]
    temperatures = given["temperature"].tolist()
    scaled = biased / given["temperature"].masked_fill(given["temperature"] <= 0, 1.0)[:, None, None]
    probs = scaled.softmax(-1)
    greedy = given["temperature"] <= 0
    probs[greedy] = torch.nn.functional.one_hot(biased[greedy].argmax(-1), vocab).float()
    target = torch.cat([torch.cat([row, some_logits(1, vocab)]) for row in biased])
    target += some_logits(len(target), vocab, seed=5, spread=0.5)
    batch = step_batch(drawn.tokens.tolist(), temperatures, draft_probs=probs)
    got = kernel(target, batch, "rejection", rejection.DraftLogits(given["base"], drawn.log_mass))
    want = verify(target, replace(batch), "rejection")
    assert got[0].tolist() == want.n_accepted.tolist()
    assert got[1].tolist() == want.tokens.tolist()
    assert 0 < int(got[0].sum()) < rows * width


def test_what_does_not_fit_is_refused() -> None:
    given = inputs(2, 2, 40)
    for name, other, message in (
        ("base", given["base"].bfloat16(), "float32 to be kept"),
        ("w2", given["w2"][:39], "do not fit 40 tokens"),
        ("w1", given["w1"].half(), "do not fit 40 tokens"),
        ("anchors", given["anchors"][:1], "anchors must be 2"),
        ("ids", torch.arange(39), "ids must be 40"),
    ):
        with pytest.raises(ValueError, match=message):
            markov.draft_block(**{**given, name: other}, keep=True)  # type: ignore[arg-type]
    none = markov.draft_block(**{**given, **{n: x[:0] for n, x in given.items() if n not in ("w1", "w2")}})  # type: ignore[arg-type]
    assert none.tokens.shape == (0, 2)
