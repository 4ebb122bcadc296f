"""The whole step on the toy target: logprobs, prompt scoring, rejection sampling, cancelling, accounting."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from dspark_kernels.noise import gumbel
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.speculation.fixed import KeepAll
from dspark_serve.types import SpeculationParams
from tests.toy import VOCAB, Oracle, RandomProbsDrafter, drafter_named, make_engine, make_request, run, toy_model


def logits_of(model, tokens):
    """All positions' raw logits, by scoring the sequence as a prompt in one piece through the model itself."""
    from dspark_serve.cache.store import KVStore
    from dspark_serve.engine.batch import Batcher
    from dspark_serve.tensors import Proposal
    from dspark_serve.types import Plan, Row

    request = make_request("x", [*tokens, 0], prompt_logprobs=0)
    request.token_ids, request.pages = list(request.prompt_token_ids), list(range(1, 40))
    batch = Batcher(8).build(Plan((Row(request, 0, len(tokens), False),)), Proposal.empty(0))
    return model.forward(batch, KVStore(model.info.kv_layers, 40, 8), ()).logits


def test_logprobs_are_the_log_softmax_of_raw_logits():
    model = toy_model()
    prompt = [3, 14, 15, 9, 2]
    request = make_request("r", prompt, temperature=0.7, seed=3, max_tokens=6, logprobs=4)
    engine = make_engine(model)
    engine.add(request)
    deltas = []
    while engine.has_work:
        deltas += engine.step().deltas
    tokens = [token for delta in deltas for token in delta.token_ids]
    entries = [entry for delta in deltas for entry in delta.logprobs]
    expected = torch.log_softmax(logits_of(model, prompt + tokens), -1)
    for i, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        row = expected[len(prompt) - 1 + i]
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert entry.rank == int((row > row[token]).sum()) + 1
        assert [t for t, _ in entry.top] == row.topk(4).indices.tolist()


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_prompt_logprobs_whatever_the_chunks(chunk):
    model = toy_model()
    prompt = list(range(20, 33))
    got = run(make_engine(model, chunk=chunk), [make_request("r", prompt, max_tokens=2, prompt_logprobs=1)])
    expected = torch.log_softmax(logits_of(model, prompt), -1)
    entries = got.prompt_logprobs["r"]
    assert [entry.token_id for entry in entries] == prompt[1:]
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(expected[i, prompt[i + 1]].item(), abs=1e-5)


def test_prompt_logprobs_survive_preemption_without_repeats():
    model = toy_model()
    prompts = [[i + 1] * 30 for i in range(4)]
    options = {"max_tokens": 40, "temperature": 0.0}
    requests = [make_request(f"r{i}", p, prompt_logprobs=0, **options) for i, p in enumerate(prompts)]
    got = run(make_engine(model, pages=26, page_size=8, chunk=9), requests)
    assert got.preemptions > 0
    assert all(len(got.prompt_logprobs[f"r{i}"]) == 29 for i in range(4))


class TestRejectionMode:
    """The distribution of whole pairs of tokens: the first comes from the prefill, the second was drafted."""

    SAMPLES = 4096

    def pairs(self, mode, drafter):
        model = toy_model(vocab=8)
        engine = make_engine(model, drafter, mode=mode, seqs=64, tokens=512, pages=600)
        counts = torch.zeros(8, 8)
        for start in range(0, self.SAMPLES, 64):
            requests = [
                make_request(f"r{i}", [1, 2, 3], seed=7919 * i + 1, max_tokens=3, temperature=1.5)
                for i in range(start, start + 64)
            ]
            got = run(engine, requests, check=False)
            for request in requests:
                first, second = got.tokens[request.request_id][:2]
                counts[first, second] += 1
        return counts

    def expected(self):
        model = toy_model(vocab=8)
        first = torch.softmax(logits_of(model, [1, 2, 3])[-1] / 1.5, -1)
        second = [torch.softmax(logits_of(model, [1, 2, 3, token])[-1] / 1.5, -1) for token in range(8)]
        return first[:, None] * torch.stack(second)

    def p_value(self, counts):
        expected = (self.expected() * self.SAMPLES).flatten()
        keep = expected >= 5
        observed, wanted = counts.flatten()[keep].double(), expected[keep].double()
        return chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue

    @pytest.mark.parametrize("skew", [0.0, 2.0])
    def test_the_distribution_is_the_targets(self, skew):
        probs = torch.softmax(torch.arange(8.0) * skew / 4, -1)
        drafter = RandomProbsDrafter(probs, 2, gumbel)
        assert self.p_value(self.pairs("rejection", drafter)) > 1e-3

    def test_certain_drafts_too(self):
        truth = {f"r{i}": [1, 2, 3, 4, 5, 6, 7] for i in range(self.SAMPLES)}
        assert self.p_value(self.pairs("rejection", Oracle(truth, "right", 2, 8))) > 1e-3

    def test_a_rule_that_always_accepts_is_caught(self, monkeypatch):
        from dspark_serve.engine import build as module
        from dspark_serve.tensors import Verdict

        def accept_everything(logits, batch, mode):
            verdict = honest(logits, batch, mode)
            width = batch.drafts.shape[1]
            tokens = verdict.tokens.clone()
            tokens[:, :width] = torch.where(batch.drafts >= 0, batch.drafts, tokens[:, :width])
            return Verdict(verdict.n_accepted, tokens)

        honest = module.verify
        monkeypatch.setattr(module, "verify", accept_everything)
        drafter = RandomProbsDrafter(torch.softmax(torch.arange(8.0) / 2, -1), 2, gumbel)
        assert self.p_value(self.pairs("rejection", drafter)) < 1e-6


