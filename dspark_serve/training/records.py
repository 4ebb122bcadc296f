"""Conversations of the target on disk: one JSON line each, their hidden states in raw shards beside it.

Append-only: states are written before the line that names them, so a process may end at any moment. Shards form a
ring of bounded size. Must not know: models, heads, losses.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CONVERSATIONS, MANIFEST = "conversations.jsonl", "manifest.json"
SHARD_BYTES = 256 << 20
States = npt.NDArray[np.float16]  # [tokens, len(layers) * hidden]
_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Manifest:
    """What the states of a directory are; written once. Layers are target layers, the last of them being its last."""

    target: str  # fingerprint of the target's weights
    layers: tuple[int, ...]
    hidden_size: int

    @property
    def width(self) -> int:
        return len(self.layers) * self.hidden_size


@dataclass(frozen=True)
class Conversation:
    """A prompt and the target's answer. States exist for every token but the last, which the target never read."""

    index: int  # of the user turn it answers; the same index always has the same user turn
    kind: str
    temperature: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    seed: int  # the noise its answer was drawn with
    finished: bool  # the answer ends with an end-of-turn token, not at the cap
    shard: int = -1
    offset: int = 0  # bytes into the shard
    log_totals: tuple[float, ...] = ()  # [answer] log of the sum of exp(logits) before each answer token

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer

    @property
    def num_states(self) -> int:
        return len(self.prompt) + len(self.answer) - 1


class RecordWriter:
    """Appends conversations to a directory, picking up where an earlier process ended."""

    def __init__(self, directory: Path, manifest: Manifest, max_bytes: int) -> None:
        """Raises ValueError when the directory holds states of another kind."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._manifest, self._max_bytes = directory, manifest, max_bytes
        known = directory / MANIFEST
        if known.exists() and read_manifest(directory) != manifest:
            raise ValueError(f"{directory} holds data of another target or other layers: {read_manifest(directory)}")
        known.write_text(json.dumps(asdict(manifest)), encoding="utf-8")
        self._drop_partial_line()
        self._lines = (directory / CONVERSATIONS).open("a", encoding="utf-8")
        shards = [int(path.stem.split("-")[1]) for path in directory.glob("states-*.bin")]
        self._shard = max(shards, default=-1) + 1  # a fresh one: the last may end in states without a line
        self._states = self._open_shard()

    def append(self, conversation: Conversation, states: States) -> None:
        if states.shape != (conversation.num_states, self._manifest.width):
            raise ValueError(f"states {states.shape} do not fit {conversation.num_states} tokens")
        if self._states.tell() > SHARD_BYTES:
            self._states.close()
            self._shard += 1
            self._states = self._open_shard()
            self._drop_old_shards()
        placed = replace(conversation, shard=self._shard, offset=self._states.tell())
        self._states.write(np.ascontiguousarray(states).tobytes())
        self._states.flush()
        self._lines.write(json.dumps(asdict(placed), separators=(",", ":")) + "\n")
        self._lines.flush()

    def close(self) -> None:
        self._states.close()
        self._lines.close()

    def _open_shard(self) -> Any:
        return shard_path(self._directory, self._shard).open("wb")

    def _drop_old_shards(self) -> None:
        shards = sorted(self._directory.glob("states-*.bin"))
        while len(shards) > 1 and sum(path.stat().st_size for path in shards) > self._max_bytes:
            shards.pop(0).unlink()

    def _drop_partial_line(self) -> None:
        path = self._directory / CONVERSATIONS
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


class RecordReader:
    """Conversations whose states are still there. `refresh` finds those a writer has added since."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.manifest = read_manifest(directory)
        self._position = 0
        self._shards: dict[int, npt.NDArray[np.uint8]] = {}
        self.conversations: list[Conversation] = []
        self.refresh()

    def refresh(self) -> int:
        """Read lines added since the last call, forget conversations whose states are gone; how many are new."""
        path = self._directory / CONVERSATIONS
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]  # a line that is being written waits for the next call
        self._position += len(content)
        new = [_parse(line) for line in content.splitlines()]
        gone = {c.shard for c in [*self.conversations, *new] if not shard_path(self._directory, c.shard).exists()}
        self.conversations = [c for c in [*self.conversations, *new] if c.shard not in gone]
        return len(new)

    def states(self, conversation: Conversation) -> States:
        """[num_states, width], memory-mapped. Raises FileNotFoundError when the ring has moved on."""
        count = conversation.num_states * self.manifest.width * 2
        mapped = self._shards.get(conversation.shard)
        if mapped is None or len(mapped) < conversation.offset + count:
            mapped = np.memmap(shard_path(self._directory, conversation.shard), dtype=np.uint8, mode="r")
            self._shards[conversation.shard] = mapped
        flat = mapped[conversation.offset : conversation.offset + count].view(np.float16)
        return flat.reshape(conversation.num_states, self.manifest.width)


def as_half(values: npt.NDArray[np.float32]) -> States:
    """Half precision with the few outsized values of a residual stream held at the largest finite number."""
    return np.clip(values, -_HALF_MAX, _HALF_MAX).astype(np.float16)


def read_manifest(directory: Path) -> Manifest:
    """Raises FileNotFoundError when nothing was ever written there."""
    known = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return Manifest(known["target"], tuple(known["layers"]), known["hidden_size"])


def shard_path(directory: Path, shard: int) -> Path:
    return directory / f"states-{shard:05d}.bin"


def _parse(line: bytes) -> Conversation:
    fields: dict[str, Any] = json.loads(line)
    for name in ("prompt", "answer", "log_totals"):
        fields[name] = tuple(fields[name])
    fields.setdefault("seed", -1)
    return Conversation(**fields)
