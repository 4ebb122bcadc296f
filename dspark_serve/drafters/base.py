"""The drafter contract: anything that proposes tokens. Must not know: verification, budget, scheduling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from dspark_serve.cache.store import KVStore, LayerGeometry
from dspark_serve.drafters.ready import Ready
from dspark_serve.drafters.rows import DraftRows
from dspark_serve.tensors import Newest, Proposal, StepBatch, Verdict
from dspark_serve.types import Row

BlockPass = Callable[[DraftRows], Tensor]  # rows whose context is in the store -> hidden states [rows, block, hidden]
Record = Callable[[BlockPass], BlockPass]  # a pass that launches by shapes alone -> one that says the same, faster


class Drafter(Protocol):
    """Proposes up to `width` tokens after each row's anchor.

    A drafter may be wrong as often as it likes: verification never lets that reach the text. It keeps per-request
    state under the request id, and gives it up on `release`.
    """

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose outputs `observe` wants, in order; -1 is the embedding output. () for none."""
        ...

    @property
    def width(self) -> int:
        """Most drafts per row and step."""
        ...

    def propose(self, rows: Sequence[Row]) -> Proposal:
        """Drafts for `rows`, aligned with them; row r gets at most min(width, rows[r].max_drafts)."""
        ...

    def observe(self, batch: StepBatch, taps: Tensor | None, verdict: Verdict) -> None:
        """Called once per step, after verification; taps: [tokens, len(self.taps) * hidden] of every batch token, None
        where they are in the store's taps, or none were wanted."""
        ...

    def release(self, request_id: str) -> None:
        """The request is finished; forget it. Unknown ids are fine."""
        ...


@runtime_checkable
class AheadDrafter(Drafter, Protocol):
    """One whose pass of a model can be made at the end of a step, from tokens that the host has not seen yet."""

    def propose(self, rows: Sequence[Row], ready: Ready | None = None) -> Proposal:
        """As above. With `ready`, what `ahead` gave is all that the model says; every row but `lookup_only` has it."""
        ...

    def ahead(self, rows: Sequence[Row], newest: Newest) -> Proposal:
        """The pass for the next step, after `observe`: rows[r].start is the last place that its anchor can be at."""
        ...


class MakeDrafter(Protocol):
    def __call__(self, store: KVStore, first_layer: int, record: Record | None = None) -> Drafter:
        """first_layer: which of the store's layers is the drafter's first; record: for its pass, if it has such."""
        ...


@dataclass(frozen=True)
class DrafterPlan:
    """A drafter before the K/V pool exists: what it adds to every page, and how to make it once the store is there."""

    name: str  # "ngram", "dspark", ...; what reports call it
    make: MakeDrafter
    kv_layers: tuple[LayerGeometry, ...] = ()
    num_bytes: int = 0  # weights of its own
    separate_bytes: int = 0  # weights of a separate draft model with as many layers
    costly: str | None = None  # the name, in reports, of the drafter that takes a pass of a model
