"""Where a text repeats itself: what it copies from, for how long it has, and how often such a copy goes on.

Followed token by token, whether anything is drafted or not: a copy that nobody drafted is right or wrong all the same,
so the chances are those of all copies, not of the drafts that somebody chose to verify. Must not know: torch, budgets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_serve.types import Request, Row, temperature_range

# Lengths from which copies have odds of their own. What has gone on for long goes on: in answers of the default model
# after 3 tokens in one half of all cases, after 16 in nine out of ten.
_LENGTHS = (1, 2, 3, 4, 5, 7, 10, 16)
_FIRST_GUESS = (0.25, 0.4, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92)
_GUESSED = 8.0  # copies seen at which they count as much as the first guess
_DECAY = 0.995  # of old evidence, per copy of that length
_SUREST, _SLIGHT = 0.99, 0.05  # no chance is more; what has less is of no use to anybody
_FEW = 8  # tokens that are followed one by one; of more, only what the last of them copy is looked for
_SOON = 2  # steps before it is due that a text is looked at if another one is due: then all are, and none for a while
_LONG = 64  # steps
_BITS = 20  # of a token id in the number of a run
_PLACES = tuple(bisect_right(_LENGTHS, length) - 1 for length in range(_LENGTHS[-1] + 1))  # by length


@dataclass(slots=True)
class _Odds:
    """How often copies went on for another token, by how long they had."""

    tried: list[float] = field(default_factory=lambda: [_GUESSED] * len(_LENGTHS))
    right: list[float] = field(default_factory=lambda: [_GUESSED * guess for guess in _FIRST_GUESS])

    def add(self, length: int, went_on: bool) -> None:
        place = _PLACES[length] if length < len(_PLACES) else -1
        self.tried[place] = _DECAY * self.tried[place] + 1
        self.right[place] = _DECAY * self.right[place] + went_on

    def chance(self, length: int) -> float:
        place = _PLACES[length] if length < len(_PLACES) else -1
        return min(self.right[place] / self.tried[place], _SUREST)

    def length_for(self, least: float) -> int:
        """How long a copy must have gone on to have this chance; no shorter one has it."""
        pairs = zip(_LENGTHS, self.right, self.tried, strict=True)
        return next((length for length, right, tried in pairs if right >= least * tried), _LENGTHS[-1])


@dataclass(slots=True)
class _Text:
    """A request's tokens as far as they were read."""

    request: Request
    odds: _Odds
    follow: dict[int, int] = field(default_factory=dict)  # the position after the latest occurrence of each run
    read: int = 0
    run: int = 0  # the last tokens as one number, which takes a third less to look up than a tuple
    source: int = 0  # position of the token that the copy goes on with; 0: it copies nothing
    length: int = 0  # tokens that agree before it


