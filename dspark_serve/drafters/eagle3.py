"""EAGLE-3 (Li et al. 2025): a chain of drafts from one layer that reads tapped hidden states and the next token.

Entry i joins the target's features of token i with the embedding of token i + 1, and is turned by position i. It is
kept in the slot of token i + 1, so that a slot depends on nothing after it and pages can be shared by prefix.
Must not know: verification, budget, scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_serve.cache.store import KVStore, LayerGeometry
from dspark_serve.drafters.head import Head
from dspark_serve.drafters.head_layers import Context
from dspark_serve.drafters.ready import Ready
from dspark_serve.drafters.rows import DraftRows, Drafts, Drawer, committed, largest_probability
from dspark_serve.tensors import Newest, Proposal, StepBatch, Verdict
from dspark_serve.transfers import to_device
from dspark_serve.types import Row, VerifyMode


class Eagle3Head(Head):
    """One layer over entries, each of them an embedding and features."""

    @property
    def kv_layers(self) -> tuple[LayerGeometry, ...]:
        """K/V of the entries, and every token's fused features, in two halves: the next entry may need them."""
        half = self.config.hidden_size // 2
        features = LayerGeometry(1, half, self.config.hidden_size - half)
        return LayerGeometry(self.config.kv_heads, self.config.head_dim), features

    def inputs(self, features: Tensor, token_ids: Tensor) -> Tensor:
        """What an entry's projections read, the embedding first: [n, hidden], [n] -> [n, 2 * hidden]."""
        embedded = self.layers[0].input_norm(self.embed(token_ids))
        return torch.cat([embedded, self.hidden_norm(features)], dim=-1)


class Eagle3Drafter:
    """Drafts chains with an EAGLE-3 head; its K/V and features are the store's layers from `first_layer` on.

    A request whose first token is its anchor gets no drafts: there are no features before it.
    """

    def __init__(self, head: Eagle3Head, store: KVStore, first_layer: int, mode: VerifyMode, width: int) -> None:
        self.taps, self.width = head.config.taps, min(width, head.config.block_size)
        self._head, self._store, self._first_layer = head, store, first_layer
        self._drawer = Drawer(mode, head.config.vocab_size)

    @torch.inference_mode()
    def propose(self, rows: Sequence[Row], ready: Ready | None = None) -> Proposal:
        if ready is not None:
            return ready.of(rows)
        able = [index for index, row in enumerate(rows) if row.start > 0]
        if not able:
            return Proposal.empty(len(rows), self._store.keys[0].device)
        proposal = self._chains([rows[index] for index in able])
        return proposal if len(able) == len(rows) else proposal.spread(able, len(rows))

    @torch.inference_mode()
    def ahead(self, rows: Sequence[Row], newest: Newest) -> Proposal:
        return self._chains(rows, newest)  # an anchor that was just verified has a token before it

    def _chains(self, rows: Sequence[Row], newest: Newest | None = None) -> Proposal:
        head, store, layer = self._head, self._store, self._head.layers[0]
        batch = DraftRows.build(rows, store.page_size, self.width, store.keys[0].device, newest)
        width, count = max(batch.counts), len(rows)
        # Slots 1..start-1 hold entries 0..start-2; entry start-1, with the anchor's embedding, opens the chain.
        slots, visible = batch.context()
        visible[:, 0] = False
        context = Context.build(slots, visible, head.config.kv_heads)
        last = slots.gather(1, batch.start.unsqueeze(1) - 1).squeeze(1)
        features, previous = self._features(last), batch.anchors
        keys: list[Tensor] = []
        values: list[Tensor] = []
        drafts = Drafts(batch.counts)
        for slot in range(width):
            x = head.inputs(features, previous)
            cos, sin = head.rotary.at(batch.start - 1 + slot, batch.longest + width)
            q, (k, v) = head.rotary.apply(layer.queries(x), cos, sin), layer.keys_values(x)
            keys.append(head.rotary.apply(k, cos, sin))
            values.append(v)
            chain = torch.stack(keys, dim=1), torch.stack(values, dim=1)  # [rows, slot + 1, kv_heads, head_dim]
            attended = layer.attend(q.unsqueeze(1), *chain, context, store, self._first_layer)
            features = layer.finish(attended, features).view(count, -1)  # the next step's input, before the norm
            logits = head.base_logits(head.norm(features))
            largest = largest_probability(logits)
            previous, probs = self._drawer.draw(logits, batch.sampling, slot)
            drafts.add(previous, probs, largest)
        return drafts.proposal()

    @torch.inference_mode()
    def observe(self, batch: StepBatch, taps: Tensor | None, verdict: Verdict) -> None:
        assert taps is not None
        head, store = self._head, self._store
        # The entry of each token needs the features of the one before it, which may be of an earlier step.
        lens = np.array(batch.query_lens)
        (owner,) = to_device(taps.device, np.arange(len(lens)).repeat(lens))
        index = committed(batch, verdict)
        stay = slice(None) if index is None else index
        positions, slots, owner = batch.positions[stay], batch.slots[stay], owner[stay]
        features = head.fc(taps[stay])  # [n, hidden]
        layer, half = self._first_layer + 1, head.config.hidden_size // 2
        stored = features.to(store.keys[layer].dtype).unsqueeze(1)
        store.write(layer, slots, stored[..., :half], stored[..., half:])
        before = (positions - 1).clamp_(min=0)  # a prompt's first token has no entry: its slot is never read
        page = batch.page_table[owner, before // store.page_size]
        x = head.inputs(self._features(page * store.page_size + before % store.page_size), batch.token_ids[stay])
        cos, sin = head.rotary.at(before, max(batch.context_lens))
        k, v = head.layers[0].keys_values(x)
        dtype = store.keys[self._first_layer].dtype
        store.write(self._first_layer, slots, head.rotary.apply(k, cos, sin).to(dtype), v.to(dtype))

    def _features(self, slots: Tensor) -> Tensor:
        """Fused features kept at slots [n] -> [n, hidden]."""
        layer, store = self._first_layer + 1, self._store
        halves = [t[layer].flatten(0, 1).index_select(0, slots).squeeze(1) for t in (store.keys, store.values)]
        return torch.cat(halves, dim=-1)

    def release(self, request_id: str) -> None:
        """Nothing is kept per request: what the head knows of it lies in its pages."""
