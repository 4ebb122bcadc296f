"""From a head's name to its directory, and from there to a DrafterPlan: `architectures[0]` decides which network it is.

Must not know: requests, how the K/V pool is sized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.base import Drafter, DrafterPlan, Record
from dspark_serve.drafters.dspark import DSparkDrafter, DSparkHead
from dspark_serve.drafters.eagle3 import Eagle3Drafter, Eagle3Head
from dspark_serve.drafters.head_config import HeadConfig, HeadError
from dspark_serve.drafters.head_weights import HeadWeights, load_head, shared_bytes
from dspark_serve.models.base import TargetModel
from dspark_serve.models.catalog import LoadError
from dspark_serve.models.loader import resolve
from dspark_serve.types import VerifyMode


def head_directory(head: str) -> Path:
    """The local directory of a head, which is one or a hub id (downloaded on first use). HeadError: there is none."""
    try:
        return resolve(head).path
    except LoadError as error:
        raise HeadError(f"the draft head {head} cannot be used: {error}") from error


def plan_head(directory: Path, target: TargetModel, mode: VerifyMode, width: int | None = None) -> DrafterPlan:
    """The drafter of a local head directory. `width` None: as many drafts as the head makes.

    Raises HeadError, or the loader's LoadError, when the head cannot be read or does not fit the target.
    """
    config, weights = load_head(directory, target)
    return _plan(config, weights, target, mode, width)


def plan_from_tensors(
    config: HeadConfig, tensors: Mapping[str, Tensor], target: TargetModel, mode: VerifyMode, width: int | None = None
) -> DrafterPlan:
    """The same for a head in memory: one that is being trained, or made up by a test."""
    info = target.info
    config.check_target(info.vocab_size, info.hidden_size, info.num_layers)
    return _plan(config, HeadWeights(tensors, target), target, mode, width)


@torch.inference_mode()
def _plan(
    config: HeadConfig, weights: HeadWeights, target: TargetModel, mode: VerifyMode, width: int | None
) -> DrafterPlan:
    width = config.block_size if width is None else width
    borrowed = shared_bytes(config, target)
    head: Eagle3Head | DSparkHead
    if config.kind == "eagle3":
        name, head = "eagle3", Eagle3Head.from_weights(config, weights, target)
    else:
        name = "dspark" if config.markov_rank else "dflash"
        head = DSparkHead.from_weights(config, weights, target)

    def make(store: KVStore, first_layer: int, record: Record | None = None) -> Drafter:
        if isinstance(head, Eagle3Head):
            return Eagle3Drafter(head, store, first_layer, mode, width)
        return DSparkDrafter(head, store, first_layer, mode, width, record)

    return DrafterPlan(
        name=name,
        make=make,
        kv_layers=head.kv_layers,
        num_bytes=weights.num_bytes,
        separate_bytes=weights.num_bytes + borrowed,
        costly=name,
    )
