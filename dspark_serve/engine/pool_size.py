"""How many pages the K/V pool gets: what memory allows, and no more than requests can use."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from dspark_serve.cache.store import KVStore, LayerGeometry
from dspark_serve.config import CacheConfig, Config
from dspark_serve.models.base import TargetModel

_GIB = 1 << 30
_CPU_SHARE = 0.05  # of the memory that is available once the weights are in


def pool_pages(config: Config, model: TargetModel, layers: Sequence[LayerGeometry], max_model_len: int) -> int:
    """Pages the memory budget allows, never more than all sequences at full length use. Page 0 comes on top.

    A pool smaller than one full sequence is legal: requests that cannot fit are refused with the numbers.
    """
    size = config.cache.page_size
    page_bytes = KVStore.bytes_per_page(layers, size, model.info.dtype)
    one_sequence = -(-max_model_len // size)
    if config.cache.kv_cache_gib is not None:
        pages = int(config.cache.kv_cache_gib * _GIB / page_bytes)
    else:
        budget = _kv_budget(model.device, config.cache, one_sequence * page_bytes)
        pages = min(int(budget / page_bytes), config.engine.max_num_seqs * one_sequence)
    if pages < 1:
        raise ValueError(
            f"no memory for K/V: one page of {size} tokens takes {page_bytes / _GIB:.3g} GiB; "
            "raise kv_cache_gib or gpu_memory_utilization, or serve a smaller model"
        )
    return pages + 1


def _kv_budget(device: torch.device, cache: CacheConfig, one_sequence_bytes: int) -> float:
    """Bytes for K/V: on a GPU what gpu_memory_utilization leaves; in main memory a modest share of what is available,
    stretched to half of it when one full sequence needs that."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - (1 - cache.gpu_memory_utilization) * total
    available = psutil.virtual_memory().available
    return max(_CPU_SHARE * available, min(0.5 * available, one_sequence_bytes))
