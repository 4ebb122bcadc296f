"""Stored conversations as passages ready for training, and which of them are held out.

Must not know: heads, losses, anchors' choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_serve.training.anchors import Passage
from dspark_serve.training.device import moved
from dspark_serve.training.records import Conversation, RecordReader
from dspark_serve.training.target import TargetWeights

HELD_OUT_EVERY = 16  # conversations whose index is divisible by this are never trained on


class PassageSource:
    """Training and held-out conversations of a directory that may still be growing."""

    def __init__(self, directory: Path, target: TargetWeights, taps: Sequence[int]) -> None:
        """Raises ValueError when the directory belongs to another target or lacks a tap's states."""
        self.reader = RecordReader(directory)
        self._target = target
        manifest = self.reader.manifest
        if manifest.target != target.fingerprint:
            raise ValueError(f"{directory} was written by {manifest.target}, the target is {target.fingerprint}")
        missing = [tap for tap in taps if tap not in manifest.layers]
        last = target.config.num_layers - 1
        if missing or last != manifest.layers[-1]:
            raise ValueError(f"{directory} holds states of layers {manifest.layers}, not of {[*taps, last]}")
        hidden = manifest.hidden_size
        starts = [manifest.layers.index(tap) * hidden for tap in taps]
        starts.append(manifest.width - hidden)  # the last layer's
        self._columns = np.concatenate([np.arange(start, start + hidden) for start in starts])
        self._hidden = hidden

    @property
    def training(self) -> list[Conversation]:
        return [c for c in self.reader.conversations if not is_held_out(c)]

    @property
    def held_out(self) -> list[Conversation]:
        return [c for c in self.reader.conversations if is_held_out(c)]

    def load(self, conversation: Conversation) -> Passage:
        """On the target's device. Raises FileNotFoundError when the ring of states has moved past it."""
        device = self._target.device
        states = moved(torch.from_numpy(self.reader.states(conversation)[:, self._columns]), device)  # half precision
        log_totals = torch.zeros(conversation.num_states)
        log_totals[len(conversation.prompt) - 1 :] = torch.tensor(conversation.log_totals)
        return Passage(
            tokens=moved(torch.tensor(conversation.tokens, dtype=torch.int64), device),
            states=states[:, : -self._hidden].float(),
            last_hidden=self._target.last_hidden(states[:, -self._hidden :]),
            log_totals=moved(log_totals, device),
            num_prompt=len(conversation.prompt),
        )


def is_held_out(conversation: Conversation) -> bool:
    return conversation.index % HELD_OUT_EVERY == 0


class Order:
    """Which conversation comes next: the newest unseen ones first, then passes over all in random order.

    A pure function of the random stream and of what the source held at each call, so a resumed run continues it.
    """

    def __init__(self, seen: Iterable[int] = (), queue: Iterable[int] = ()) -> None:
        self.seen = set(seen)  # indices of conversations
        self.queue = list(queue)  # indices still to come in this pass

    def next(self, conversations: Sequence[Conversation], draw: np.random.Generator) -> Conversation:
        by_index = {c.index: c for c in conversations}
        fresh = [index for index in by_index if index not in self.seen]
        if fresh:
            chosen = fresh[int(draw.integers(len(fresh)))]
            self.seen.add(chosen)
            return by_index[chosen]
        self.queue = [index for index in self.queue if index in by_index]
        if not self.queue:
            self.queue = [int(i) for i in draw.permutation(sorted(by_index))]
        return by_index[self.queue.pop()]


def frequent_tokens(conversations: Iterable[Conversation], count: int, vocab_size: int) -> Tensor:
    """The `count` tokens that answers use most, the lower id (in most vocabularies the commoner) on ties; ascending."""
    seen: Counter[int] = Counter()
    for conversation in conversations:
        seen.update(conversation.answer)
    frequencies: npt.NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
    for token, times in seen.items():
        frequencies[token] = times
    best = np.argsort(-frequencies, kind="stable")[:count]
    return torch.from_numpy(np.sort(best))
