"""The scheduler alone: a pretend target whose next token is a function of the request and the position."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serve.cache.pages import PagePool
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.types import (
    EngineBusy,
    InvalidRequest,
    Request,
    RowResult,
    SamplingParams,
    SpeculationParams,
)

VOCAB = 50


def make(pages=40, page_size=4, seqs=8, tokens=64, length=200, queue=100, width=3):
    pool = PagePool(pages, page_size)
    return Scheduler(
        pool,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=length,
        max_queue=queue,
        vocab_size=VOCAB,
        draft_width=width,
    )


def request(name, prompt, max_tokens=5, priority=0, eos=(), **params):
    settings_ = SamplingParams(max_tokens=max_tokens, **params)
    return Request(name, tuple(prompt), settings_, seed=0, priority=priority, eos_token_ids=frozenset(eos))


def next_token(request_, position):
    """What the pretend target says at an absolute position."""
    return (len(request_.prompt_token_ids) * 7 + request_.prompt_token_ids[0] * 3 + position * 11) % VOCAB


def judge(row, rng=None):
    """A verdict for a row: some of its drafts are accepted, the tokens are what the pretend target says."""
    if not row.samples:
        return RowResult()
    accepted = rng.randint(0, row.max_drafts) if rng else 0
    first = row.start + row.length
    tokens = tuple(next_token(row.request, first + i) for i in range(accepted + 1))
    return RowResult(tokens, row.max_drafts, row.max_drafts)


def run(scheduler, rng=None, limit=5000):
    """Step until nothing is left; token ids and finish reason by request id. Each is admitted just once."""
    got, reasons, admitted = {}, {}, set()
    for _ in range(limit):
        if not scheduler.has_work:
            return got, reasons
        plan = scheduler.plan()
        used = sum(row.length + row.max_drafts for row in plan.rows)
        assert used <= scheduler.max_num_batched_tokens
        assert len(plan.rows) <= scheduler.max_num_seqs
        for row in plan.rows:
            assert len(row.request.pages) * scheduler.pool.page_size >= row.start + row.length + row.max_drafts
        report = scheduler.commit(plan, [judge(row, rng) for row in plan.rows])
        scheduler.check_integrity()
        for delta in report.deltas:
            got.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason:
                reasons[delta.request_id] = delta.finish_reason
        assert admitted.isdisjoint(report.admitted)
        admitted.update(report.admitted)
        assert admitted >= {row.request.request_id for row in plan.rows}
    raise AssertionError("the scheduler makes no progress")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(8, 30), st.integers(1, 20), st.integers(0, 4))
def test_every_request_gets_its_own_tokens_whatever_happens(seed, seqs, pages, tokens, width):
    rng = random.Random(seed)
    scheduler = make(pages=pages, seqs=seqs, tokens=max(tokens, seqs), width=width)
    requests = []
    for i in range(rng.randint(1, 12)):
        prompt = [rng.randint(0, 1)] * rng.randint(1, 12)
        item = request(f"r{i}", prompt, rng.randint(1, 12), rng.randint(-1, 1))
        try:
            scheduler.add(item)
        except InvalidRequest:
            assert len(prompt) + item.params.max_tokens > scheduler.pool.num_usable * 4
            continue
        requests.append(item)
    got, reasons = run(scheduler, rng)
    for item in requests:
        expected = [next_token(item, len(item.prompt_token_ids) + i) for i in range(item.params.max_tokens)]
        assert got[item.request_id] == expected
        assert reasons[item.request_id] == "length"
    assert scheduler.pool.num_available == scheduler.pool.num_usable, "all pages came back"


def test_first_come_first_served_and_priority_first():
    scheduler = make(seqs=1)
    for name, priority in (("late", 1), ("a", 0), ("b", 0), ("urgent", -1)):
        scheduler.add(request(name, [1, 2], 1, priority))
    order = []
    while scheduler.has_work:
        plan = scheduler.plan()
        order += [row.request.request_id for row in plan.rows]
        scheduler.commit(plan, [judge(row) for row in plan.rows])
    assert order == ["urgent", "a", "b", "late"]


def test_long_prefill_is_chunked_beside_decoding_rows():
    scheduler = make(tokens=10, pages=60, width=0)
    scheduler.add(request("short", [1], 8))
    plan = scheduler.plan()
    scheduler.commit(plan, [judge(row) for row in plan.rows])
    scheduler.add(request("long", [2] * 31, 2, priority=-1))
    lengths = []
    for _ in range(4):
        plan = scheduler.plan()
        lengths.append({row.request.request_id: row.length for row in plan.rows})
        scheduler.commit(plan, [judge(row) for row in plan.rows])
    assert lengths[0] == {"short": 1, "long": 9}
    assert [step["long"] for step in lengths] == [9, 9, 9, 4]
    assert all(step["short"] == 1 for step in lengths), "a prefill of higher priority does not stall the stream"


def test_preemption_takes_the_last_and_loses_nothing():
    scheduler = make(pages=9, page_size=4, width=0)
    first, second = request("first", [1] * 4, 20), request("second", [2] * 4, 20)
    scheduler.add(first)
    scheduler.add(second)
    got, _ = run(scheduler)
    assert first.num_preemptions == 0
    assert second.num_preemptions > 0
    assert got["second"] == [next_token(second, 4 + i) for i in range(20)]
    assert scheduler.stats().num_preemptions == second.num_preemptions


def test_drafts_never_preempt_anyone_and_shrink_to_the_room_there_is():
    scheduler = make(pages=4, page_size=4, width=3)  # 12 slots
    a, b = request("a", [1] * 4, 3), request("b", [2] * 3, 3)
    scheduler.add(a)
    scheduler.add(b)
    got, _ = run(scheduler, random.Random(1))
    assert a.num_preemptions == b.num_preemptions == 0
    assert len(got["a"]) == len(got["b"]) == 3


def test_prefix_hits_are_counted_and_skip_the_work():
    scheduler = make()
    scheduler.add(request("one", list(range(10)), 2))
    run(scheduler)
    again = request("two", list(range(10)), 2)
    scheduler.add(again)
    plan = scheduler.plan()
    assert [(row.start, row.length) for row in plan.rows] == [(8, 2)]
    assert again.num_cached == 8
    stats = scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (20, 8)


def test_a_wholly_cached_prompt_still_computes_one_token():
    scheduler = make()
    scheduler.add(request("one", list(range(8)), 2))
    run(scheduler)
    scheduler.add(request("two", list(range(8)), 2))
    plan = scheduler.plan()
    assert [(row.start, row.length, row.samples) for row in plan.rows] == [(4, 4, True)]


@pytest.mark.parametrize("status", ["waiting", "running"])
def test_cancel_gives_pages_back(status):
    scheduler = make()
    scheduler.add(request("r", [1] * 9, 5))
    if status == "running":
        plan = scheduler.plan()
        scheduler.commit(plan, [judge(row) for row in plan.rows])
    assert scheduler.cancel("r")
    assert not scheduler.cancel("r")
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.pool.num_available == scheduler.pool.num_usable


class TestStopping:
    def reason(self, **kwargs):
        scheduler = make(width=0)
        item = request("r", [1, 2], **kwargs)
        scheduler.add(item)
        got, reasons = run(scheduler)
        return len(got["r"]), reasons["r"]

    def stop_at(self, index):
        return next_token(request("r", [1, 2]), 2 + index)

    def test_eos(self):
        assert self.reason(max_tokens=9, eos=[self.stop_at(3)]) == (4, "stop")

    def test_ignore_eos(self):
        assert self.reason(max_tokens=9, eos=[self.stop_at(3)], ignore_eos=True) == (9, "length")

    def test_stop_token(self):
        assert self.reason(max_tokens=9, stop_token_ids=(self.stop_at(2),)) == (3, "stop")

    def test_min_tokens_outlasts_stops(self):
        assert self.reason(max_tokens=9, eos=[self.stop_at(1)], min_tokens=2) == (9, "length")

    def test_a_stop_among_accepted_drafts_cuts_the_rest(self):
        scheduler = make(width=3)
        item = request("r", [1, 2], max_tokens=9, eos=[self.stop_at(2)])
        scheduler.add(item)
        for _ in range(2):
            plan = scheduler.plan()
            (row,) = plan.rows
            tokens = tuple(next_token(item, row.start + row.length + i) for i in range(row.max_drafts + 1))
            report = scheduler.commit(plan, [RowResult(tokens, row.max_drafts, row.max_drafts)])
        assert [delta.token_ids for delta in report.deltas] == [(self.stop_at(1), self.stop_at(2))]
        assert report.deltas[0].stop_token_id == self.stop_at(2)
        scheduler.check_integrity()


class TestRefusals:
    @pytest.mark.parametrize(
        ("item", "says"),
        [
            (request("r", []), "empty"),
            (request("r", [VOCAB]), "vocabulary"),
            (request("r", [-1]), "vocabulary"),
            (request("r", [1], logit_bias=((VOCAB, 1.0),)), "logit_bias"),
            (request("r", [1], stop_token_ids=(VOCAB,)), "stop_token_ids"),
            (request("r", [1] * 150, 100), "150 prompt tokens and max_tokens 100 .*maximum length of 200"),
            (request("r", [1] * 200, None), "200 prompt tokens and an answer"),
        ],
    )
    def test_says_why(self, item, says):
        scheduler = make(pages=100)
        with pytest.raises(InvalidRequest, match=says):
            scheduler.add(item)
        assert not scheduler.has_work

    def test_what_the_pool_can_never_hold(self):
        scheduler = make(pages=5, page_size=4)
        with pytest.raises(InvalidRequest, match="pool of 16 tokens") as caught:
            scheduler.add(request("r", [1] * 10, 10))
        assert caught.value.code == "context_length_exceeded"

    def test_queue_full(self):
        scheduler = make(queue=1)
        scheduler.add(request("a", [1]))
        with pytest.raises(EngineBusy):
            scheduler.add(request("b", [1]))

    def test_duplicate_id(self):
        scheduler = make()
        scheduler.add(request("a", [1]))
        with pytest.raises(InvalidRequest, match="in use"):
            scheduler.add(request("a", [1]))


def test_open_ended_requests_get_what_the_length_allows():
    scheduler = make(length=20, pages=100)
    item = request("r", [1] * 5, None)
    scheduler.add(item)
    assert item.max_new_tokens == 15


def test_speculation_control_limits_drafts():
    def drafts(**control):
        scheduler = make(width=3)
        item = request("r", [1, 2], 9)
        item.speculation = SpeculationParams(**control)
        scheduler.add(item)
        plan = scheduler.plan()
        assert plan.drafting == (), "a prompt carries no drafts"
        scheduler.commit(plan, [judge(row) for row in plan.rows])
        return sum(row.max_drafts for row in scheduler.plan().rows)

    assert drafts() == 3
    assert drafts(enabled=False) == 0
    assert drafts(max_draft_tokens=2) == 2
    assert drafts(max_draft_tokens=0) == 0


def test_the_last_token_leaves_no_room_for_drafts():
    scheduler = make(width=3)
    item = request("r", [1, 2], 3)
    scheduler.add(item)
    limits = []
    while scheduler.has_work:
        plan = scheduler.plan()
        limits.append(plan.rows[0].max_drafts)
        scheduler.commit(plan, [judge(row) for row in plan.rows])
    assert limits == [0, 1, 0]


@pytest.mark.parametrize("quiet", [True, False])
def test_a_quiet_step_holds_no_room_for_drafts(quiet):
    scheduler, asked = make(page_size=2), []
    scheduler.add(request("a", range(4), max_tokens=9))
    plan = scheduler.plan()
    scheduler.commit(plan, [judge(row) for row in plan.rows])
    held = len(scheduler.running[0].pages)
    plan = scheduler.plan(lambda rows: asked.append(rows) or quiet)
    assert asked == [plan.bare]
    assert [row.max_drafts for row in plan.rows] == [0 if quiet else 3]
    assert len(scheduler.running[0].pages) == held + (1 if quiet else 2)  # five tokens, or eight
    assert (plan.rows is plan.bare) == quiet
