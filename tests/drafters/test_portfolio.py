"""The portfolio's choice: what it has seen accepted decides, per request; rows of one proposal may mix drafters."""

from types import SimpleNamespace

import pytest
import torch

from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.portfolio import Acceptance, PortfolioDrafter, _Judged, _merge
from dspark_serve.tensors import Proposal
from dspark_serve.types import Request, Row, SamplingParams


def test_acceptance_is_conditional_on_the_drafts_before():
    seen = Acceptance(4)
    before = seen.rates(["r"])
    assert before.tolist() == [[0.5] * 4]  # as likely as not
    for _ in range(50):
        seen.record("r", 4, 1)  # the first right, the second wrong, the rest never tried
    rates = seen.rates(["r"])[0]
    assert rates[0] > 0.95
    assert rates[1] < 0.05
    assert (rates[2:] == before[0, 2:]).all()


def test_acceptance_of_a_new_request_is_that_of_all_and_a_released_one_is_forgotten():
    seen = Acceptance(2)
    for number in range(40):  # more than there are lines at first
        seen.record(str(number), 2, 2 * (number % 2))
    right, wrong, new = (seen.rates([name])[0, 0] for name in ("39", "38", "new"))
    assert wrong < new < right
    seen.release("39")
    assert seen.rates(["another"])[0, 0] == new  # on the line that has become free
    assert len({int(line) for line in seen._lines([*map(str, range(39)), "new", "another"])}) == 41


def test_more_requests_at_once_than_there_are_lines():
    assert Acceptance(2).rates([str(number) for number in range(100)]).shape == (100, 2)


def test_lookups_are_certain_among_drafts_with_probabilities():
    probs = torch.full((1, 2, 5), 0.2)
    drawn = Proposal(torch.tensor([[1, 2]]), (2,), probs, torch.tensor([[0.9, 0.8]]))
    found = Proposal.from_lists([[3, 4, 0], ()], confidence=[[0.5, 0.6, 0.7], ()])
    merged = _merge(drawn, [1], found, "dspark")
    assert merged.tokens.tolist() == [[3, 4, 0], [1, 2, -1]]
    assert merged.n_draft == (3, 2)
    assert merged.drafters == ("ngram", "dspark")
    assert merged.draft_probs[0].argmax(-1).tolist() == [3, 4, 0]
    assert merged.draft_probs[0].sum(-1).tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(merged.draft_probs[1, :2], probs[0])
    torch.testing.assert_close(merged.confidence, torch.tensor([[0.5, 0.6, 0.7], [0.9, 0.8, 0.0]]))


def test_the_wider_of_both_decides():
    drawn = Proposal(torch.tensor([[1, 2, 3]]), (3,), None, torch.tensor([[0.9, 0.8, 0.7]]))
    merged = _merge(drawn, [0], Proposal.from_lists([(), [4]], confidence=[(), [0.5]]), "dspark")
    assert merged.tokens.tolist() == [[1, 2, 3], [4, -1, -1]]
    assert (merged.n_draft, merged.drafters) == ((3, 1), ("dspark", "ngram"))
    torch.testing.assert_close(merged.confidence, torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.0, 0.0]]))


class Head:
    """Drafts two tokens per row, sure of them or silent about it."""

    taps, width = (), 2

    def __init__(self, states: bool) -> None:
        self.states, self.asked = states, []

    def propose(self, rows, ready=None):
        self.asked.append(len(rows))
        confidence = torch.tensor([[0.9, 0.8]] * len(rows)) if self.states else None
        return Proposal(torch.tensor([[7, 8]] * len(rows)), (2,) * len(rows), None, confidence)

    def observe(self, batch, taps, verdict):
        pass

    def release(self, request_id):
        pass


def drafting_rows(*texts, first=0):
    """Rows whose requests have read these tokens; the last is the anchor."""
    rows = []
    for number, text in enumerate(texts, first):
        request = Request(f"r{number}", (1,), SamplingParams(), seed=number)
        request.token_ids = list(text)
        rows.append(Row(request, len(text) - 1, 1, True, 4))
    return rows


