"""The numbers of a benchmark, against examples worked out by hand."""

import asyncio

import numpy as np
import pytest

from dspark_serve.bench.compare import Comparison
from dspark_serve.bench.drafts import Drafts, difference, read_drafts
from dspark_serve.bench.figures import Figures, Latency, Run, Sample, Spread, speed_up
from dspark_serve.bench.load import arrivals_s, closed_loop, poisson

# Text at 1.0, 1.5 and 3.0 after a start at 0.5; five tokens: 2.0 s for the four after the first.
SAMPLE = Sample(0.5, 3.0, (1.0, 1.5, 3.0), num_input=7, num_output=5, text="abc", retries=2)
FAILED = Sample(0.5, 0.6, error="HTTP 500: no", status=500)


def test_latencies_of_one_request():
    assert (SAMPLE.ttft_s, SAMPLE.tpot_s, SAMPLE.gaps_s) == (0.5, 0.5, [0.5, 1.5])
    silent = Sample(0.0, 2.0, num_output=1)  # one token that has no text
    assert (silent.ttft_s, silent.tpot_s, silent.gaps_s) == (2.0, None, [])


def test_figures_of_a_run():
    figures = Figures.of(Run((SAMPLE, FAILED, SAMPLE), 4.0))
    assert (figures.completed, figures.failed, figures.retries) == (2, 1, 4)
    assert (figures.input_tokens, figures.output_tokens) == (14, 10)
    assert (figures.requests_per_s, figures.output_tokens_per_s, figures.tokens_per_s) == (0.5, 2.5, 6.0)
    assert figures.ttft == Latency(500.0, 500.0, 500.0)
    assert (figures.itl.mean_ms, figures.itl.median_ms) == (1000.0, 1000.0)
    assert figures.e2el.mean_ms == 2500.0
    assert Figures.of(Run((FAILED,), 1.0)).ttft == Latency(0.0, 0.0, 0.0)


def test_percentiles_interpolate():
    latency = Latency.of([0.001 * n for n in range(1, 102)])
    assert (latency.mean_ms, latency.median_ms) == (pytest.approx(51.0), pytest.approx(51.0))
    assert latency.p99_ms == pytest.approx(100.0)


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_speed_up_by_hand():
    """20 tokens in 3 s over 20 in 6 s; both pairs have the ratio 2, so every draw has."""
    ratio = speed_up([(10, 1.0), (10, 2.0)], [(10, 2.0), (10, 4.0)])
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([2.0, 2.0, 2.0])
    # Two pairs of ratio 1 and 3: draws are 1, 2, 2 or 3, a quarter each, so the interval ends at 1 and 3.
    ratio = speed_up([(10, 1.0), (30, 1.0)], [(10, 1.0), (10, 1.0)])
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([2.0, 1.0, 3.0])
    assert ratio.median_pair == 2.0
    for one_too_few in ([(10, 1.0)], [(10, 1.0), (0, 1.0)]):
        with pytest.raises(ValueError, match="at least two pairs"):
            speed_up(one_too_few, one_too_few)


def test_speed_up_pairs_turns_in_time():
    """Where the machine's speed swings by a factor of four for both arms alike, the interval stays narrow."""
    draw = np.random.default_rng(0)
    slow = draw.choice([1.0, 4.0], 16)
    ratio = speed_up([(100, s) for s in slow], [(100, 1.25 * s) for s in slow])
    assert (ratio.low, ratio.high) == (pytest.approx(1.25), pytest.approx(1.25))


