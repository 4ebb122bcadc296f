"""What a text copies, against a slow search of all of it; and how often such copies go on."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serve.drafters.copies import _DECAY, _FEW, _FIRST_GUESS, _GUESSED, _LENGTHS, Copies, _Odds
from dspark_serve.types import Request, Row, SamplingParams

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def request_of(tokens, name="r", temperature=0.0):
    request = Request(name, tuple(tokens), SamplingParams(temperature=temperature), seed=0)
    request.token_ids = list(tokens)
    return request


def row_of(request, max_drafts=16):
    return Row(request, len(request.token_ids) - 1, 1, True, max_drafts)


class Slow:
    """One text, read anew from its beginning every time."""

    def __init__(self, tokens, shortest, longest, stops):
        """stops: how many tokens there were each time that it was looked at, the last time all of them."""
        self.source = self.length = 0
        self.outcomes = []  # (length, whether the copy went on)
        self._tokens, self._shortest, read = tokens, shortest, 0
        for stop in stops:
            if not read or stop - read > _FEW:
                self.source = self.length = 0
                self._read(stop, _LENGTHS[-1] if read else longest)
            else:
                for end in range(read + 1, stop + 1):
                    self._read(end, longest)
            read = stop

    def _read(self, end, longest):
        tokens, shortest = self._tokens, self._shortest
        if self.source:
            went_on = tokens[self.source] == tokens[end - 1]
            self.outcomes.append((self.length, went_on))
            self.source, self.length = (self.source + 1, self.length + 1) if went_on else (0, 0)
        if not self.source and end >= shortest:
            run = tokens[end - shortest : end]
            for place in range(end - 1, shortest - 1, -1):  # the latest first
                if tokens[place - shortest : place] == run:
                    self.source, self.length = place, shortest
                    while self.length < min(longest, place) and (
                        tokens[place - self.length - 1] == tokens[end - self.length - 1]
                    ):
                        self.length += 1
                    break

    def copied(self, tokens, count):
        endless = list(tokens)
        for position in range(self.source, self.source + count) if self.source else ():
            endless.append(endless[position])
        return endless[len(tokens) :]


@settings(deadline=None)
@given(TOKENS, st.integers(1, 3), st.integers(0, 2), st.data())
def test_like_a_slow_search_however_often_it_is_read(tokens, shortest, more, data):
    copies = Copies(shortest, shortest + more)
    stops = sorted(data.draw(st.sets(st.integers(1, len(tokens)), min_size=1)))
    request = request_of(tokens[: stops[0]])
    for count, stop in enumerate(stops, 1):
        request.token_ids = tokens[:stop]
        slow = Slow(tokens[:stop], shortest, shortest + more, stops[:count])
        assert copies.tokens(request, 6) == slow.copied(tokens[:stop], 6)
        odds = copies._texts["r"].odds
        expected = expected_odds(slow.outcomes)
        assert copies.chances(request, 3) == (
            [pytest.approx(expected(slow.length + n)) for n in range(3)] if slow.source else []
        )
        assert sum(odds.tried) >= _GUESSED  # read once each: a second look changes nothing
        assert copies.chances(request, 3) == copies.chances(request, 3)


def place_of(length):
    return max(place for place, least in enumerate(_LENGTHS) if length >= least)


def expected_odds(outcomes):
    def chance(length):
        tried, right = _GUESSED, _GUESSED * _FIRST_GUESS[place_of(length)]
        for other, went_on in outcomes:
            if place_of(other) == place_of(length):
                tried, right = _DECAY * tried + 1, _DECAY * right + went_on
        return min(right / tried, 0.99)

    return chance


def test_a_copy_is_stuck_to_while_it_goes_on():
    text = [1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 9, 9, 1, 2, 3]
    copies, request = Copies(2, 5), request_of(text)
    assert copies.tokens(request, 2) == [4, 6]  # 2 3 occurred last before 4 6
    assert len(copies.chances(request, 2)) == 2
    copies, request = Copies(3, 5), request_of(text)
    assert copies.tokens(request, 2) == [4, 5]
    request.token_ids += [4]
    assert copies.tokens(request, 2) == [5, 9]  # 2 3 4 occurred later, before 6
    request.token_ids += [6]
    assert copies.tokens(request, 2) == [9, 9]  # it did not go on; so does 3 4 6


def test_the_first_look_is_the_same_as_if_it_had_been_followed():
    """But for what was learned: nobody drafts for a prompt, and how its copies went on is no answer's way."""
    text = [1, 2, 3, 4] * 3
    copies = Copies(2, 5)
    request = request_of(text)
    assert copies.tokens(request, 3) == [1, 2, 3]
    odds = copies._texts["r"].odds
    assert odds.tried == [_GUESSED] * len(_LENGTHS)


