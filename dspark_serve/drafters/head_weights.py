"""A head's tensors: read, handed out once each with the shape asked for; and what the head shares with its target.

Embedding and LM head are the target's unless the checkpoint stores other values, so a head costs its own layers only.
Must not know: requests, pages, how the tensors are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels.blocks import BlockWeight
from dspark_kernels.packed import STORED
from dspark_serve.drafters.head_config import HeadConfig, HeadError
from dspark_serve.models.base import TargetModel
from dspark_serve.models.layers import Affine, Linear, NativeLinear, RMSNorm, Weight, operations
from dspark_serve.models.loader import iterate_weights, read_config

# A draft reads every matrix of the head once, and that takes most of its time on a CPU. Those stored in 16 bits are
# held as 8-bit blocks there: half the bytes, and next to none of the drafts change. Nobody sees the difference but the
# acceptance, for drafts are verified. A head in float32 stays as it is.
_NARROWED = (torch.bfloat16, torch.float16)
_GROUP = 32  # inputs with a scale of their own

EMBED, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
_PROBES = 8
_COLUMNS = 64  # hidden units whose column of the LM head is read at once


class HeadWeights:
    """Named tensors in the target's dtype and place, for the kernels it runs by.

    `num_bytes` counts what was handed out: the head's own cost.
    """

    def __init__(self, tensors: Mapping[str, Tensor], target: TargetModel) -> None:
        self._tensors = dict(tensors)
        self._dtype, self._device = target.info.dtype, target.device
        self.ops = operations(self._dtype, self._device, target.info.kernels)
        self.num_bytes = 0

    def peek(self, name: str, *shape: int, as_stored: bool = False) -> Tensor | None:
        """The tensor as it is served, not counted yet; None if the checkpoint lacks it. HeadError if misshapen.

        as_stored: bfloat16 and float16 stay so where the kernels read them packed, for linears only.
        """
        stored = self._tensors.get(name)
        if stored is None:
            return None
        if tuple(stored.shape) != shape:
            raise HeadError(f"the head's {name} has shape {list(stored.shape)}, and its config asks for {list(shape)}")
        if not stored.is_floating_point():
            return stored.to(self._device, torch.int64)
        if not stored.sum(dtype=torch.float32).isfinite():
            raise HeadError(f"the head's {name} holds values that are not finite")
        if as_stored and self.ops.library is not None and stored.dtype in STORED:
            return stored.clone()  # the file's memory is mapped
        return stored.to(self._device, self._dtype, copy=True)

    def take(self, name: str, *shape: int, as_stored: bool = False) -> Tensor:
        tensor = self.peek(name, *shape, as_stored=as_stored)
        if tensor is None:
            raise HeadError(f"the head's checkpoint lacks {name} {list(shape)}")
        del self._tensors[name]
        self.num_bytes += tensor.nbytes
        return tensor

    def drop(self, name: str) -> None:
        self._tensors.pop(name, None)

    def norm(self, name: str, width: int, eps: float) -> RMSNorm:
        return RMSNorm(self.take(name, width), eps)

    def ones(self, width: int) -> Tensor:
        """For a norm that has no weight."""
        return torch.ones(width, dtype=self._dtype, device=self._device)

    def affine(self, parts: Mapping[str, int], columns: int, bias: bool = False) -> Affine:
        """The tensors `part`.weight [parts[part], columns] (and .bias), stacked in this order; in blocks where 16 bits
        would otherwise be read by the C++ kernels."""
        weights = [self.take(f"{part}.weight", rows, columns, as_stored=True) for part, rows in parts.items()]
        if len({weight.dtype for weight in weights}) > 1:
            weights = [weight.to(self._dtype) for weight in weights]
        biases = [self.take(f"{part}.bias", rows) for part, rows in parts.items()] if bias else []
        weight, stacked = torch.cat(weights), torch.cat(biases) if bias else None
        if weight.dtype not in _NARROWED or self.ops.library is None or columns % _GROUP:
            return weight, stacked
        blocks = BlockWeight.eight_bits(weight, _GROUP)
        self.num_bytes += blocks.nbytes - weight.nbytes
        return blocks, stacked

    def linear(self, parts: Mapping[str, int], columns: int, bias: bool = False) -> Linear:
        """One linear from the tensors that `affine` stacks."""
        return self.ops.linear(*self.affine(parts, columns, bias))

    def check_empty(self) -> None:
        """HeadError naming tensors that nobody asked for: the head is something else than its config says."""
        left = sorted(self._tensors)
        if left:
            names = ", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
            raise HeadError(f"the head's checkpoint has tensors its config has no place for: {names}")


def load_head(directory: Path, target: TargetModel) -> tuple[HeadConfig, HeadWeights]:
    """Config and weights of a local head directory, checked against the target. Raises HeadError or LoadError."""
    config = HeadConfig.parse(read_config(directory))
    info = target.info
    config.check_target(info.vocab_size, info.hidden_size, info.num_layers)
    return config, HeadWeights(dict(iterate_weights(directory)), target)


def load_draft_vocab(config: HeadConfig, weights: HeadWeights) -> Tensor | None:
    """Target ids of the tokens the head drafts [n] int64, ascending; None for the whole vocabulary."""
    if config.draft_vocab_size is None:
        return None
    ids = weights.take("draft_vocab", config.draft_vocab_size)
    if not bool((ids[1:] > ids[:-1]).all()) or int(ids[0]) < 0 or int(ids[-1]) >= config.vocab_size:
        raise HeadError(f"the head's draft_vocab must ascend within the vocabulary of {config.vocab_size}")
    return ids


Embed = Callable[[Tensor], Tensor]  # [n] int64 -> [n, hidden]
LMHead = Callable[[Tensor], Tensor]  # [n, hidden] -> [n, drafted tokens] float32


def shared_embedding(config: HeadConfig, weights: HeadWeights, target: TargetModel) -> Embed:
    """The target's embedding, or the checkpoint's own where that says something else."""
    stored = weights.peek(EMBED, config.vocab_size, config.hidden_size)
    if stored is None:
        return target.embed
    if config.family == "gemma4":  # scaled by a factor that is rounded to the weights' precision first
        stored = stored * torch.tensor(config.hidden_size**0.5, dtype=stored.dtype, device=stored.device)
    everything = torch.arange(config.vocab_size, device=target.device)
    if torch.equal(stored, target.embed(everything)):
        weights.drop(EMBED)
        return target.embed
    weights.take(EMBED, config.vocab_size, config.hidden_size)
    return lambda token_ids: F.embedding(token_ids, stored)


def shared_lm_head(config: HeadConfig, weights: HeadWeights, target: TargetModel, draft_vocab: Tensor | None) -> LMHead:
    """Raw logits of the tokens the head drafts. With a draft vocabulary only its rows are kept, a copy of their own."""
    shape = (config.vocab_size, config.hidden_size)
    stored = weights.peek(LM_HEAD, *shape)
    if stored is not None and not _same_product(stored, target.lm_head, None):
        weights.take(LM_HEAD, *shape)
        return _logits(weights.ops.linear(stored if draft_vocab is None else stored[draft_vocab]))
    weights.drop(LM_HEAD)
    if draft_vocab is None:
        return target.lm_head
    rows: Weight | None = target.lm_head_blocks(draft_vocab)
    if rows is None:
        rows = lm_head_rows(target, draft_vocab)
    weights.num_bytes += rows.nbytes
    return _logits(weights.ops.linear(rows))


def _logits(linear: Linear) -> LMHead:
    return linear if isinstance(linear, NativeLinear) else lambda hidden: linear(hidden).float()


def lm_head_rows(target: TargetModel, ids: Tensor) -> Tensor:
    """Rows `ids` of the target's LM head [n, hidden], however its weights are stored."""
    hidden, dtype = target.info.hidden_size, target.info.dtype
    tied = target.embed(ids)  # mostly the same matrix
    if _same_product(tied, target.lm_head, ids):
        return tied
    columns = []
    for start in range(0, hidden, _COLUMNS):  # what it makes of a unit vector is a column
        unit = torch.zeros(min(_COLUMNS, hidden - start), hidden, dtype=dtype, device=target.device)
        unit.diagonal(start).fill_(1.0)
        columns.append(target.lm_head(unit)[:, ids].to(dtype))
    return torch.cat(columns).T.contiguous()


def shared_bytes(config: HeadConfig, target: TargetModel) -> int:
    """Bytes of embedding and LM head, which a separate draft model would bring along; once where they are equal."""
    everything = torch.arange(config.vocab_size, device=target.device)
    tied = _same_product(target.embed(everything), target.lm_head, None)
    return config.vocab_size * config.hidden_size * target.info.dtype.itemsize * (1 if tied else 2)


def _same_product(rows: Tensor, lm_head: LMHead, ids: Tensor | None) -> bool:
    """Whether `rows` [n, hidden] are the LM head's (rows `ids` of it), seen through products with random signs.

    Unequal matrices agree on random vectors only by their rounding errors.
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (_PROBES, rows.shape[1]), generator=generator) * 2 - 1
    probe = probes.to(rows.device, rows.dtype)
    theirs = lm_head(probe)
    theirs = theirs if ids is None else theirs[:, ids]
    ours = F.linear(probe, rows).float()
    tolerance = 1e-5 if rows.dtype == torch.float32 else 1e-2
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