class Copies:
    """Follows texts. A copy begins where the last `shortest` tokens occurred before, at the latest place, counts as
    long as the tokens that agree there, up to `longest` of them, and is stuck to for as long as it goes on.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"prompt_lookup_min ({shortest}) must be 1 or more and at most prompt_lookup_max ({longest})"
            )
        self._shortest, self._longest = shortest, longest
        self._last = (1 << _BITS * shortest) - 1  # of a run's number: the tokens that make it up
        self._texts: dict[str, _Text] = {}
        self._odds: dict[int, _Odds] = {}  # by temperature range
        self._least = 0.0  # chance that was asked for the last time, and how many tokens each text must have before it
        self._due: dict[Request, int] = {}  # can copy anything that has it

    def tokens(self, request: Request, count: int) -> list[int]:
        """The next `count` tokens of what the text copies; [] where it copies nothing. A copy that reaches the end runs
        on into itself, as a repetition would."""
        text, known = self._read(request), request.token_ids
        drafts: list[int] = []
        for position in range(text.source, text.source + count) if text.source else ():
            drafts.append(known[position] if position < len(known) else drafts[position - len(known)])
        return drafts

    def chances(self, request: Request, count: int) -> list[float]:
        """That each of these tokens is right, given that those before it are."""
        text = self._read(request)
        return [text.odds.chance(text.length + more) for more in range(count)] if text.source else []

    def promised(self, rows: Sequence[Row], least: float) -> list[tuple[int, list[float]]]:
        """The rows, by index, whose copy goes on with at least this chance, with the chances that its first 1, 2, ...
        tokens are all right: as many as have that chance, and as the row may draft.

        A text whose copy would have to go on for longer to have it is not looked at until then: after a pass of the
        target little of it is left in any cache, and a look takes 5 us.
        """
        found: list[tuple[int, list[float]]] = []
        due = self._due
        if least < self._least:
            due.clear()
        self._least = least
        if self.quiet(rows) >= 0:
            return found
        for index, (request, start, _, _, most, _) in enumerate(rows):
            if most <= 0 or due.get(request, 0) > start + 1 + _SOON:
                continue
            text = self._read(request)
            if text.source and (chance := text.odds.chance(text.length)) >= least:
                found.append((index, _survival(text, chance, most, max(least, _SLIGHT))))
            else:
                # Where it copies nothing, not even its last `shortest` tokens have been there before. A copy that ends
                # may give way to another that has gone on for as long as is compared.
                agreed = max(text.length, self._longest) if text.source else self._shortest - 1
                due[request] = text.read + max(text.odds.length_for(least) - agreed, 1)
        return found

    def quiet(self, rows: Sequence[Row]) -> int:
        """For how many steps after this one no text will be looked at, if each goes on by a token per step; less than 0
        if one is due now. Asked when nothing was found, so what `least` was then goes for all of them."""
        due = self._due
        return min([due.get(row.request, 0) - row.start for row in rows if row.max_drafts > 0], default=_LONG) - 2

    def _read(self, request: Request) -> _Text:
        """The request's text, with all its tokens read."""
        tokens, size, last = request.token_ids, self._shortest, self._last
        text, most = self._texts.get(request.request_id), self._longest
        if text is None:
            odds = self._odds.setdefault(temperature_range(request.params.temperature), _Odds())
            text = self._texts[request.request_id] = _Text(request, odds)
            self._skim(text, tokens)  # how copies within a prompt went on is no answer's way
        elif len(tokens) - text.read > _FEW:
            self._skim(text, tokens)
            most = _LENGTHS[-1]  # what it copies may have gone on for long
        odds, follow, run, source, length = text.odds, text.follow, text.run, text.source, text.length
        for end, token in enumerate(tokens[text.read :], text.read + 1):
            if source:
                went_on = tokens[source] == token
                odds.add(length, went_on)
                source, length = (source + 1, length + 1) if went_on else (0, 0)
            run = (run << _BITS | token) & last
            if end < size:
                continue
            before = follow.get(run)
            follow[run] = end
            if before is not None and not source:
                source, length = before, self._agreeing(tokens, before, end, most)
        text.read, text.run, text.source, text.length = len(tokens), run, source, length
        return text

    def _skim(self, text: _Text, tokens: Sequence[int]) -> None:
        """Reads all but the last token, without looking for what they copy."""
        follow, run, size, last, read = text.follow, text.run, self._shortest, self._last, len(tokens) - 1
        for end, token in enumerate(tokens[text.read : read], text.read + 1):
            run = (run << _BITS | token) & last
            if end >= size:
                follow[run] = end
        text.read, text.run, text.source, text.length = read, run, 0, 0

    def _agreeing(self, tokens: Sequence[int], one: int, other: int, most: int) -> int:
        """Tokens that agree before these two positions, up to `most`; the last `shortest` of them do."""
        length = self._shortest
        while length < min(most, one) and tokens[one - length - 1] == tokens[other - length - 1]:
            length += 1
        return length

    def release(self, request_id: str) -> None:
        """The request is finished; forget it. Unknown ids are fine."""
        text = self._texts.pop(request_id, None)
        if text is not None:
            self._due.pop(text.request, None)


def _survival(text: _Text, first: float, most: int, least: float) -> list[float]:
    """The chances that the first 1, 2, ... tokens of a copy are all right, up to `most` of them; the first whatever it
    is, and others as long as they are no less than `least`."""
    chance, right = text.odds.chance, first
    survival = [first]
    for length in range(text.length + 1, text.length + most):
        right *= chance(length)
        if right < least:
            break
        survival.append(right)
    return survival
