"""The composition root: a Config in, a ready Engine out. The one place where concrete classes are chosen.

Must not know: HTTP, text. Prints nothing; the caller shows what EngineInfo says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from dspark_serve.cache.pages import PagePool
from dspark_serve.cache.store import KVStore
from dspark_serve.config import CacheConfig, Config, SpeculationConfig
from dspark_serve.drafters.base import Drafter
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.none import NoDrafter
from dspark_serve.engine.batch import Batcher
from dspark_serve.engine.engine import Engine
from dspark_serve.engine.runner import Runner
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.models.base import ModelInfo, TargetModel
from dspark_serve.models.invariance import row_variance
from dspark_serve.models.loader import generation_defaults, load_model, resolve
from dspark_serve.speculation.budget import KeepAll
from dspark_serve.types import EngineInfo

DRAFTERS: dict[str, Callable[[SpeculationConfig], Drafter]] = {
    "none": lambda config: NoDrafter(),
    "ngram": lambda config: NgramDrafter(
        config.num_speculative_tokens, config.prompt_lookup_min, config.prompt_lookup_max
    ),
}

_GIB = 1 << 30
_CPU_SHARE = 0.05  # of the memory that is available once the weights are in


def build_engine(config: Config) -> Engine:
    """Resolve and load the model, size the K/V pool, put the parts together.

    Downloads the model when it is not cached, with a progress bar where stderr is a terminal. Raises ValueError, or
    the loader's LoadError, with one sentence that says what to do.
    """
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    device = _device(config.model.device)
    trust = config.model.trust_remote_code
    resolved = resolve(config.model.model, trust)
    model = load_model(resolved, config.model.dtype, str(device), trust, config.model.kernels)
    max_model_len = _max_model_len(config.model.max_model_len, model.info)
    drafter = DRAFTERS[config.speculation.method](config.speculation)
    num_pages = _num_pages(config, model, max_model_len)
    store = KVStore(model.info.kv_layers, num_pages, config.cache.page_size, model.info.dtype, device)
    pool = PagePool(num_pages, config.cache.page_size, config.cache.enable_prefix_caching)
    scheduler = Scheduler(
        pool,
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=max(config.engine.max_num_batched_tokens, config.engine.max_num_seqs),
        max_model_len=max_model_len,
        max_queue=config.engine.max_queue,
        vocab_size=model.info.vocab_size,
        draft_width=drafter.width,
        max_prefill_chunk=config.engine.max_prefill_chunk,
    )
    info = _engine_info(config, str(resolved.path), model, store, scheduler)
    runner = Runner(model, store, drafter.taps)
    return Engine(info, scheduler, drafter, KeepAll(), Batcher(config.cache.page_size, device), runner)


def _engine_info(config: Config, path: str, model: TargetModel, store: KVStore, scheduler: Scheduler) -> EngineInfo:
    page_bytes = KVStore.bytes_per_page(store.layers, store.page_size, model.info.dtype)
    return EngineInfo(
        model=config.model.model,
        model_dir=path,
        architecture=model.info.architecture,
        vocab_size=model.info.vocab_size,
        max_model_len=scheduler.max_model_len,
        dtype=str(model.info.dtype).removeprefix("torch."),
        device=str(model.device),
        backend=model.info.backend,
        page_size=store.page_size,
        pool_tokens=scheduler.pool.num_usable * store.page_size,
        kv_bytes=store.num_pages * page_bytes,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        drafter=config.speculation.method,
        num_speculative_tokens=scheduler.draft_width,
        verify_mode=config.speculation.verify_mode,
        row_invariant=row_variance(model, store.page_size) is None,
        eos_token_ids=generation_defaults(Path(path)).eos_token_ids,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but this torch sees no GPU; install the [gpu] extra or use cpu")
    return device


def _max_model_len(wanted: int | None, info: ModelInfo) -> int:
    if wanted is not None and wanted > info.max_model_len:
        raise ValueError(
            f"max_model_len {wanted} is more than the {info.max_model_len} positions the model was made for"
        )
    return wanted or info.max_model_len


def _num_pages(config: Config, model: TargetModel, max_model_len: int) -> int:
    """Pages the memory budget allows, never more than all sequences at full length use. Page 0 comes on top.

    A pool smaller than one full sequence is legal: requests that cannot fit are refused with the numbers.
    """
    size = config.cache.page_size
    page_bytes = KVStore.bytes_per_page(model.info.kv_layers, size, model.info.dtype)
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
