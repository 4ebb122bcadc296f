"""Requests to tensors: every field of a ragged batch against what a reader would write down by hand."""

import random

import torch

from dspark_serve.engine import penalties
from dspark_serve.engine.batch import Batcher
from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan, Request, Row, SamplingParams


def request(name, tokens, prompt, pages, seed=0, eos=(), **params):
    return Request(
        name,
        tuple(tokens[:prompt]),
        SamplingParams(**params),
        seed=seed,
        eos_token_ids=frozenset(eos),
        token_ids=list(tokens),
        pages=list(pages),
    )


def three_rows():
    """A middle chunk of a prompt, a decode row with drafts, a decode row without; page size 4."""
    prefill = request("prefill", range(10, 20), 10, [3, 1])
    drafting = request("drafting", [30, 31, 32, 33, 34], 3, [5, 2], seed=-1, temperature=0.5, top_k=-1)
    plain = request("plain", [40, 41], 1, [4], seed=2**63 + 5, temperature=0.0, top_k=3)
    rows = (Row(prefill, 4, 3, False), Row(drafting, 4, 1, True, 3), Row(plain, 1, 1, True))
    return Plan(rows)


def test_layout_of_a_ragged_step():
    batch = Batcher(4).build(three_rows(), Proposal.from_lists([[77, 78, 79]]).trim([2]))
    assert batch.token_ids.tolist() == [14, 15, 16, 34, 77, 78, 41]
    assert batch.positions.tolist() == [4, 5, 6, 4, 5, 6, 1]
    assert batch.slots.tolist() == [4, 5, 6, 8, 9, 10, 17]
    assert batch.page_table.tolist() == [[3, 1], [5, 2], [4, 0]]
    assert batch.query_lens == (3, 3, 1)
    assert batch.context_lens == (7, 7, 2)
    assert batch.sample_lens == (0, 3, 1)
    assert batch.sample_index.tolist() == [3, 4, 5, 6]
    assert batch.drafts.tolist() == [[-1, -1], [77, 78], [-1, -1]]
    assert batch.draft_probs is None
    assert batch.score_index is None


def test_sampling_parameters_follow_their_samples():
    sampling = Batcher(4).build(three_rows(), Proposal.from_lists([[77, 78]])).sampling
    assert sampling.temperature.tolist() == [0.5, 0.5, 0.5, 0.0]
    assert sampling.top_k.tolist() == [0, 0, 0, 3], "-1 and 0 both mean off"
    assert sampling.position.tolist() == [5, 6, 7, 2], "the position of the token to be drawn"
    assert sampling.seed.tolist() == [-1, -1, -1, -(2**63) + 5]
    assert not sampling.all_greedy
    assert sampling.any_filter
    assert sampling.penalties is None
    assert sampling.bias_token is None


def test_draft_probabilities_go_to_the_rows_that_drafted():
    probs = torch.rand(1, 3, 8)
    proposal = Proposal(torch.tensor([[1, 2, 3]]), (3,), probs)
    batch = Batcher(4).build(three_rows(), proposal.trim([2]))
    assert batch.draft_probs.shape == (3, 2, 8)
    assert torch.equal(batch.draft_probs[1], probs[0, :2])
    assert not batch.draft_probs[0].any()


def test_penalty_counts_include_the_drafts_before_each_sample():
    row = Row(request("r", [5, 5, 6, 7, 6], 2, [1, 2], presence_penalty=1.0, repetition_penalty=2.0), 4, 1, True, 2)
    counts = Batcher(4).build(Plan((row,)), Proposal.from_lists([[5, 9]])).sampling.penalties
    entries = list(zip(counts.sample.tolist(), counts.token.tolist(), counts.generated.tolist(), strict=True))
    first = [(0, 5, 0.0), (0, 6, 2.0), (0, 7, 1.0)]
    second = [(1, 5, 1.0), (1, 6, 2.0), (1, 7, 1.0)]
    third = [(2, 5, 1.0), (2, 6, 2.0), (2, 7, 1.0), (2, 9, 1.0)]
    assert entries == first + second + third
    assert set(counts.presence.tolist()) == {1.0}
    assert set(counts.repetition.tolist()) == {2.0}


def test_penalties_count_as_a_loop_does():
    """Rows with and without penalties, prompts still computed, drafts old and new, in few tokens: repeats abound."""
    generator = random.Random(0)
    for _ in range(60):
        rows, drafts = [], []
        for name in range(generator.randint(1, 4)):
            tokens = [generator.randrange(7) for _ in range(generator.randint(1, 9))]
            prompt, count = generator.randint(1, len(tokens)), generator.randint(0, 3)
            strength = generator.choice([0.0, 0.5, 2.0])
            item = request(str(name), tokens, prompt, range(1, 5), presence_penalty=strength)
            samples = generator.random() < 0.8
            rows.append(Row(item, len(tokens) - 1, 1, samples, count if samples else 0))
            if samples and count:
                drafts.append([generator.randrange(9) for _ in range(count)])
        batch = Batcher(4).build(Plan(tuple(rows)), Proposal.from_lists(drafts))
        wanted, sample = {}, 0
        for row, n in zip(rows, batch.sample_lens, strict=True):
            own = drafts.pop(0) if n > 1 else []
            for slot in range(n):
                item, before = row.request, own[:slot]
                if item.params.presence_penalty:
                    for token in {*item.token_ids, *before}:
                        times = [*item.token_ids[item.num_prompt :], *before].count(token)
                        wanted[sample, token] = times, item.params.presence_penalty
                sample += 1
        found = batch.sampling.penalties
        assert (found is None) == (not wanted)
        if found is None:
            continue
        for way in (found, penalties._on_device(rows, batch.sample_lens, batch.drafts)):  # a GPU's way, on a CPU
            columns = (x.tolist() for x in (way.sample, way.token, way.generated, way.presence))
            entries = {((s, token), (times, strength)) for s, token, times, strength in zip(*columns, strict=True)}
            assert entries == set(wanted.items())


def test_bias_and_min_tokens_reach_the_right_samples():
    biased = request("r", [1, 2, 3], 2, [1], eos=[0], logit_bias=((7, 1.5),), min_tokens=2, stop_token_ids=(9,))
    batch = Batcher(4).build(Plan((Row(biased, 2, 1, True, 1),)), Proposal.from_lists([[4]]))
    sampling = batch.sampling
    entries = list(
        zip(sampling.bias_sample.tolist(), sampling.bias_token.tolist(), sampling.bias_value.tolist(), strict=True)
    )
    never = float("-inf")
    assert entries == [(0, 7, 1.5), (0, 0, never), (0, 9, never), (1, 7, 1.5)], "the second sample may stop"


def test_prompt_scores_cover_each_position_once():
    item = request("r", range(50, 56), 6, [1, 2], prompt_logprobs=2)
    first = Batcher(4).build(Plan((Row(item, 0, 4, False),)), Proposal.empty(0))
    assert first.score_index.tolist() == [0, 1, 2, 3]
    assert first.score_targets.tolist() == [51, 52, 53, 54]
    item.num_scored = 4
    last = Batcher(4).build(Plan((Row(item, 4, 2, True),)), Proposal.empty(0))
    assert last.score_index.tolist() == [0]
    assert last.score_targets.tolist() == [55]
    assert last.score_top == (2,)
    item.num_scored = 2  # computed again after a preemption: only what is still missing
    again = Batcher(4).build(Plan((Row(item, 0, 4, False),)), Proposal.empty(0))
    assert again.score_index.tolist() == [2, 3]
    assert again.score_targets.tolist() == [53, 54]
