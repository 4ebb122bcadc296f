"""What penalties count at each sample: a request's own tokens, known here, and drafts, which the device alone may know.

Asking it for them would make the host wait; on a CPU it is the faster way. Must not know: what penalties do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_serve.tensors import Penalties
from dspark_serve.transfers import to_device
from dspark_serve.types import Row


def count(rows: Sequence[Row], sample_lens: Sequence[int], drafts: Tensor) -> Penalties | None:
    """Counts at every sample of the rows that have penalties, the drafts before the sample counted as generated.

    drafts: [rows, max_kept] int64 on the device that computes, -1 where there is none. None: no row has penalties.
    """
    if not any(n and row.request.params.has_penalties for row, n in zip(rows, sample_lens, strict=True)):
        return None
    return (_on_host if drafts.device.type == "cpu" else _on_device)(rows, sample_lens, drafts)


def _on_host(rows: Sequence[Row], sample_lens: Sequence[int], drafts: Tensor) -> Penalties:
    drafted = drafts.tolist()
    columns: list[list[npt.NDArray[np.generic]]] = []
    sample = 0
    for index, (row, samples) in enumerate(zip(rows, sample_lens, strict=True)):
        params = row.request.params
        for slot in range(samples if params.has_penalties else 0):
            seen = np.array([*row.request.token_ids, *drafted[index][:slot]])
            unique, inverse = np.unique(seen, return_inverse=True)
            generated = np.bincount(inverse[row.request.num_prompt :], minlength=len(unique))
            constants = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
            columns.append(
                [np.full(len(unique), sample + slot), unique, generated.astype(np.float32)]
                + [np.full(len(unique), value, dtype=np.float32) for value in constants]
            )
        sample += samples
    return Penalties(*to_device(drafts.device, *(np.concatenate(parts) for parts in zip(*columns, strict=True))))


def _on_device(rows: Sequence[Row], sample_lens: Sequence[int], drafts: Tensor) -> Penalties:
    """The same, but that a sample's drafts have entries of their own, which say what any other of their token does."""
    known, entries, strengths = [], [], []
    sample = 0
    for index, (row, samples) in enumerate(zip(rows, sample_lens, strict=True)):
        params = row.request.params
        if samples and params.has_penalties:
            unique, inverse = np.unique(np.array(row.request.token_ids), return_inverse=True)
            generated = np.bincount(inverse[row.request.num_prompt :], minlength=len(unique))
            known.append(np.stack([(index << 32) + unique, generated]))
            of_row = np.array([params.presence_penalty, params.frequency_penalty, params.repetition_penalty])
            for slot in range(samples):  # the tokens there are, then the drafts before this sample
                places = np.concatenate([np.full(len(unique), -1), np.arange(slot)])
                tokens = np.concatenate([unique, np.full(slot, -1)])
                entries.append(np.stack(np.broadcast_arrays(sample + slot, index, slot, tokens, places)))
                strengths.append(of_row.astype(np.float32)[:, None].repeat(len(places), axis=1))
        sample += samples
    history, at, strength = to_device(
        drafts.device, *(np.concatenate(parts, axis=1) for parts in (known, entries, strengths))
    )
    return _counted(history, at, strength, drafts)


def _counted(known: Tensor, entries: Tensor, strengths: Tensor, drafts: Tensor) -> Penalties:
    """known [2, tokens]: row << 32 | token, ascending, and times generated. entries [5, entries]: sample, row, drafts
    that count, token, and the draft whose token it is where that is not -1. strengths [3, entries].
    """
    sample, row, before, token, place = entries
    again = torch.zeros_like(token)  # times among the drafts that count
    if drafts.shape[1]:
        of_row = drafts[row]  # [entries, max_kept]
        token = torch.where(place < 0, token, of_row.gather(1, place.clamp(min=0).unsqueeze(1)).squeeze(1))
        counts = torch.arange(drafts.shape[1], device=drafts.device) < before.unsqueeze(1)
        again = ((of_row == token.unsqueeze(1)) & counts).sum(-1)
    keys, generated = known
    wanted = (row << 32) + token
    at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    before_drafts = torch.where(keys[at] == wanted, generated[at], 0)
    return Penalties(sample, token, (before_drafts + again).float(), *strengths)