@pytest.mark.parametrize("states", [True, False])
def test_where_nothing_is_found_all_is_the_heads(states):
    drafter = PortfolioDrafter(NgramDrafter(4, 3), Head(states), "head")
    fresh = drafting_rows(range(10), range(20, 30))
    proposal = drafter.propose(fresh)
    assert proposal.tokens.tolist() == [[7, 8], [7, 8]]
    assert (proposal.n_draft, proposal.drafters) == ((2, 2), ("head", "head"))
    # What it says itself, or what is known of its drafts.
    first = 0.9 if states else float(drafter.acceptance.rates(["r0"])[0, 0])
    assert proposal.confidence[:, 0].tolist() == pytest.approx([first] * 2)
    assert drafter._pending == ["r0", "r1"]
    # The same as beside a row that has something to copy: its text repeats.
    copying = drafting_rows([5, 6, 7, 8, 9, 5, 6, 7], first=2)
    sure(drafter)
    mixed = drafter.propose([*fresh, *copying])
    assert drafter._head.asked == [2, 2]
    assert mixed.drafters == ("head", "head", "ngram")
    assert drafter._pending == ["r0", "r1", None]
    assert torch.equal(mixed.tokens[:2, :2], proposal.tokens)
    assert torch.equal(mixed.confidence[:2, :2], proposal.confidence)
    assert mixed.tokens[2].tolist() == [8, 9, 5, 6]
    assert mixed.confidence[2].tolist() == pytest.approx(drafter.copies.chances(copying[0].request, 4))


def sure(drafter):
    """Copies of a text like the rows' have gone on whenever they were seen."""
    text = drafting_rows([1, 2, 3, 4], first=99)[0].request
    for token in [1, 2, 3, 4] * 50:
        text.token_ids.append(token)
        drafter.copies.tokens(text, 1)
    for odds in drafter.copies._odds.values():
        odds.right[:] = [0.98 * tried for tried in odds.tried]


def test_who_copies_what_is_unlikely_drafts_with_the_head():
    drafter = PortfolioDrafter(NgramDrafter(4, 3), Head(True), "head")
    rows = drafting_rows([5, 6, 7, 8, 9, 5, 6, 7])
    for _ in range(60):
        drafter.acceptance.record("r0", 2, 2)
    assert drafter.propose(rows).drafters == ("head",)
    sure(drafter)
    assert drafter.propose(rows).drafters == ("ngram",)


def test_what_a_row_may_not_draft_is_no_argument_for_the_head():
    drafter = PortfolioDrafter(NgramDrafter(4, 3), Head(True), "head")
    (row,) = drafting_rows([5, 6, 7, 8, 9, 5, 6, 7])
    sure(drafter)
    for _ in range(200):
        drafter.acceptance.record("r0", 2, 2)
    short = row._replace(max_drafts=1)
    assert drafter.propose([short]).drafters == ("ngram",)
    for odds in drafter.copies._odds.values():
        odds.right[:] = [0.7 * tried for tried in odds.tried]
    assert drafter.propose([row]).drafters == ("ngram",)  # four copied tokens against two
    assert drafter.propose([row._replace(max_drafts=2)]).drafters == ("head",)
    assert drafter.propose([short]).drafters == ("ngram",)  # 1.7 against 2 / 1.3


def test_only_the_heads_drafts_are_recorded():
    drafter = PortfolioDrafter(NgramDrafter(4, 3), Head(True), "head")
    verdict = SimpleNamespace(host_tokens=[(1, 2, 3), (1,), (1, 2)])
    drafter._judged = _Judged([None, "r1", "r2"], (0, 1, 2), (3, 3, 1), verdict)
    drafter.propose(drafting_rows(range(10)))
    assert list(drafter.acceptance._line) == ["r1"]  # the third had nothing verified
    assert drafter.acceptance.rates(["r1"])[0, 0] < 0.5


def test_rows_that_may_only_look_up_take_no_pass():
    drafter = PortfolioDrafter(NgramDrafter(4, 3), Head(True), "head")
    rows = [row._replace(lookup_only=True) for row in drafting_rows([5, 6, 7, 8, 9, 5, 6, 7], range(10))]
    got = drafter.propose(rows)
    assert (drafter._head.asked, drafter._pending) == ([], [None, None])
    assert got.tokens.tolist() == [[8, 9, 5, 6], [-1] * 4]
    assert (got.n_draft, got.drafters) == ((4, 0), ("ngram", "ngram"))
    beside = drafter.propose([*rows, *drafting_rows(range(20, 30), first=5)])
    assert drafter._head.asked == [1]
    assert (beside.n_draft, beside.drafters) == ((4, 0, 2), ("ngram", "ngram", "head"))
