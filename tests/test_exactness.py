"""Promise 1: in coupled mode no drafter, neighbour, preemption, cache hit or chunking changes a token or a logprob.

Tokens and float logprobs are compared with ==, on a toy target and on the real default model.
"""

import pytest
import torch

from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.cost import CostModel, Point, Profile
from dspark_serve.speculation.fixed import FixedBudget
from dspark_serve.speculation.policies import AutoBudget
from tests.toy import VOCAB, drafter_named, make_engine, make_request, run, toy_model

DRAFTERS = ["none", "ngram", "right", "wrong", "random"]
SITUATIONS = ["alone", "batch", "preemption", "prefix", "chunk1", "chunk7"]
TEMPERATURES = [0.0, 0.8]


class Subject:
    """A model, eight requests and the plain answer: each alone, no drafter, no cache, prompt in one piece."""

    def __init__(self, model, prompts, max_tokens, temperature, page_size=4):
        self.model, self.prompts, self.page_size = model, prompts, page_size
        self.small_pool = 1 + 2 * -(-(max(map(len, prompts)) + max_tokens) // page_size)  # two of the longest
        self.params = {"temperature": temperature, "max_tokens": max_tokens, "logprobs": 0, "ignore_eos": True}
        self.plain = None
        for request in self.requests():
            engine = make_engine(model, page_size=page_size, prefix_caching=False)
            got = run(engine, [request])
            if self.plain is None:
                self.plain = got
            else:
                self.plain.tokens |= got.tokens
                self.plain.logprobs |= got.logprobs
        self.truth = {f"r{i}": [*prompt, *self.plain.tokens[f"r{i}"]] for i, prompt in enumerate(prompts)}

    def requests(self):
        return [make_request(f"r{i}", prompt, seed=100 + i, **self.params) for i, prompt in enumerate(self.prompts)]

    def engine(self, drafter, **options):
        return make_engine(
            self.model,
            drafter_named(drafter, self.truth, self.model.info.vocab_size),
            page_size=self.page_size,
            **options,
        )


def ragged_prompts(vocab):
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 2, 9, 17, 24, 31, 40, 12]
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def subjects(request):
    cache = {}

    def get(name, temperature):
        if (name, temperature) not in cache:
            if name.startswith("toy"):
                model = toy_model(kernels="torch" if name == "toy-torch" else "auto")
                cache[name, temperature] = Subject(model, ragged_prompts(VOCAB), 24, temperature)
            else:
                model, prompts = request.getfixturevalue("smollm2"), request.getfixturevalue("real_prompts")
                cache[name, temperature] = Subject(model, prompts, 12, temperature)
        return cache[name, temperature]

    return get


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["toy", "toy-torch", "smollm2"])
def test_same_bits(subjects, name, temperature, drafter, situation):
    subject = subjects(name, temperature)
    if situation == "alone":
        for request in subject.requests()[3:6]:
            got = run(subject.engine(drafter), [request])
            assert got.tokens[request.request_id] == subject.plain.tokens[request.request_id]
            assert got.logprobs[request.request_id] == subject.plain.logprobs[request.request_id]
        return
    options = {
        "batch": {},
        "preemption": {"pages": subject.small_pool, "prefix_caching": False},
        "prefix": {},
        "chunk1": {"chunk": 1},
        "chunk7": {"chunk": 7},
    }[situation]
    engine = subject.engine(drafter, **options)
    if situation == "prefix":
        run(engine, subject.requests())
    got = run(engine, subject.requests())
    assert got == subject.plain
    if situation == "preemption":
        assert got.preemptions > 0, "the pool was meant to be too small"
    if situation == "prefix":
        assert sum(got.cached.values()) > 0, "the second run was meant to hit the cache"
    if drafter == "right":
        assert got.accepted == got.kept > 0
    if drafter == "wrong":
        assert got.accepted == 0 < got.kept
    if drafter == "random":
        assert 0 < got.accepted < got.kept


def deciding_budget(drafter, machine, mode="coupled"):
    """A budget that decides, for machines on which everything pays, nothing does, or now this and now that."""
    times = torch.rand(300, generator=torch.Generator().manual_seed(3)).tolist()
    step = {"generous": lambda n: 10.0, "mean": lambda n: 10.0 * n, "moody": lambda n: 10 + 30 * times[n]}[machine]
    profile = Profile(
        tuple(Point(n, 1, 0, step(n)) for n in range(1, 257)),
        tuple(Point(n, n, 0, 5 * step(n) if machine == "mean" else 1.0) for n in range(1, 17)),
    )
    name = type(drafter).__name__
    calibrator = Calibrator(mode, max(drafter.width, 1))
    return AutoBudget(CostModel(profile, 256, 16), calibrator, drafter=name, costly=name)


@pytest.mark.parametrize("machine", ["generous", "mean", "moody", "fixed"])
@pytest.mark.parametrize("situation", ["batch", "preemption", "chunk7"])
@pytest.mark.parametrize("drafter", ["ngram", "right", "wrong", "random"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_budget_decides_how_fast_never_what(subjects, temperature, drafter, situation, machine):
    subject = subjects("toy", temperature)
    options = {"preemption": {"pages": subject.small_pool, "prefix_caching": False}, "chunk7": {"chunk": 7}}
    made = drafter_named(drafter, subject.truth)
    budget = FixedBudget(2) if machine == "fixed" else deciding_budget(made, machine)
    engine = make_engine(subject.model, made, page_size=4, budget=budget, **options.get(situation, {}))
    for _ in range(2):  # the second time the budget knows what to expect
        assert run(engine, subject.requests()) == subject.plain


def test_sampling_options_keep_the_promise(subjects):
    """Penalties, filters, bias and min_tokens see the drafts before a position exactly as plain decoding would."""
    options = [
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.1, "top_k": 7},
        {"temperature": 0.7, "min_p": 0.1, "presence_penalty": 1.5},
        {"temperature": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.0, "frequency_penalty": 1.0},
        {"temperature": 1.0, "logit_bias": ((5, 4.0), (6, -100.0))},
        {"temperature": 1.0, "stop_token_ids": tuple(range(40)), "min_tokens": 12},
    ]
    prompts = ragged_prompts(VOCAB)
    model = toy_model()

    def requests():
        return [
            make_request(f"r{i}", prompts[i], seed=i, max_tokens=24, logprobs=0, **options[i])
            for i in range(len(options))
        ]

    plain = None
    for request in requests():
        got = run(make_engine(model, page_size=4), [request])
        plain = plain or got
        plain.tokens |= got.tokens
        plain.logprobs |= got.logprobs
    truth = {f"r{i}": prompts[i] + plain.tokens[f"r{i}"] + [1] * 8 for i in range(len(options))}
    assert len(plain.tokens["r7"]) >= 13
    for drafter in DRAFTERS:
        got = run(make_engine(model, drafter_named(drafter, truth), page_size=4), requests())
        assert got == plain, drafter


def test_a_broken_promise_would_be_seen(subjects):
    """The comparison itself can fail: another seed gives another text."""
    subject = subjects("toy", 0.8)
    requests = subject.requests()
    for request in requests:
        request.seed += 1
    assert run(subject.engine("none"), requests) != subject.plain
