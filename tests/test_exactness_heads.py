"""Promise 1 with draft heads: whatever drafts, in whatever company, the text is that of plain decoding, bit for bit.

And promise 4: drafts depend on the committed tokens only, not on how their context came to be in the cache.
"""

from functools import cache

import pytest
import torch
from scipy.stats import chi2_contingency

from dspark_serve.types import SpeculationParams
from tests.drafters.golden import golden_runs, golden_target
from tests.drafters.made_heads import Watch, plan_named
from tests.toy import make_engine, make_request, run

HEADS = ["dspark_vanilla", "gated", "dspark_rnn", "few_tokens", "dflash", "eagle3", "portfolio"]
SITUATIONS = ["alone", "batch", "preemption", "prefix", "chunk1", "chunk7"]
TEMPERATURES = [0.0, 0.8, 1.2]
MAX_TOKENS = 10  # a block and a half: a draft of every slot is rejected somewhere
PAGE = 4


@cache
def prompts():
    """Eight prompts of the kind the target was trained on, of 1 to 24 tokens: up to six pages, or four chunks."""
    texts = {run["prompt_index"]: run["input_ids"] for run in golden_runs("dflash")}
    return [texts[i][-24:] for i in (0, 1, 3, 4, 5, 6, 7, 2)]


@cache
def long_prompt():
    """64 tokens of the same kind."""
    return next(run["input_ids"] for run in golden_runs("dflash") if run["prompt_index"] == 7)


def requests(**changes):
    options = {"max_tokens": MAX_TOKENS, "logprobs": 0, "ignore_eos": True, **changes}
    return [
        make_request(f"r{i}", prompt, seed=100 + i, **{"temperature": TEMPERATURES[i % 3], **options})
        for i, prompt in enumerate(prompts())
    ]


@cache
def plain():
    """Each request alone, without drafts or cache: (tokens, logprobs) by id."""
    found = {}
    for request in requests():
        got = run(make_engine(golden_target(), page_size=PAGE, prefix_caching=False), [request])
        found[request.request_id] = got.tokens[request.request_id], got.logprobs[request.request_id]
    return found


def answers(got):
    return {name: (tokens, got.logprobs[name]) for name, tokens in got.tokens.items()}