def test_copies_that_nobody_drafts_tell_how_often_they_go_on():
    copies = Copies(2, 5)
    right, wrong = request_of([1, 2, 3] * 20, "right"), request_of(range(50), "wrong", temperature=1.0)
    for token in [1, 2, 3] * 40:
        right.token_ids.append(token)
        copies.promised([row_of(right)], 0.5)
    for _ in range(60):
        wrong.token_ids += [3, 4]
        copies.promised([row_of(wrong)], 0.5)
        wrong.token_ids += [99 + len(wrong.token_ids)]  # never what followed
        copies.promised([row_of(wrong)], 0.5)
    # A text as hot as the second, and one as cold as the first, not seen before.
    hot, cold = request_of([7, 8, 9, 7, 8], "hot", temperature=1.0), request_of([7, 8, 9, 7, 8], "cold")
    assert copies.chances(hot, 1)[0] < 0.15
    assert copies.chances(cold, 1)[0] == _FIRST_GUESS[1]  # those that went on had gone on for long already
    assert copies.chances(right, 1)[0] == 0.99


def test_what_is_promised():
    copies = Copies(2, 5)
    copying, alone = request_of([1, 2, 3, 4, 1, 2], "copying"), request_of(range(9), "alone")
    chances = copies.chances(copying, 3)
    survival = [chances[0], chances[0] * chances[1], chances[0] * chances[1] * chances[2]]
    rows = [row_of(alone), row_of(copying, 3), row_of(copying, 0), row_of(copying, 1)]
    assert copies.promised(rows, 0.05) == [(1, pytest.approx(survival)), (3, survival[:1])]
    assert copies.promised(rows, survival[1]) == [(1, pytest.approx(survival[:2])), (3, survival[:1])]
    assert copies.promised(rows, survival[0]) == [(1, survival[:1]), (3, survival[:1])]
    assert copies.promised(rows, 1.01 * survival[0]) == []
    assert copies.promised(rows[:1], 0.0) == []
    slight = copies.promised([row_of(copying, 99)], 0.0)[0][1]
    assert slight[-1] > 0.05 > slight[-1] * copies.chances(copying, len(slight) + 1)[-1]


def test_a_text_is_looked_at_again_when_a_copy_could_have_gone_on_for_long_enough(monkeypatch):
    copies, looks = Copies(2, 5), []
    read = copies._read
    monkeypatch.setattr(copies, "_read", lambda request: looks.append(len(request.token_ids)) or read(request))
    text = request_of(range(20))  # copies nothing

    def grow(tokens, least):
        found = []
        for token in tokens:
            text.token_ids.append(token)
            found.append(bool(copies.promised([row_of(text)], least)))
        return found

    assert copies.promised([row_of(text)], 0.6) == []
    # By the first guess, 0.65 after 5 tokens, of which one at most has agreed so far; 0.75 takes 7, and 0.92 takes 16.
    grow([100, 101, 102, 103], 0.6)
    assert looks == [20, 24]
    looks.clear()
    grow([104, 105, 106, 107], 0.7)
    assert looks == [28]
    looks.clear()
    grow(range(200, 211), 0.9)
    assert looks == [34]
    # It copies 20 tokens. After 10 of them that is seen, and after 16 it is of use.
    looks.clear()
    assert grow(range(20), 0.9) == [False] * 15 + [True] * 5
    assert looks == [49, 55, 56, 57, 58, 59]
    assert not any(grow([999, 1000], 0.9))
    looks.clear()
    copies.promised([row_of(text)], 0.95)
    assert looks == []
    copies.promised([row_of(text)], 0.89)  # might be of use by now
    assert looks == [len(text.token_ids)]
    looks.clear()
    copies.release("r")
    copies.promised([row_of(text)], 0.9)
    assert looks == [len(text.token_ids)]  # what was known of one that has ended says nothing of another


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (2, 5), (3, 5), (3, 7)])
@pytest.mark.parametrize("least", [0.5, 0.6, 0.7])
def test_nothing_is_missed_between_looks(shortest, longest, least, monkeypatch):
    """Against looking all the time. Without learning, which comes later where nobody looks."""
    monkeypatch.setattr(_Odds, "add", lambda self, length, went_on: None)
    draw, found, looks = random.Random(0), 0, [0, 0]
    for _ in range(60):
        now_and_then, always = Copies(shortest, longest), Copies(shortest, longest)
        for index, copies in enumerate((now_and_then, always)):

            def counted(request, index=index, read=copies._read):
                looks[index] += 1
                return read(request)

            monkeypatch.setattr(copies, "_read", counted)
        text = request_of([0, 1, 2])
        for _ in range(60):
            if draw.random() < 0.3:  # something that has been there
                start = draw.randrange(len(text.token_ids))
                more = text.token_ids[start : start + draw.randrange(3, 13)]
            else:
                more = [draw.randrange(6)]
            for token in more:
                text.token_ids.append(token)
                always._due.clear()
                expected = always.promised([row_of(text)], least)
                assert now_and_then.promised([row_of(text)], least) == expected
                found += bool(expected)
    assert found > 100
    assert looks[0] < looks[1]


