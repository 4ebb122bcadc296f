"""DSpark: a block of drafts from one pass over the target's hidden states, then a sequential Markov bias. DFlash too.

A DFlash head is one without Markov and confidence parts. Context K/V are extra layers of the paged store, and so, on a
CPU, are the taps that they are made from: nothing is ever replayed. Must not know: verification, budget, scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.heads import draft
from dspark_serve.cache.store import KVStore, LayerGeometry
from dspark_serve.drafters.base import BlockPass, Record
from dspark_serve.drafters.head import Head
from dspark_serve.drafters.head_layers import Context, HeadLayer
from dspark_serve.drafters.native_head import NativeHead
from dspark_serve.drafters.ready import Ready
from dspark_serve.drafters.rows import DraftRows, Drafts, Drawer, committed, largest_probability, proposal
from dspark_serve.tensors import Newest, Proposal, StepBatch, Verdict
from dspark_serve.types import Row, VerifyMode

if TYPE_CHECKING:
    from dspark_serve.drafters.triton_head import TritonSampler

Owed = tuple[Tensor, Tensor, int]  # positions [n] int64, slots [n] int64, a position beyond all of them

_TOGETHER = 128  # steps whose slots are marked in one go: a small part of what it takes to do so in every step
_ENOUGH = 32  # tokens whose context is worth a pass over the weights for itself
_MOSTLY = 0.5  # share of rows that have drafted of late from which context is written at once: they will again
_SHARE_GAIN = 0.125  # of that share, per step


class DSparkHead(Head):
    """A block of slots over the context, all of it in one pass."""

    @cached_property
    def native(self) -> NativeHead | None:
        return NativeHead.of(self)

    @cached_property
    def triton(self) -> TritonSampler | None:
        """Only where the head runs by Triton."""
        if self.kernels != "triton":
            return None
        from dspark_serve.drafters.triton_head import TritonSampler  # imports Triton, which need not be there

        return TritonSampler.of(self)

    @property
    def kv_layers(self) -> tuple[LayerGeometry, ...]:
        context = (LayerGeometry(self.config.kv_heads, self.config.head_dim),) * self.config.num_layers
        taps = LayerGeometry(1, len(self.config.taps) * self.config.hidden_size, 0)
        return (*context, taps) if self.keeps_taps else context

    @property
    def keeps_taps(self) -> bool:
        """Whether taps are kept in the store until a draft needs them. Where weights are quick to read and looking at
        slots would make the device wait, context is written at once instead."""
        return self.hidden_norm.weight.device.type == "cpu" and self.kernels != "triton"

    @property
    def recordable(self) -> bool:
        """Whether `block` reads rows from their tensors alone: attention by kernels does, that in plain torch counts
        on the longest of them."""
        kernels, width = self.layers[0].kernels, self.config.head_dim
        return kernels is not None and kernels.attends(width, width)

    def write_context(
        self, taps: Tensor, positions: Tensor, slots: Tensor, stop: int, store: KVStore, first_layer: int
    ) -> None:
        """Draft K/V of committed tokens: taps [n, len(taps) * hidden], positions [n] int64 < stop, slots [n] int64.

        The context goes straight into every layer's key and value projections, past its input norm (paper 3.1).
        """
        context = self.hidden_norm(self.fc(taps))  # [n, hidden]
        cos, sin = self.rotary.at(positions, stop)
        for index, layer in enumerate(self.layers):
            k, v = layer.keys_values(context)
            dtype = store.keys[first_layer + index].dtype
            store.write(first_layer + index, slots, self.rotary.apply(k, cos, sin).to(dtype), v.to(dtype))

    def write_kept(
        self, kept: Tensor, positions: Tensor, slots: Tensor, stop: int, store: KVStore, first_layer: int
    ) -> None:
        """The same with taps that are kept at these slots, kept [slots of the store, len(taps) * hidden]."""
        if self.native is None or not self.native.reads(store, first_layer):
            taps = kept.index_select(0, slots)
            return self.write_context(taps, positions, slots, stop, store, first_layer)
        self.native.writing(kept, positions, slots, stop, store, first_layer).run()

    def block(self, rows: DraftRows, store: KVStore, first_layer: int) -> Tensor:
        """Hidden states after the final norm of the whole block [rows, block_size, hidden].

        Slots are [anchor, mask, mask, ...]; slot k predicts the token at position start + 1 + k.
        """
        if self.native is not None and self.native.reads(store, first_layer):
            decoding, hidden = self.native.decoding(rows, store, first_layer)
            decoding.run()
            return hidden
        c, count = self.config, rows.anchors.shape[0]
        assert c.mask_token_id is not None
        ids = torch.full((count, c.block_size), c.mask_token_id, device=rows.anchors.device)
        ids[:, 0] = rows.anchors
        positions = (rows.start.unsqueeze(1) + torch.arange(c.block_size, device=ids.device)).flatten()
        hidden = self.embed(ids.flatten())  # [rows * block, hidden]
        attend = self._attention(rows, positions, store)
        for index, layer in enumerate(self.layers):
            attended = attend(layer, layer.input_norm(hidden), first_layer + index)
            hidden = layer.finish(attended, hidden)
        return self.norm(hidden).view(count, c.block_size, -1)

    def _spans(self, rows: DraftRows) -> Tensor:
        """Per row its first token in the batch of blocks, how many, and the keys that they see: [3, rows] int64."""
        size = self.config.block_size
        first = torch.arange(0, rows.anchors.shape[0] * size, size, device=rows.start.device)
        return torch.stack([first, torch.full_like(first, size), rows.start + size])

    def _attention(self, rows: DraftRows, positions: Tensor, store: KVStore) -> Callable[..., Tensor]:
        """(layer, normed input [n, hidden], layer in the store) -> [n, heads * head_dim], for this block."""
        c, count, stop = self.config, rows.anchors.shape[0], rows.longest + self.config.block_size
        kernels = self.layers[0].kernels
        if kernels is not None and kernels.attends(c.head_dim, c.head_dim):
            spans, table = self._spans(rows), self.rotary.table(stop)
            return lambda layer, x, index: layer.attend_block(x, positions, table, rows, spans, store, index)
        cos, sin = self.rotary.at(positions, stop)
        context = Context.build(*rows.context(), c.kv_heads)

        def attend(layer: HeadLayer, x: Tensor, index: int) -> Tensor:
            q, (k, v) = self.rotary.apply(layer.queries(x), cos, sin), layer.keys_values(x)
            k = self.rotary.apply(k, cos, sin)
            q, k, v = (t.view(count, c.block_size, -1, c.head_dim) for t in (q, k, v))
            return layer.attend(q, k, v, context, store, index)

        return attend


class DSparkDrafter:
    """Drafts with a DSpark or DFlash head; its K/V are the store's layers from `first_layer` on."""

    def __init__(
        self,
        head: DSparkHead,
        store: KVStore,
        first_layer: int,
        mode: VerifyMode,
        width: int,
        record: Record | None = None,
    ) -> None:
        self.taps, self.width = head.config.taps, min(width, head.config.block_size)
        self._head, self._store, self._first_layer = head, store, first_layer
        self._keeps_taps = head.keeps_taps
        if self._keeps_taps:  # in a layer of the store, [slots, len(taps) * hidden]
            self._kept = store.taps = store.keys[first_layer + head.config.num_layers].flatten(0, -2)
        # Slots with taps and no context yet.
        self._owed = np.zeros((store.num_pages, store.page_size), dtype=np.bool_)
        self._fresh: list[Tensor] = []  # slots of the last steps, not marked there yet
        self._drafting = 0  # rows that draft in this step
        self._share = 0.0  # of the rows, of late
        self._block: BlockPass = lambda rows: head.block(rows, store, first_layer)
        recorded = record is not None and head.recordable
        if record is not None and recorded:
            self._block = record(self._block)
        # A draft is one call of the C++ kernels: between calls their threads would fall asleep.
        self._whole = head.native is not None and head.native.reads(store, first_layer) and not recorded
        self._mode, self._drawer = mode, Drawer(mode, head.config.vocab_size, head.draft_vocab)

    def propose(self, rows: Sequence[Row], ready: Ready | None = None) -> Proposal:
        return self._draft(rows) if ready is None else ready.of(rows)

    def ahead(self, rows: Sequence[Row], newest: Newest) -> Proposal:
        return self._draft(rows, newest)

    def _draft(self, rows: Sequence[Row], newest: Newest | None = None) -> Proposal:
        store, owed = self._store, self._owed_to(rows)
        batch = DraftRows.build(rows, store.page_size, self.width, store.keys[0].device, newest)
        native = self._head.native if self._whole else None
        if native is not None and native.draws(batch, self._mode):
            drafted = self._at_once(native, batch, owed)
        else:
            if owed is not None:
                self._head.write_kept(self._kept, *owed, store, self._first_layer)
            drafted = self._in_parts(batch)
        if owed is not None:
            self._owed.ravel()[owed[1].numpy()] = False
        return drafted

    def _in_parts(self, batch: DraftRows) -> Proposal:
        head, width = self._head, max(batch.counts)
        # The whole block is always run: it attends to itself in both directions. Only drawing stops early.
        hidden = self._block(batch)[:, :width]
        if head.triton is not None and head.triton.draws(batch, self._mode):
            return head.triton(head.base_logits(hidden.contiguous()), hidden, batch, self._mode)
        base = head.base_logits(hidden.contiguous())  # [rows, width, drafted tokens]
        drafts, confidence = Drafts(batch.counts), []
        previous, state, embedded = batch.anchors, None, None
        for slot in range(width):
            logits = base[:, slot]
            if head.markov is not None:
                state = head.markov.first_state(len(batch.counts)) if state is None else state
                embedded = head.markov.embed(previous)
                bias, state = head.markov.step(embedded, hidden[:, slot], state)
                logits = bias.add_(logits)
            if head.confidence is not None:
                confidence.append(head.confidence.logits(hidden[:, slot], embedded))
            largest = largest_probability(logits)
            previous, probs = self._drawer.draw(logits, batch.sampling, slot)
            drafts.add(previous, probs, largest)
        return drafts.proposal(torch.stack(confidence, dim=1).sigmoid_() if confidence else None)

    def _at_once(self, native: NativeHead, batch: DraftRows, owed: Owed | None) -> Proposal:
        """The same in one call of the C++ kernels; in several where the LM head is not theirs alone."""
        width, store, first = max(batch.counts), self._store, self._first_layer
        writing = None if owed is None else native.writing(self._kept, *owed, store, first)
        decoding, hidden = native.decoding(batch, store, first)
        if native.lm_head:
            tokens, largest, confidence = draft(writing, decoding, native.drawing(hidden, width, batch))
        else:
            if writing is not None:
                writing.run()
            decoding.run()
            base = self._head.base_logits(hidden[:, :width].transpose(0, 1).contiguous())
            tokens, largest, confidence = native.drawing(hidden, width, batch, base).run()
        return proposal(batch.counts, tokens, largest, confidence=confidence)

    def observe(self, batch: StepBatch, taps: Tensor | None, verdict: Verdict) -> None:
        """Keeps what the context is made from. It is written when a row comes to draft: requests that never do cost
        next to nothing, and those that do have many tokens written in one pass over the weights."""
        if not self._keeps_taps:
            assert taps is not None
            fresh = taps, batch.positions, batch.slots
            if (index := committed(batch, verdict)) is not None:
                fresh = taps[index], batch.positions[index], batch.slots[index]
            return self._head.write_context(*fresh, max(batch.context_lens), self._store, self._first_layer)
        # Those of rejected drafts as well: what comes to their slots is written there before anything reads them.
        if taps is not None:
            self._kept.index_copy_(0, batch.slots, taps.to(self._kept.dtype))
        self._fresh.append(batch.slots)
        self._share += _SHARE_GAIN * (self._drafting / len(batch.query_lens) - self._share)
        self._drafting = 0
        if len(batch.slots) >= _ENOUGH and self._share >= _MOSTLY:
            now = batch.positions, batch.slots, max(batch.context_lens)
            self._head.write_kept(self._kept, *now, self._store, self._first_layer)
            self._mark_fresh()
            self._owed.ravel()[batch.slots.numpy()] = False
        elif len(self._fresh) >= _TOGETHER:
            self._mark_fresh()

    def _mark_fresh(self) -> None:
        if self._fresh:
            self._owed.ravel()[torch.cat(self._fresh).numpy()] = True
            self._fresh.clear()

    def _owed_to(self, rows: Sequence[Row]) -> Owed | None:
        """Context of these rows that is not there."""
        if not self._keeps_taps:
            return None
        self._mark_fresh()
        self._drafting, size = len(rows), self._store.page_size
        slots, positions = [], []
        for row in rows:
            pages = np.array(row.request.pages[: -(-row.start // size)], dtype=np.int64)
            owed = self._owed[pages].ravel()[: row.start].nonzero()[0]
            slots.append(pages[owed // size] * size + owed % size)
            positions.append(owed)
        found, place = slots[0], positions[0]
        if len(rows) > 1:
            found, first = np.unique(np.concatenate(slots), return_index=True)  # rows may share pages
            place = np.concatenate(positions)[first]
        if not len(found):
            return None
        return torch.from_numpy(place), torch.from_numpy(found), max([row.start for row in rows])

    def release(self, request_id: str) -> None:
        """Nothing is kept per request: what the head knows of it lies in its pages."""
