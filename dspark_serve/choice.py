"""One choice of an answer: token deltas in; text, tokens, logprobs and the reason of the end out.

Shared by the server and the offline API, so that both stop and count alike. Must not know: HTTP, torch, the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark_serve.text import Detokenizer, Tokenizer
from dspark_serve.types import FinishReason, Request, TokenDelta, TokenLogprobs

_CONTEXT = 8  # prompt tokens that decide how the first generated one reads


@dataclass(frozen=True)
class Piece:
    """What one delta adds to a choice. `finish_reason` is set on the last piece, `stop_reason` says what stopped it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # as in vLLM: the stop string, or the stop token unless it is the model's own


class Choice:
    """Collects the deltas of one request. Without a tokenizer the text stays empty and stop strings never match."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, skip_special_tokens: bool = True) -> None:
        self.request = request
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.num_cached = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
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
        if stop_string is not None:
            reason, stop_reason = "stop", stop_string
        tokens, logprobs = delta.token_ids[:n_used], (delta.logprobs or ())[:n_used]
        self.text += text
        self.token_ids.extend(tokens)
        self.logprobs.extend(logprobs)
        self.finish_reason, self.stop_reason = reason, stop_reason
        return Piece(text, tokens, logprobs, reason, stop_reason)

    def _detokenize(self, delta: TokenDelta) -> tuple[str, int, str | None]:
        """New text, tokens of the delta that count, and the stop string that came up."""
        tokens, detokenizer = delta.token_ids, self._detokenizer
        if detokenizer is None:
            return "", len(tokens), None
        # The stop token ends the text and is no part of it.
        shown = len(tokens) - (delta.finish_reason == "stop" and delta.stop_token_id is not None)
        before = detokenizer.num_tokens
        text = detokenizer.feed(tokens[:shown])
        if detokenizer.stopped:
            return text, detokenizer.num_tokens - before, detokenizer.stop_string
        if delta.finish_reason is not None:
            text += detokenizer.flush()  # may complete a stop string, which then ended the text at its last token
        return text, len(tokens), detokenizer.stop_string


def choice_seeds(seed: int, n: int) -> list[int]:
    """The seeds of `n` choices of one prompt: seed, seed + 1, ..., wrapped into the 64 bits that a seed may have."""
    return [each if each < 1 << 64 else each - (1 << 64) for each in range(seed, seed + n)]
