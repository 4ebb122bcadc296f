"""A model and its head as the doctor sees them: loaded as `serve` would load them, and checked by the same code.

Must not know: the machine beyond its memory; how any check is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from dspark_kernels import native
from dspark_kernels.blocks import BlockWeight
from dspark_serve.config import Config, SpeculationConfig
from dspark_serve.doctor.findings import Finding
from dspark_serve.drafters.head_config import HeadError
from dspark_serve.drafters.heads import head_directory
from dspark_serve.engine.build import build_engine, find_model, head_key, rows_key, with_shipped_head
from dspark_serve.engine.curves import CONTEXT, best_drafts, loads
from dspark_serve.engine.engine import Engine
from dspark_serve.engine.remembered import passed
from dspark_serve.engine.self_test import expected_length
from dspark_serve.models.catalog import LoadError
from dspark_serve.models.invariance import row_variance
from dspark_serve.models.loader import ResolvedModel, iterate_stored
from dspark_serve.speculation.policies import AutoBudget

_GIB = 1 << 30
_TIGHT = 0.8  # of the available memory


def examine(config: Config) -> Iterator[Finding]:
    """One finding per check, as soon as it is made. Fetches the model if need be, and measures it once (seconds)."""
    try:
        resolved = find_model(config)
        weights = weight_gib(resolved.path, config)
    except LoadError as error:
        yield Finding("model", "fail", str(error), "name a catalog model, a directory, a .gguf file or a hub id")
        return
    room = _room(weights, config)
    yield room
    if room.level == "fail":
        return  # loading it could take the machine down
    try:
        engine = build_engine(config, resolved)
    except HeadError as error:
        yield Finding("head", "fail", str(error), "name a head made for this model, or graft one: dspark-serve graft")
        yield from examine(config.model_copy(update={"speculation": SpeculationConfig(method="none")}))
        return
    except (LoadError, ValueError) as error:
        yield Finding("model", "fail", str(error), "see the sentence; `dspark-serve serve --help` lists the options")
        return
    yield _model(engine)
    yield _pool(engine)
    yield _rows(engine)
    yield _head(engine, config, resolved)
    yield from _speed(engine, config, resolved)


def weight_gib(directory: Path, config: Config) -> float:
    """Memory that the weights take once they are loaded. Raises LoadError when they cannot be read."""
    on_gpu = _on_gpu(config)
    kept = config.model.dtype == "auto" and (
        on_gpu or (config.model.kernels == "auto" and native.load() is not None)  # else widened to float32
    )
    total = 0
    for _, weight in iterate_stored(directory):
        elements = math.prod(weight.shape)
        if isinstance(weight, BlockWeight):
            stored = sum(part.nbytes for part in (weight.codes, weight.scales, weight.minima))
            stored = 2 * elements if on_gpu else stored
        else:
            stored = weight.nbytes
        total += stored if kept else elements * (2 if config.model.dtype in ("bfloat16", "float16") else 4)
    return total / _GIB


def _on_gpu(config: Config) -> bool:
    return torch.cuda.is_available() and config.model.device != "cpu"


def _room(weights: float, config: Config) -> Finding:
    available = (torch.cuda.mem_get_info()[0] if _on_gpu(config) else psutil.virtual_memory().available) / _GIB
    available -= config.cache.kv_cache_gib or 0.0
    pool = f" beside a pool of {config.cache.kv_cache_gib:g}" if config.cache.kv_cache_gib else ""
    found = f"the weights take {weights:.2f} GiB of {available:.2f} GiB available{pool}"
    if weights > available:
        return Finding("room", "fail", found, "serve a smaller model or a quantised GGUF file, or end other processes")
    if weights > _TIGHT * available:
        return Finding("room", "warn", f"{found}: little is left for K/V", "serve a quantised GGUF file")
    return Finding("room", "ok", found)


def _model(engine: Engine) -> Finding:
    info = engine.info
    found = f"{info.model}: {info.architecture}, {info.dtype} on {info.device}, {info.backend}"
    if info.backend.startswith("transformers"):
        advice = "nothing to do; Llama, Mistral, Qwen2 and Qwen3 have code of their own"
        return Finding("model", "warn", f"{found}: through Transformers' code, which is slower", advice)
    return Finding("model", "ok", found)


def _pool(engine: Engine) -> Finding:
    info = engine.info
    found = f"K/V for {info.pool_tokens:,} tokens in {info.kv_bytes / 2**20:,.0f} MiB"
    lengths = info.pool_tokens / info.max_model_len
    if lengths < 1:
        found += f", less than one request at the full length of {info.max_model_len:,}"
        return Finding("pool", "warn", found, "raise --kv-cache-gib, or lower --max-model-len")
    return Finding("pool", "ok", f"{found}, {lengths:.1f} requests at the full length of {info.max_model_len:,}")


def _rows(engine: Engine) -> Finding:
    if engine.info.row_invariant:
        key = rows_key(engine.runner.model, Path(engine.info.model_dir), engine.info.page_size)
        found = "a token has the same bits however it is batched: the same seed gives the same text, drafts or not"
        return Finding("exactness", "ok", f"{found}{_kept('rows', key)}")
    variance = row_variance(engine.runner.model, engine.info.page_size)
    found = f"the same distribution, but near-ties may fall differently in a batch: {variance}"
    return Finding("exactness", "warn", found, "on a CPU, --dtype float32 or auto has the same bits in any batch")


def _kept(check: str, key: dict[str, object]) -> str:
    return " (remembered: the next start skips this check)" if passed(check, key) else ""


def _head(engine: Engine, config: Config, resolved: ResolvedModel) -> Finding:
    info = engine.info
    if info.warnings:
        advice = "serve a head that was made for these very weights, or graft one: dspark-serve graft"
        return Finding("head", "warn", " ".join(info.warnings), advice)
    speculation = with_shipped_head(config.speculation, resolved)
    if info.head is None:
        drafter = "nothing drafts" if info.drafter == "none" else f"{info.drafter} drafts, and no head"
        return Finding("head", "ok", f"{drafter}: only text that repeats itself comes faster; `graft` trains a head")
    key = head_key(config.model_copy(update={"speculation": speculation}), resolved.path, engine.runner.model)
    tried = "fits and passed its self-test" if config.speculation.head_self_test else "fits; its self-test is off"
    found = f"{info.head} {tried}: {info.num_speculative_tokens} drafts a step, {info.head_bytes / 2**20:.1f} MiB"
    return Finding("head", "ok", f"{found}{_kept('head', key)}")


def _speed(engine: Engine, config: Config, resolved: ResolvedModel) -> Iterator[Finding]:
    """Where drafting pays by the measured curves, given what is stored with the head."""
    if not isinstance(engine.budget, AutoBudget):
        return
    head = with_shipped_head(config.speculation, resolved).head if engine.info.head is not None else None
    reached = None if head is None else expected_length(head_directory(head))
    for rows in [rows for rows in loads(engine) if rows in (1, 8, 32)]:
        plain_ms = engine.budget.cost.step_ms(rows, rows, rows * CONTEXT, greedy=True)
        found = f"{rows} at once: about {1e3 * rows / plain_ms:.0f} tokens per second without drafts"
        drafts, gain = (0, 1.0) if reached is None else best_drafts(engine, rows, reached)
        if drafts:
            found += f", {gain:.2f} times that with up to {drafts} from the head per request and step"
        elif reached is not None:
            found += (
                f"; the head's {reached:.2f} accepted tokens per step are less than its drafts cost, so few are made"
            )
        if reached is not None and not drafts and rows == 1:
            yield Finding(
                "speed", "warn", found, "graft a better head (dspark-serve graft), or serve with --budget off"
            )
        else:
            yield Finding("speed", "ok", found)
