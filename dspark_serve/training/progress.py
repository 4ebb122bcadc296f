"""What a training run shows while it lasts: a bar where someone watches, else a line now and then.

Must not know: heads, data, files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

_UPDATES = 50  # that an average is taken over
_EVERY_S = 30.0  # between lines
_FORMAT = "{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}"


def bar(title: str, begin: float = 0.0) -> tqdm:  # type: ignore[type-arg]  # of no iterable
    """A bar from 0 to 1 on stderr; disabled where that is no terminal."""
    return tqdm(total=1.0, initial=begin, desc=title, bar_format=_FORMAT, disable=None, leave=False)


@dataclass(frozen=True)
class _Seen:
    at_s: float
    loss: float
    accepted_length: float
    tokens: int
    anchors: int


class Watch:
    """Averages what the latest updates said."""

    def __init__(self, report: Callable[[str], None], begin: float) -> None:
        """begin: progress of the run so far, in [0, 1]."""
        self._report, self._bar = report, bar("graft", begin)
        self._begin, self._begun = begin, time.monotonic()
        self._told = self._begun
        self._seen: deque[_Seen] = deque(maxlen=_UPDATES)

    def add(self, progress: float, update: int, loss: float, accepted_length: float, tokens: int, anchors: int) -> None:
        """One update's loss, expected accepted length at temperature 1, tokens of text read and anchors trained on."""
        now = time.monotonic()
        self._seen.append(_Seen(now, loss, accepted_length, tokens, anchors))
        if not self._bar.disable:
            self._bar.set_postfix_str(self._averages(now), refresh=False)
            self._bar.update(min(progress, 1.0) - self._bar.n)
        elif now - self._told >= _EVERY_S:
            self._told = now
            left_min = (now - self._begun) * (1 - progress) / max(progress - self._begin, 1e-6) / 60
            self._report(f"{progress:6.1%}, update {update}, {self._averages(now)}, {left_min:.0f} min left")

    def _averages(self, now: float) -> str:
        # The first of them was over when the clock of the others began.
        first, *rest = self._seen
        seconds = max(now - (first.at_s if rest else self._begun), 1e-6)
        timed, count = rest or [first], len(self._seen)
        return (
            f"{sum(s.tokens for s in timed) / seconds:.0f} tokens/s, {sum(s.anchors for s in timed) / seconds:.0f} "
            f"anchors/s, loss {sum(s.loss for s in self._seen) / count:.4f}, "
            f"accepted {sum(s.accepted_length for s in self._seen) / count:.3f}"
        )

    def close(self) -> None:
        self._bar.close()
