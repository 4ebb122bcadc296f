"""check-lossless: its statistics, and its verdict on a right server and on one whose rule is broken on purpose."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency
from test_real import Running
from tiny_model import write_tiny_model

from dspark_serve.lossless import CheckError, check, same_distribution
from dspark_serve.speculation import verify


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_the_p_value_is_that_of_the_usual_test():
    first, second = ["a"] * 60 + ["b"] * 25 + ["c"] * 15, ["a"] * 75 + ["b"] * 60 + ["c"] * 15
    expected = chi2_contingency([[60, 25, 15], [75, 60, 15]], correction=False).pvalue
    assert same_distribution(first, second) == pytest.approx(expected, rel=1e-9)


def test_rare_outcomes_are_one_cell():
    first, second = ["a"] * 80 + [f"x{i}" for i in range(20)], ["a"] * 60 + [f"y{i}" for i in range(40)]
    expected = chi2_contingency([[80, 20], [60, 40]], correction=False).pvalue
    assert same_distribution(first, second) == pytest.approx(expected, rel=1e-9)
    assert same_distribution(["a"] * 50, ["a"] * 50) == 1.0


def test_equal_distributions_rarely_fail():
    generator = np.random.default_rng(0)
    p_values = [same_distribution(*generator.geometric(0.3, (2, 200)).tolist()) for _ in range(300)]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09


async def test_a_right_server_is_lossless(tiny):
    async with Running(tiny, budget="full") as client:  # the texts of a made-up model hardly ever copy themselves
        report = await check("http://test", client=client, max_tokens=32, draws=60)
    assert report.lossless
    assert not report.differing
    assert report.num_drafted
    assert report.lines()[-1] == "LOSSLESS"


async def test_a_check_of_a_server_that_drafted_nothing_says_so(tiny):
    async with Running(tiny, budget="off") as client:
        report = await check("http://test", client=client, max_tokens=8, draws=10)
    assert report.lossless
    assert report.num_drafted == 0
    assert any("nothing was drafted" in note and "budget" in note for note in report.notes)


@pytest.mark.parametrize("rejection", [False, True])
async def test_a_server_that_accepts_every_draft_is_found_out(tiny, monkeypatch, rejection):
    honest = verify.leading
    monkeypatch.setattr(verify, "leading", lambda accepted: honest(accepted | True))
    async with Running(tiny, budget="full") as client:  # the cost model of a loaded machine would verify few drafts
        report = await check("http://test", client=client, max_tokens=32, draws=60, rejection=rejection)
    assert report.differing
    assert report.lossless is (rejection and report.distribution_equal)
    if not rejection:
        assert report.lines()[-1] == "NOT LOSSLESS"
        assert any(line.startswith("  differs: ") for line in report.lines())


async def test_a_server_that_is_not_there():
    with pytest.raises(CheckError, match="could not be asked"):
        await check("http://127.0.0.1:9")
