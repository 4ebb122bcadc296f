"""Marks of tokens: whatever bytes, stop strings and bursts, they add up to the text and say what the step reported."""

import codecs
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serve.choice import Choice
from dspark_serve.reports import RowReport, TokenDelta
from dspark_serve.text import Tokenizer
from dspark_serve.types import Request, SamplingParams
from tests.tiny_model import EOS, byte_tokenizer

# Few symbols, so that stop strings begin often; bytes of characters of two to four bytes, so that many are torn.
BYTES = [*b"aab", *"ä€😀".encode()]


@cache
def tokenizer():
    return Tokenizer(byte_tokenizer())


def choice(stop=(), mark=True, tokenizer=tokenizer):
    request = Request("r", (1,), SamplingParams(stop=tuple(stop)), seed=0, eos_token_ids=frozenset({EOS}))
    return Choice(request, tokenizer(), mark_tokens=mark)


def feed(choice, bursts, ended=True):
    """Each burst is (tokens, drafts verified); all but its last token were drafted. Pieces until the choice ends."""
    for number, (tokens, kept) in enumerate(bursts):
        last = ended and number == len(bursts) - 1
        stopped = last and tokens[-1] == EOS
        reason = ("stop" if stopped else "length") if last else None
        row = RowReport(kept, kept, len(tokens) - 1, "them")
        yield choice.feed(TokenDelta("r", tuple(tokens), reason, EOS if stopped else None, row=row))
        if choice.stopped_by_text:
            return


steps = st.lists(st.lists(st.sampled_from(BYTES), min_size=1, max_size=5), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(steps, st.lists(st.text("abä€", min_size=1, max_size=3), max_size=2), st.booleans())
def test_marks_add_up_to_the_text_of_every_piece(steps, stop, eos):
    if eos:
        steps = [*steps[:-1], [*steps[-1], EOS]]
    bursts = [(tokens, len(tokens) - 1) for tokens in steps]
    marked, plain = choice(stop), choice(stop, mark=False)
    pieces = list(feed(marked, bursts))
    for piece, other in zip(pieces, feed(plain, bursts), strict=True):
        assert "".join(mark.text for mark in piece.marks) == piece.text == other.text
        assert (piece.token_ids, piece.finish_reason, other.marks) == (other.token_ids, other.finish_reason, ())
    own = [mark for mark in marked.marks if mark.source is not None]
    assert [mark.index for mark in own] == list(range(len(marked.token_ids)))
    assert marked.token_ids == plain.token_ids
    owners = owned(marked.token_ids)[: len(marked.text)]
    assert "".join(character for character, _ in owners) == marked.text
    for index in range(len(marked.token_ids)):
        share = "".join(mark.text for mark in marked.marks if mark.index == index)
        assert share == "".join(character for character, owner in owners if owner == index)


def owned(token_ids):
    """The characters of all the tokens, each with the token that completed it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    real = [token for token in token_ids if token != EOS]
    found = [(character, at) for at, token in enumerate(real) for character in decoder.decode(bytes([token]))]
    return found + [(character, len(real) - 1) for character in decoder.decode(b"", final=True)]


def test_sources_are_the_steps():
    marks = [
        [(mark.source, mark.position, mark.drafter) for mark in piece.marks]
        for piece in feed(choice(), [(b"a", 0), (b"abc", 4), (b"x", 2), (b"yz", 1)], ended=False)
    ]
    bonus = ("bonus", None, "")
    assert marks == [
        [("plain", None, "")],
        [("draft", 0, "them"), ("draft", 1, "them"), bonus],
        [bonus],
        [("draft", 0, "them"), bonus],
    ]


def test_text_held_back_goes_to_its_own_token():
    held = list(feed(choice(["bcX"]), [(b"ab", 1), (b"c", 0), (b"d", 0)], ended=False))
    got = [[(mark.index, mark.text, mark.source) for mark in piece.marks] for piece in held]
    assert got == [
        [(0, "a", "draft"), (1, "", "bonus")],
        [(2, "", "plain")],
        [(1, "b", None), (2, "c", None), (3, "d", "plain")],
    ]


def test_a_torn_character_at_the_end_is_the_last_tokens():
    [piece] = feed(choice(), [([*b"a", *"ä".encode()[:1], EOS], 2)])
    assert [(mark.text, mark.source) for mark in piece.marks] == [("a", "draft"), ("\ufffd", "draft"), ("", "bonus")]


def test_a_stop_within_the_drafts_drops_what_was_accepted_after_it():
    [piece] = feed(choice(["b"]), [(b"abcd", 3)], ended=False)
    assert [(mark.text, mark.source) for mark in piece.marks] == [("a", "draft"), ("", "draft")]


def test_without_a_tokenizer_there_is_no_text():
    [piece] = feed(choice(tokenizer=lambda: None), [(b"ab", 1)])
    assert [(mark.text, mark.source) for mark in piece.marks] == [("", "draft"), ("", "bonus")]
