"""Prompt lookup: where the last few tokens occurred before, propose what followed them then (Saxena 2023).

Costs a dictionary look-up per row and no model. Must not know: verification, budget, pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dspark_serve.tensors import Proposal, StepBatch, Verdict
from dspark_serve.types import Row


@dataclass
class _History:
    """follow[n-gram] is the position after its latest occurrence that has a successor."""

    follow: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 1  # n-grams that end before this position are in `follow`


class NgramDrafter:
    """Looks up the last `longest` tokens, then fewer, down to `shortest`; the latest earlier occurrence wins.

    Drafts are certain (one-hot), so `draft_probs` is None.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, width: int, shortest: int = 2, longest: int = 5) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"prompt_lookup_min ({shortest}) must be 1 or more and at most prompt_lookup_max ({longest})"
            )
        self.width = width
        self._lengths = range(longest, shortest - 1, -1)
        self._histories: dict[str, _History] = {}

    def propose(self, rows: Sequence[Row]) -> Proposal:
        return Proposal.from_lists([self.look_up(row)[0] for row in rows])

    def look_up(self, row: Row) -> tuple[list[int], int]:
        """A row's drafts, and how many of its last tokens occurred before; ([], 0) where none did."""
        history = self._histories.setdefault(row.request.request_id, _History())
        tokens = row.request.token_ids
        self._index(history, tokens)
        for length in self._lengths:
            start = history.follow.get(tuple(tokens[-length:])) if length < len(tokens) else None
            if start is not None:
                return self._copy(tokens, start, min(self.width, row.max_drafts)), length
        return [], 0

    def _index(self, history: _History, tokens: list[int]) -> None:
        for end in range(history.indexed, len(tokens)):
            for length in self._lengths:
                if length <= end:
                    history.follow[tuple(tokens[end - length : end])] = end
        history.indexed = max(history.indexed, len(tokens))

    @staticmethod
    def _copy(tokens: list[int], start: int, count: int) -> list[int]:
        """`count` tokens from `start`; a copy that reaches the end runs on into itself, as a repetition would."""
        drafts: list[int] = []
        for position in range(start, start + count):
            drafts.append(tokens[position] if position < len(tokens) else drafts[position - len(tokens)])
        return drafts

    def observe(self, batch: StepBatch, taps: Tensor | None, verdict: Verdict) -> None:
        """Nothing to learn: the history is the request's own tokens."""

    def release(self, request_id: str) -> None:
        self._histories.pop(request_id, None)