def test_a_stall_in_one_turn_is_seen_for_what_it_is():
    """Seven pairs of ratio 1.5, and one in which the machine stood still while speculation had its turn."""
    on, off = ((30, 2.0),) * 7 + ((30, 200.0),), ((30, 3.0),) * 8
    ratio = speed_up(on, off)
    assert (ratio.median_pair, ratio.value) == (1.5, pytest.approx(24 / 214))
    assert ratio.low < 1.0 < ratio.high
    found = Comparison("chat", 1, on, off, ratio, 0, 0, {True: None, False: None})
    assert found.verdict == "no difference that can be told from noise"
    assert any("median pair says 1.500" in line for line in found.lines())
    steady = Comparison("chat", 1, on[:7], off[:7], speed_up(on[:7], off[:7]), 0, 0, found.drafts)
    assert not any("median pair" in line for line in steady.lines())


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        seconds = draw.lognormal(0.0, 0.2, (2, 16))
        ratio = speed_up([(120, s) for s in seconds[0]], [(100, s) for s in seconds[1]], seed)
        covered += ratio.low <= 1.2 <= ratio.high
    assert 0.86 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("pairs", "off_s", "verdict"),
    [
        (6, 2.0, "speculation helps"),
        (6, 0.5, "speculation costs"),
        (6, 1.0, "no difference that can be told from noise"),
        (5, 2.0, "no verdict on 5 pairs; 6 are needed (--num-prompts, --repeats)"),
        (0, 2.0, "nothing can be said: fewer than two pairs went through"),
    ],
)
def test_the_verdict(pairs, off_s, verdict):
    on, off = ((10, 1.0),) * pairs, ((10, off_s),) * pairs
    ratio = speed_up(on, off) if pairs else None
    found = Comparison("chat", 1, on, off, ratio, 0, 0, {True: None, False: None})
    assert found.verdict == verdict
    assert next(found.lines()) == f"chat, concurrency 1: {verdict}"


PAGE = """# TYPE {p}spec_decode_num_drafts counter
{p}spec_decode_num_drafts_total{{engine="0"}} {drafts}
{p}spec_decode_num_drafts_total{{engine="1"}} 1.0
# TYPE {p}spec_decode_num_draft_tokens counter
{p}spec_decode_num_draft_tokens_total {drafted}
# TYPE {p}spec_decode_num_accepted_tokens counter
{p}spec_decode_num_accepted_tokens_total {accepted}
# TYPE {p}spec_decode_num_accepted_tokens_per_pos counter
{p}spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {first}
{p}spec_decode_num_accepted_tokens_per_pos_total{{position="2"}} 1.0
# TYPE {p}num_requests_running gauge
{p}num_requests_running 3.0
"""


def page(prefix="vllm:", drafts=3, drafted=12, accepted=5, first=4):
    return PAGE.format(p=prefix, drafts=drafts, drafted=drafted, accepted=accepted, first=first)


def test_drafts_are_read_under_both_names_and_summed_over_engines():
    assert read_drafts(page()) == Drafts(4, 12, 5, (4, 0, 1))
    both = page("dspark:") + page("vllm:", drafts=99)
    assert read_drafts(both) == Drafts(4, 12, 5, (4, 0, 1))  # once, not twice
    assert read_drafts("# TYPE up gauge\nup 1\n") is None
    assert read_drafts("<html><body>Welcome!</body></html>") is None


def test_drafts_between_two_pages():
    found = difference(page(), page(drafts=7, drafted=28, accepted=13, first=8))
    assert found == Drafts(4, 16, 8, (4, 0, 0))
    assert (found.acceptance_rate, found.acceptance_length) == (0.5, 3.0)
    assert found.per_position_rates == [1.0, 0.0, 0.0]
    assert found.plus(Drafts(1, 1, 1, (1,))) == Drafts(5, 17, 9, (5, 0, 0))
    assert difference(None, page()) is None
    assert (Drafts().acceptance_rate, Drafts().acceptance_length) == (0.0, 1.0)


class Counting:
    """An endpoint that answers after a few turns of the event loop and notes how many requests it had at once."""

    def __init__(self):
        self.now, self.most, self.asked = 0, 0, []

    async def ask(self, body):
        self.asked.append(body["n"])
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(3):
            await asyncio.sleep(0)
        self.now -= 1
        return Sample(0.0, 1.0, text=str(body["n"]))


async def test_a_closed_loop_keeps_its_users_busy():
    endpoint, ticks = Counting(), []
    run = await closed_loop(endpoint, [{"n": n} for n in range(10)], 3, lambda: ticks.append(1))
    assert (endpoint.most, endpoint.asked, len(ticks)) == (3, list(range(10)), 10)
    assert [sample.text for sample in run.samples] == [str(n) for n in range(10)]


async def test_poisson_arrivals():
    times = arrivals_s(rate=50.0, count=4001, seed=0)
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # exponential: as wide as it is long
    assert times == arrivals_s(rate=50.0, count=4001, seed=0) != arrivals_s(rate=50.0, count=4001, seed=1)
    endpoint = Counting()
    run = await poisson(endpoint, [{"n": n} for n in range(20)], rate=1e6, seed=0, most=2)
    assert (endpoint.most, len(run.samples), sorted(endpoint.asked)) == (2, 20, list(range(20)))