def test_many_new_tokens_are_remembered_and_what_the_last_copies_may_have_gone_on_for_long():
    copies = Copies(2, 5)
    text = request_of([*range(30), 99])
    copies.promised([row_of(text)], 0.5)
    text.token_ids += [*range(_FEW)]
    assert copies._read(text).length == _FEW  # followed one by one
    tried = list(copies._texts["r"].odds.tried)
    text.token_ids += [*range(_FEW, 2 * _FEW + 1), 50]
    text.token_ids += [*range(3, 25)]
    read = copies._read(text)
    assert (read.source, read.length) == (25, _LENGTHS[-1])
    assert copies.tokens(text, 3) == [25, 26, 27]
    assert read.odds.tried == tried  # no copy was tried meanwhile
    # All that it skipped is there: what came last is what is copied from.
    text.token_ids += [50, 3]
    assert copies.tokens(text, 2) == [4, 5]
    assert copies._read(text).source == text.token_ids.index(50) + 2


def test_how_long_a_copy_must_have_gone_on():
    copies = Copies(2, 5)
    odds = copies._texts.setdefault("r", copies._read(request_of([1, 2, 3]))).odds
    assert [odds.length_for(least) for least in (0.0, 0.25, 0.26, 0.75, 0.76, 0.92, 0.98)] == [1, 1, 2, 7, 10, 16, 16]
    for _ in range(500):
        odds.add(4, True)
    assert odds.length_for(0.98) == 4
    assert odds.chance(4) == 0.99


def test_a_text_that_was_never_looked_at_while_it_grew_is_read_in_one_go():
    late, always = Copies(2, 5), Copies(2, 5)
    request = request_of([5, 6, 7, 5, 6])
    late.promised([row_of(request)], 0.9)
    for token in (7, 5, 6, 7, 8, 5, 6, 7):
        request.token_ids.append(token)
        always.promised([row_of(request)], 0.9)
    late.promised([row_of(request)], 0.9)
    fresh = Copies(2, 5)
    assert late.tokens(request, 4) == always.tokens(request, 4) == fresh.tokens(request, 4)


def test_release_forgets_so_a_reused_id_starts_afresh():
    copies = Copies(2, 5)
    assert copies.tokens(request_of([1, 2, 3, 1, 2]), 2) == [3, 1]
    copies.release("r")
    copies.release("never seen")
    assert copies.tokens(request_of([4, 5, 6, 1, 2]), 2) == []


def test_lookup_bounds_are_checked():
    with pytest.raises(ValueError, match="prompt_lookup_min"):
        Copies(3, 2)


@pytest.mark.parametrize("least", [0.6, 0.7])
def test_nothing_would_be_promised_in_steps_that_are_to_be_quiet(least, monkeypatch):
    """Several texts together, each a token further in every step; against looking at all of them all the time."""
    monkeypatch.setattr(_Odds, "add", lambda self, length, went_on: None)
    draw, found, quiet, asked = random.Random(1), 0, 0, 0
    for _ in range(40):
        now_and_then, always = Copies(3, 5), Copies(3, 5)
        texts = [request_of([0, 1, 2, 3], name) for name in "abc"]
        ahead = {name: [] for name in "abc"}
        for _ in range(80):
            for text in texts:
                to_come = ahead[text.request_id]
                if not to_come:
                    start = draw.randrange(len(text.token_ids))
                    to_come += text.token_ids[start : start + 25] if draw.random() < 0.1 else [draw.randrange(99)]
                text.token_ids.append(to_come.pop(0))
            rows = [row_of(text) for text in texts]
            always._due.clear()
            expected = always.promised(rows, least)
            found += bool(expected)
            if quiet > 0:
                quiet -= 1
                assert expected == []
                continue
            asked += 1
            assert now_and_then.promised(rows, least) == expected
            quiet = 0 if expected else now_and_then.quiet(rows)
        quiet = 0
    assert found > 100
    assert asked < 0.9 * 40 * 80
    assert Copies(3, 5).quiet([row_of(texts[0], 0)]) > 0  # who may not draft is not looked at
    assert Copies(3, 5).quiet([row_of(texts[0])]) < 0  # what was never looked at is due
