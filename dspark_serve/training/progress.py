"""What a training run shows while it lasts: a bar where someone watches, else a line now and then.

Must not know: heads, data, files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from dspark_serve.training.device import in_use

_UPDATES = 50  # that an average is taken over
_EVERY_S = 30.0  # between lines
_FORMAT = "{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}"


def bar(title: str, begin: float = 0.0) -> tqdm:  # type: ignore[type-arg]  # of no iterable
    """A bar from 0 to 1 on stderr; disabled where that is no terminal."""
    return tqdm(total=1.0, initial=begin, desc=title, bar_format=_FORMAT, disable=None, leave=False)


@dataclass(frozen=True)
class Rates:
    """Throughput of a run since this process began it or went on with it, evaluations and checkpoints included."""

    tokens_per_s: float  # of the text trained on
    anchors_per_s: float  # trained
    written_tokens_per_s: float  # answer tokens that the target wrote meanwhile; 0 where nobody writes
    peak_device_gib: float | None  # see peak_gib

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_s:.0f} tokens/s, {self.anchors_per_s:.0f} anchors/s, "
            f"{self.written_tokens_per_s:.0f} answer tokens/s written{in_use(self.peak_device_gib)}"
        )


@dataclass(frozen=True)
class _Seen:
    at_s: float
    loss: float
    accepted_length: float
    tokens: int
    anchors: int


class Watch:
    """Averages what the latest updates said, and counts what the run came to."""

    def __init__(self, report: Callable[[str], None], begin: float) -> None:
        """begin: progress of the run so far, in [0, 1]."""
        self._report, self._bar = report, bar("graft", begin)
        self._begin, self._begun = begin, time.monotonic()
        self._told = self._begun
        self._seen: deque[_Seen] = deque(maxlen=_UPDATES)
        self._tokens = self._anchors = self._written = 0
        self._written_until = self._begun

    def add(self, progress: float, update: int, loss: float, accepted_length: float, tokens: int, anchors: int) -> None:
        """One update's loss, expected accepted length at temperature 1, tokens of text read and anchors trained on."""
        now = time.monotonic()
        self._seen.append(_Seen(now, loss, accepted_length, tokens, anchors))
        self._tokens += tokens
        self._anchors += anchors
        if not self._bar.disable:
            self._bar.set_postfix_str(self._averages(now), refresh=False)
            self._bar.update(min(progress, 1.0) - self._bar.n)
        elif now - self._told >= _EVERY_S:
            self._told = now
            left_min = (now - self._begun) * (1 - progress) / max(progress - self._begin, 1e-6) / 60
            self._report(f"{progress:6.1%}, update {update}, {self._averages(now)}, {left_min:.0f} min left")

    def wrote(self, conversations: int, tokens: int) -> None:
        """The target has written so many, and so many answer tokens, since the last call."""
        now = time.monotonic()
        seconds = max(now - self._written_until, 1e-6)
        self._written_until = now
        self._written += tokens
        self._report(f"the target wrote {conversations} conversations, {tokens / seconds:.0f} answer tokens/s")

    def rates(self, peak_device_gib: float | None) -> Rates:
        seconds = max(time.monotonic() - self._begun, 1e-6)
        counts = (self._tokens, self._anchors, self._written)
        tokens, anchors, written = (round(count / seconds, 1) for count in counts)
        return Rates(tokens, anchors, written, peak_device_gib)

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
