"""From a head's directory to a DrafterPlan: `architectures[0]` decides which network it is.

Must not know: requests, how the K/V pool is sized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dspark_serve.drafters.base import DrafterPlan
from dspark_serve.drafters.dspark import DSparkDrafter, DSparkHead
from dspark_serve.drafters.eagle3 import Eagle3Drafter, Eagle3Head
from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.drafters.head_weights import HeadWeights, load_head, shared_bytes
from dspark_serve.models.base import TargetModel
from dspark_serve.types import VerifyMode


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
    return _plan(config, HeadWeights(tensors, info.dtype, target.device), target, mode, width)


@torch.inference_mode()
def _plan(
    config: HeadConfig, weights: HeadWeights, target: TargetModel, mode: VerifyMode, width: int | None
) -> DrafterPlan:
    width = config.block_size if width is None else width
    borrowed = shared_bytes(config, target)
    if config.kind == "eagle3":
        eagle = Eagle3Head.from_weights(config, weights, target)
        return DrafterPlan(
            name="eagle3",
            make=lambda store, first: Eagle3Drafter(eagle, store, first, mode, width),
            kv_layers=eagle.kv_layers,
            num_bytes=weights.num_bytes,
            separate_bytes=weights.num_bytes + borrowed,
            costly="eagle3",
        )
    head = DSparkHead.from_weights(config, weights, target)
    name = "dspark" if config.markov_rank else "dflash"
    return DrafterPlan(
        name=name,
        make=lambda store, first: DSparkDrafter(head, store, first, mode, width),
        kv_layers=head.kv_layers,
        num_bytes=weights.num_bytes,
        separate_bytes=weights.num_bytes + borrowed,
        costly=name,
    )
