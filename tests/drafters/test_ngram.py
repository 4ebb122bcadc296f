"""Prompt lookup as a drafter: proposals of ragged rows. What it finds: test_copies.py."""

import pytest

from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.types import Request, Row, SamplingParams


def row_of(tokens, max_drafts=8, request_id="r"):
    request = Request(request_id, tuple(tokens), SamplingParams(), seed=0, token_ids=list(tokens))
    return Row(request, len(tokens) - 1, 1, True, max_drafts)


def test_rows_are_ragged_and_limited():
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    got = NgramDrafter(4).propose([row_of(text, 3, "a"), row_of([7, 8, 9], 3, "b"), row_of(text, 1, "c")])
    assert got.n_draft == (3, 0, 1)
    assert got.tokens.tolist() == [[3, 4, 5], [-1, -1, -1], [3, -1, -1]]
    stated = got.confidence.tolist()
    assert 0 < stated[0][0] < 1  # the same for the third row, which may draft one
    assert stated[1:] == [[0.0] * 3, [stated[0][0], 0.0, 0.0]]
    assert min(stated[0]) > 0


def test_release_forgets_so_a_reused_id_starts_afresh():
    drafter = NgramDrafter(4)
    drafter.propose([row_of([1, 2, 3, 1, 2])])
    drafter.release("r")
    drafter.release("never seen")
    assert drafter.propose([row_of([4, 5, 6, 1, 2])]).n_draft == (0,)


def test_lookup_bounds_are_checked():
    with pytest.raises(ValueError, match="prompt_lookup_min"):
        NgramDrafter(4, shortest=3, longest=2)