def test_cancelling_mid_decode_gives_pages_back_and_leaves_the_others_alone():
    model = toy_model()
    plain = run(make_engine(model), [make_request("keep", [1, 2, 3], max_tokens=20)])
    engine = make_engine(model, drafter_named("ngram", {}), page_size=4)
    engine.add(make_request("keep", [1, 2, 3], max_tokens=20))
    engine.add(make_request("drop", [4, 5, 6], max_tokens=20))
    tokens = []
    while engine.has_work:
        report = engine.step()
        tokens += [t for delta in report.deltas if delta.request_id == "keep" for t in delta.token_ids]
        if len(tokens) >= 5:
            engine.cancel("drop")
        engine.check_integrity()
    assert tokens == plain.tokens["keep"]
    assert engine.stats().pages_used == 0
    assert not engine.cancel("drop")


def test_finished_and_cancelled_requests_are_released():
    drafter = Oracle({"a": list(range(99)), "b": list(range(99))}, "wrong")
    engine = make_engine(toy_model(), drafter)
    engine.add(make_request("b", [1], max_tokens=50))
    assert engine.cancel("b")
    run(engine, [make_request("a", [1, 2], max_tokens=3)])
    assert drafter.released == ["b", "a"]


def test_reports_and_per_request_statistics_agree():
    model = toy_model()
    plain = run(make_engine(model), [make_request("r", [5, 6, 7], max_tokens=17)])
    truth = {"r": [5, 6, 7, *plain.tokens["r"]]}
    request = make_request("r", [5, 6, 7], max_tokens=17)
    got = run(make_engine(model, Oracle(truth, "right", 4)), [request])
    stats = request.stats
    assert got.tokens == plain.tokens
    assert (got.kept, got.accepted) == (stats.num_kept_tokens, stats.num_accepted_tokens)
    assert sum(stats.histogram) == stats.num_spec_steps
    assert sum(a * n for a, n in enumerate(stats.histogram)) == stats.num_accepted_tokens
    assert stats.num_accepted_tokens == 12, "17 tokens: one from the prefill, three steps of 4 + 1, the last one alone"


def test_speculation_can_be_switched_off_per_request():
    model = toy_model()
    request = make_request("r", [1, 2, 1, 2, 1, 2], max_tokens=8)
    request.speculation = SpeculationParams(enabled=False)
    got = run(make_engine(model, drafter_named("ngram", {})), [request])
    assert got.kept == 0
    assert request.stats.num_draft_tokens == 0
    assert len(got.tokens["r"]) == 8


def test_every_token_id_is_in_the_vocabulary():
    got = run(make_engine(toy_model()), [make_request(f"r{i}", [i + 1], seed=i, max_tokens=10) for i in range(16)])
    assert all(0 <= token < VOCAB for tokens in got.tokens.values() for token in tokens)


def test_the_budget_is_asked_before_the_drafter():
    class Barring(KeepAll):
        """Lets nobody draft, and notes what it is told."""

        learned = 0

        def admit(self, plan):
            return replace(plan, rows=tuple(row._replace(max_drafts=0) for row in plan.rows))

        def learn(self, plan, proposal, results, phase_ms, before_ms):
            assert (before_ms > 0) == (self.learned > 0)
            assert len(results) == len(plan.rows)
            assert {"propose", "forward", "commit"} <= set(phase_ms)
            self.learned += 1

    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    plain = run(make_engine(toy_model()), [make_request("a", prompt, max_tokens=12)])
    barred = make_engine(toy_model(), NgramDrafter(4, 1, 3), budget=Barring())
    got = run(barred, [make_request("a", prompt, max_tokens=12)])
    assert (got.tokens, got.kept) == (plain.tokens, 0)
    assert barred.budget.learned == 12
