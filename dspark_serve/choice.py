"""One choice of an answer: token deltas in; text, tokens, logprobs and the reason of the end out.

Shared by the server and the offline API, so that both stop and count alike. Must not know: HTTP, torch, the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dspark_serve.reports import RowReport, TokenDelta
from dspark_serve.text import Detokenizer, Tokenizer
from dspark_serve.types import FinishReason, Request, TokenLogprobs

_CONTEXT = 8  # prompt tokens that decide how the first generated one reads


Source = Literal["plain", "draft", "bonus"]  # no drafts verified; an accepted draft; the token that follows drafts


@dataclass(frozen=True)
class Mark:
    """How a token came to be, and its share of the text; the shares of an answer's marks, joined, are its text.

    Text that is held back (it may begin a stop string) follows in a mark of the same index whose `source` is None. Of
    a character made of several tokens the last one has it all.
    """

    index: int  # of the token in its choice
    text: str
    source: Source | None = None
    position: int | None = None  # of a draft: its place in the draft, from 0
    drafter: str = ""  # of a draft: who made it


@dataclass(frozen=True)
class Piece:
    """What one delta adds to a choice. `finish_reason` is set on the last piece, `stop_reason` says what stopped it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # as in vLLM: the stop string, or the stop token unless it is the model's own
    marks: tuple[Mark, ...] = ()  # of the tokens, where asked for


class Choice:
    """Collects the deltas of one request. Without a tokenizer the text stays empty and stop strings never match.

    `mark_tokens`: say of every token how it came to be.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        skip_special_tokens: bool = True,
        mark_tokens: bool = False,
    ) -> None:
        self.request = request
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.marks: list[Mark] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.num_cached = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._shares = _Shares() if mark_tokens else None
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer,
                request.params.stop,
                skip_special_tokens=skip_special_tokens,
                min_tokens=request.params.min_tokens,
                context=request.prompt_token_ids[-_CONTEXT:],
            )

    @property
    def stopped_by_text(self) -> bool:
        """True once a stop string has ended the choice: the engine does not know and must be told."""
        return isinstance(self.stop_reason, str)

    def feed(self, delta: TokenDelta) -> Piece:
        """Add a delta. Tokens after the one that completes a stop string are dropped, as if never generated."""
        self.prompt_logprobs.extend(delta.prompt_logprobs or ())
        self.num_cached = delta.num_cached or self.num_cached
        reason = delta.finish_reason
        stop_reason: int | str | None = None
        if reason == "stop" and delta.stop_token_id not in self.request.eos_token_ids:
            stop_reason = delta.stop_token_id
        text, n_used, stop_string = self._detokenize(delta)
        marks = () if self._shares is None else tuple(self._shares.marks(len(self.token_ids), n_used, delta.row))
        if stop_string is not None:
            reason, stop_reason = "stop", stop_string
        tokens, logprobs = delta.token_ids[:n_used], (delta.logprobs or ())[:n_used]
        self.text += text
        self.token_ids.extend(tokens)
        self.logprobs.extend(logprobs)
        self.marks.extend(marks)
        self.finish_reason, self.stop_reason = reason, stop_reason
        return Piece(text, tokens, logprobs, reason, stop_reason, marks)

    def _detokenize(self, delta: TokenDelta) -> tuple[str, int, str | None]:
        """New text, tokens of the delta that count, and the stop string that came up."""
        tokens, detokenizer = delta.token_ids, self._detokenizer
        if detokenizer is None:
            return "", len(tokens), None
        # The stop token ends the text and is no part of it.
        shown = len(tokens) - (delta.finish_reason == "stop" and delta.stop_token_id is not None)
        before = detokenizer.num_tokens
        text = self._feed(detokenizer, tokens[:shown])
        if detokenizer.stopped:
            return text, detokenizer.num_tokens - before, detokenizer.stop_string
        if delta.finish_reason is not None:
            rest = detokenizer.flush()  # may complete a stop string, which then ended the text at its last token
            if self._shares is not None:
                self._shares.rest(rest)
            text += rest
        return text, len(tokens), detokenizer.stop_string

    def _feed(self, detokenizer: Detokenizer, tokens: tuple[int, ...]) -> str:
        if self._shares is None:
            return detokenizer.feed(tokens)
        text = ""
        for index, token in enumerate(tokens, len(self.token_ids)):
            if detokenizer.stopped:
                break
            held = detokenizer.num_held
            part = detokenizer.feed((token,))
            self._shares.token(index, len(part) + detokenizer.num_held - held, part)
            text += part
        return text


class _Shares:
    """Deals text to the tokens it is made of, as it is given out: what is held back is owed to its token."""

    def __init__(self) -> None:
        self._owed: deque[tuple[int, int]] = deque()  # token, characters
        self._dealt: list[tuple[int, str]] = []  # since the last marks, in order
        self._last = 0

    def token(self, index: int, length: int, given: str) -> None:
        """The token at `index` is so many characters of text (fewer if it ended the text); `given` has come out."""
        self._last = index
        if length > 0:
            self._owed.append((index, length))
        self._deal(given)

    def rest(self, given: str) -> None:
        """The end of the text. More than was owed is an incomplete character, which the last token left."""
        self._deal(given)

    def _deal(self, given: str) -> None:
        while given:
            index, length = self._owed.popleft() if self._owed else (self._last, len(given))
            share, given = given[:length], given[length:]
            self._dealt.append((index, share))
            if len(share) < length:
                self._owed.appendleft((index, length - len(share)))

    def marks(self, first: int, count: int, row: RowReport | None) -> Iterator[Mark]:
        """Marks of the tokens first..first+count-1, which came of `row`, and before them of what older ones got."""
        shares = [""] * count
        for index, text in self._dealt:
            if index < first:
                yield Mark(index, text)
            else:
                shares[index - first] += text
        self._dealt.clear()
        for place, text in enumerate(shares):
            if row is None or not row.n_kept:
                yield Mark(first + place, text, "plain")
            elif place < row.n_accepted:
                yield Mark(first + place, text, "draft", place, row.drafter)
            else:
                yield Mark(first + place, text, "bonus")


def choice_seeds(seed: int, n: int) -> list[int]:
    """The seeds of `n` choices of one prompt: seed, seed + 1, ..., wrapped into the 64 bits that a seed may have."""
    return [each if each < 1 << 64 else each - (1 << 64) for each in range(seed, seed + n)]