def options_of(situation):
    """What an engine is made with to come into it."""
    longest = max(map(len, prompts())) + MAX_TOKENS
    return {
        "preemption": {"pages": 4 + -(-longest // PAGE), "prefix_caching": False},
        "chunk1": {"chunk": 1},
        "chunk7": {"chunk": 7},
    }.get(situation, {})


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("head", HEADS)
def test_same_bits(head, situation):
    """Greedy, T=0.8 and T=1.2 requests side by side; "alone" has one of each."""
    engine = make_engine(golden_target(), plan_named(head), page_size=PAGE, **options_of(situation))
    if situation == "alone":
        for request in requests()[4:7]:
            got = run(engine, [request])
            assert answers(got) == {request.request_id: plain()[request.request_id]}
        return
    if situation == "prefix":
        run(engine, requests())
    got = run(engine, requests())
    assert answers(got) == plain()
    assert got.kept > got.accepted > 0
    if situation == "preemption":
        assert got.preemptions > 0
    if situation == "prefix":
        assert sum(got.cached.values()) > 0


def test_filters_keep_the_promise():
    """The head's drafts go through the request's filters too, and penalties that it ignores cost nothing but drafts."""
    options = [
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.1, "top_k": 7},
        {"temperature": 0.7, "min_p": 0.1, "presence_penalty": 1.5},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ]

    def some():
        return [
            make_request(f"r{i}", prompts()[i], seed=i, max_tokens=20, ignore_eos=True, **params)
            for i, params in enumerate(options)
        ]

    wanted = run(make_engine(golden_target(), page_size=PAGE), some()).tokens
    for head in ("dspark_vanilla", "few_tokens", "eagle3", "portfolio"):
        assert run(make_engine(golden_target(), plan_named(head), page_size=PAGE), some()).tokens == wanted


def proposals(head, wanted, engine=None, pause=(), **options):
    """Run the requests together; -> what was proposed at each anchor, and the engine."""
    watch = Watch()
    engine = engine or make_engine(golden_target(), plan_named(head), page_size=PAGE, **options)
    engine.budget = watch
    for request in wanted:
        engine.add(request)
    steps = 0
    while engine.has_work:
        for request in wanted:
            request.speculation = SpeculationParams(enabled=steps not in pause)
        engine.step()
        steps += 1
    return watch, engine


def same_where_both(first, second):
    """Equal proposals at every anchor that both runs drafted from, the cut at the end of the answer aside."""
    common = first.keys() & second.keys()
    for where in common:
        count = min(len(first[where]), len(second[where]))
        assert first[where][:count] == second[where][:count], where
    return len(common)


@pytest.mark.parametrize("head", [head for head in HEADS if head != "portfolio"])
class TestDraftsDependOnTheTokensAlone:
    def test_after_a_prefix_hit(self, head):
        """Promise 4: with the prompt out of the cache, drafts, confidences and accepted lengths are the same."""
        prompt = long_prompt() + prompts()[0]
        for temperature in (0.0, 0.8):

            def ask(temperature=temperature):
                return [make_request("r", prompt, seed=1, temperature=temperature, max_tokens=24, ignore_eos=True)]

            first = ask()
            cold, engine = proposals(head, first)
            second = ask()
            warm, _ = proposals(head, second, engine)
            assert second[0].num_cached >= len(prompt) - 2 * PAGE
            assert cold.seen == warm.seen
            assert cold.confidence == warm.confidence
            assert first[0].stats == second[0].stats
            assert first[0].stats.num_accepted_tokens > 0

    def test_a_hit_on_another_continuation(self, head):
        """Pages are shared by requests that go on differently: nothing in them may know how the first went on."""
        shared = long_prompt()[:40]
        one, two = shared + prompts()[0], shared + prompts()[3]

        def ask(name, prompt):
            return [make_request(name, prompt, temperature=0.0, max_tokens=16, ignore_eos=True)]

        alone, _ = proposals(head, ask("two", two))
        _, engine = proposals(head, ask("one", one))
        request = ask("two", two)
        after, _ = proposals(head, request, engine)
        assert request[0].num_cached == 40
        assert alone.seen == after.seen

    def test_in_any_batch_and_chunk_and_after_a_pause(self, head):
        """Steps in which nothing drafts leave no gap in the head's context."""
        alone = {}
        for request in requests(logprobs=None):
            alone |= proposals(head, [request])[0].seen
        together, _ = proposals(head, requests(logprobs=None))
        assert same_where_both(alone, together.seen) > 24
        chunked, _ = proposals(head, requests(logprobs=None), chunk=5)
        assert same_where_both(alone, chunked.seen) > 24
        paused, _ = proposals(head, requests(logprobs=None), pause=(1, 2, 3, 6))
        assert same_where_both(alone, paused.seen) > 8

    def test_a_long_context(self, head):
        """A thousand tokens, in chunks: the text is plain decoding's, and drafts still hit."""
        prompt = (long_prompt() * 20)[:980]
        options = {"page_size": 16, "tokens": 100}

        def ask():
            return [make_request("r", prompt, temperature=0.0, max_tokens=24, ignore_eos=True)]

        wanted = run(make_engine(golden_target(), **options), ask()).tokens
        got = run(make_engine(golden_target(), plan_named(head), **options), ask())
        assert got.tokens == wanted
        assert got.accepted > 0


def sample(plan, first_seed, count=900, **options):
    """The tokens [count, 3] of many short answers to one prompt, and the run. Hot, because this target is sure of
    itself: at lower temperatures a wrong rule would not be noticed."""
    room = {"page_size": 16, "seqs": 128, "tokens": 1024, "pages": 800}
    engine = make_engine(golden_target(), plan, mode="rejection", **room, **options)
    asked = [
        make_request(f"r{i}", prompts()[0], seed=first_seed + i, temperature=3.0, max_tokens=3, ignore_eos=True)
        for i in range(count)
    ]
    got = run(engine, asked, check=False)
    return torch.tensor([got.tokens[f"r{i}"] for i in range(count)]), got


@cache
def sample_without_drafts():
    return sample(plan_named("none"), 10_000)[0]


@pytest.mark.parametrize("head", ["dspark_vanilla", "few_tokens", "eagle3", "portfolio"])
def test_rejection_mode_has_the_targets_distribution(head):
    """The second and third token of every answer, with the head against without: chi-square."""
    assert_targets_distribution(*sample(plan_named(head, "rejection"), 0))


def assert_targets_distribution(drafted, got):
    assert 0 < got.accepted < got.kept
    for column in (1, 2):
        samples = (drafted, sample_without_drafts())
        table = torch.stack([torch.bincount(tokens[:, column], minlength=512) for tokens in samples])
        common = table.sum(0) >= 8
        table = torch.cat([table[:, common], table[:, ~common].sum(1, keepdim=True)], dim=1)
        assert chi2_contingency(table.numpy()).pvalue > 0.001
