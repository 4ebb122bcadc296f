"""Prompt lookup against a slow search of the same history."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.types import Request, Row, SamplingParams


def row_of(tokens, max_drafts=8, request_id="r"):
    request = Request(request_id, tuple(tokens), SamplingParams(), seed=0, token_ids=list(tokens))
    return Row(request, len(tokens) - 1, 1, True, max_drafts)


def slow_lookup(tokens, shortest, longest, count):
    """The longest suffix that occurs earlier, at its latest earlier place, and what follows, repeated past the end."""
    for length in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[len(tokens) - length :]:
                period = len(tokens) - (start + length)
                endless = tokens + [0] * count
                for i in range(count):
                    endless[len(tokens) + i] = endless[len(tokens) + i - period]
                return endless[len(tokens) :][:count]
    return []


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2), st.integers(1, 6))
def test_equals_the_slow_search(tokens, shortest, more, width):
    drafter = NgramDrafter(width, shortest, shortest + more)
    got = drafter.propose([row_of(tokens)])
    assert got.tokens[0, : got.n_draft[0]].tolist() == slow_lookup(tokens, shortest, shortest + more, width)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.data())
def test_incremental_history_equals_a_fresh_one(tokens, data):
    drafter = NgramDrafter(4)
    for end in sorted(data.draw(st.sets(st.integers(1, len(tokens)), min_size=1))):
        grown = drafter.propose([row_of(tokens[:end])])
        fresh = NgramDrafter(4).propose([row_of(tokens[:end])])
        assert grown.n_draft == fresh.n_draft
        assert grown.tokens.tolist() == fresh.tokens.tolist()


def test_rows_are_ragged_and_limited():
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    got = NgramDrafter(4).propose([row_of(text, 3, "a"), row_of([7, 8, 9], 3, "b"), row_of(text, 1, "c")])
    assert got.n_draft == (3, 0, 1)
    assert got.tokens.tolist() == [[3, 4, 5], [-1, -1, -1], [3, -1, -1]]


def test_release_forgets_so_a_reused_id_starts_afresh():
    drafter = NgramDrafter(4)
    drafter.propose([row_of([1, 2, 3, 1, 2])])
    drafter.release("r")
    drafter.release("never seen")
    assert drafter.propose([row_of([4, 5, 6, 1, 2])]).n_draft == (0,)


def test_lookup_bounds_are_checked():
    with pytest.raises(ValueError, match="prompt_lookup_min"):
        NgramDrafter(4, shortest=3, longest=2)
