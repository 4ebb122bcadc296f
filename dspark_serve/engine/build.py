"""The composition root: a Config in, a ready Engine out. The one place where concrete classes are chosen.

Must not know: HTTP, text. Prints nothing; the caller shows what EngineInfo says.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dspark_serve.cache.pages import PagePool
from dspark_serve.cache.store import KVStore
from dspark_serve.config import Config, SpeculationConfig
from dspark_serve.drafters.base import AheadDrafter, BlockPass, DrafterPlan, Record
from dspark_serve.drafters.heads import head_directory, plan_head
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.none import NoDrafter
from dspark_serve.drafters.portfolio import LOOKUP_DRAFTS, LOOKUP_SHORTEST, PortfolioDrafter
from dspark_serve.engine.batch import Batcher
from dspark_serve.engine.cores import Cores
from dspark_serve.engine.engine import Engine
from dspark_serve.engine.graph_check import with_block_graphs, with_graphs
from dspark_serve.engine.heap import keep_freed_memory
from dspark_serve.engine.padding import Limits
from dspark_serve.engine.pool_size import pool_pages
from dspark_serve.engine.profile import Rig, machine_profile
from dspark_serve.engine.recorders import CudaRecorder, Recorder
from dspark_serve.engine.remembered import file_states, machine, passed, remember
from dspark_serve.engine.runner import Runner
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.engine.self_test import run_self_test
from dspark_serve.models.base import ModelInfo, TargetModel
from dspark_serve.models.catalog import CATALOG
from dspark_serve.models.invariance import row_variance
from dspark_serve.models.loader import ResolvedModel, generation_defaults, load_model, resolve
from dspark_serve.reports import EngineInfo
from dspark_serve.speculation.calibrate import Calibrator, stored_maps
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.fixed import Budget, FixedBudget, KeepAll
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.speculation.verify import Rule, verify
from dspark_serve.types import LOOKUP

DRAFTERS: dict[str, Callable[[SpeculationConfig, TargetModel], DrafterPlan]] = {
    "none": lambda config, target: DrafterPlan("none", lambda store, first_layer, record=None: NoDrafter()),
    "ngram": lambda config, target: _plan_ngram(config),
    "dspark": lambda config, target: _plan_head(config, target),
    "dflash": lambda config, target: _plan_head(config, target),
    "eagle3": lambda config, target: _plan_head(config, target),
    "portfolio": lambda config, target: _plan_portfolio(config, target),
}
_SELF_TEST_TOKENS = 1024  # K/V slots for it
_NGRAM_DRAFTS = 4  # unless num_speculative_tokens says otherwise
_NGRAM_SHORTEST = 2  # tokens that must have occurred before, where lookup drafts alone

logger = logging.getLogger(__name__)


def find_model(config: Config) -> ResolvedModel:
    """Where the model is, for `build_engine`; downloads it when it is not cached, with a progress bar on a terminal.

    Raises the loader's LoadError with one sentence that says what to do.
    """
    return resolve(config.model.model, config.model.trust_remote_code)


def build_engine(config: Config, resolved: ResolvedModel | None = None, model: TargetModel | None = None) -> Engine:
    """Load the model, size the K/V pool, put the parts together. `resolved`: where the model is, if that is known.

    model: the same, loaded: engines that take turns in one thread may share it.

    Raises ValueError, or the loader's LoadError, with one sentence that says what to do.
    """
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    device = choose_device(config.model.device)
    trust = config.model.trust_remote_code
    resolved = resolved or find_model(config)
    if model is None:
        model = load_model(resolved, config.model.dtype, str(device), trust, config.model.kernels)
    max_model_len = _max_model_len(config.model.max_model_len, model.info)
    config = config.model_copy(update={"speculation": with_shipped_head(config.speculation, resolved)})
    plan = plan_drafter(config.speculation, model)
    warnings: tuple[str, ...] = ()
    if plan.num_bytes and config.speculation.head_self_test:
        plan, warnings = _tested(config, str(resolved.path), model, plan, max_model_len)
    num_pages = pool_pages(config, model, (*model.info.kv_layers, *plan.kv_layers), max_model_len)
    invariant = _row_invariant(model, resolved.path, config.cache.page_size)
    recorder = None if config.engine.enforce_eager else _recorder(model.device)
    return _assemble(config, str(resolved.path), model, plan, max_model_len, num_pages, invariant, warnings, recorder)


def _row_invariant(model: TargetModel, path: Path, page_size: int) -> bool:
    """Whether a token's bits are the same however it is batched: seen now, or seen before with these very files."""
    key = rows_key(model, path, page_size)
    if not passed("rows", key):
        if row_variance(model, page_size) is not None:
            return False
        remember("rows", key)
    return True


def rows_key(model: TargetModel, path: Path, page_size: int) -> dict[str, object]:
    """Under which the check for row-invariant arithmetic is remembered."""
    return {**_check_key(model, path), "page_size": page_size}


def head_key(config: Config, path: Path, model: TargetModel) -> dict[str, object]:
    """Under which the self-test of config's head is remembered."""
    assert config.speculation.head is not None
    head_dir = head_directory(config.speculation.head)
    key = {**_check_key(model, path), "head": str(head_dir), "head_files": file_states(head_dir)}
    return key | config.speculation.model_dump(include={"method", "num_speculative_tokens", "verify_mode"})


def _check_key(model: TargetModel, path: Path) -> dict[str, object]:
    info = model.info
    files = {"path": str(path), "files": file_states(path)}
    return {**files, "dtype": str(info.dtype), "backend": info.backend, **machine(model.device)}


def _assemble(
    config: Config,
    path: str,
    model: TargetModel,
    plan: DrafterPlan,
    max_model_len: int,
    num_pages: int,
    row_invariant: bool,
    warnings: tuple[str, ...] = (),
    recorder: Recorder | None = None,
) -> Engine:
    keep_freed_memory(model.device)
    page_size = config.cache.page_size
    layers = (*model.info.kv_layers, *plan.kv_layers)
    store = KVStore(layers, num_pages, page_size, model.info.dtype, model.device)
    notes = list(warnings)

    def record(block: BlockPass) -> BlockPass:
        """Within plan.make: the scheduler's limits depend on the drafter's width, but not those of its rows."""
        assert recorder is not None
        limits = Limits(config.engine.max_num_seqs, config.engine.max_num_seqs, max_model_len)
        block, found = with_block_graphs(block, store, model.info.vocab_size, limits, recorder)
        notes.extend(found)
        return block

    make = plan.make if recorder is None else functools.partial(plan.make, record=record)
    drafter = make(store, len(model.info.kv_layers))
    scheduler = Scheduler(
        PagePool(num_pages, page_size, config.cache.enable_prefix_caching),
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=max(config.engine.max_num_batched_tokens, config.engine.max_num_seqs),
        max_model_len=max_model_len,
        max_queue=config.engine.max_queue,
        vocab_size=model.info.vocab_size,
        draft_width=_draft_width(config.speculation.budget, drafter.width),
        max_prefill_chunk=config.engine.max_prefill_chunk,
    )
    runner, batcher, rule = Runner(model, store, drafter.taps), Batcher(page_size, model.device), rule_for(model)
    if recorder is not None:
        runner, found = with_graphs(runner, _limits(scheduler), recorder)
        notes.extend(found)
    info = _engine_info(config, path, model, store, scheduler, plan)
    graph_tokens = 0 if runner.graphs is None else runner.graphs.sizes[-1]
    info = replace(info, row_invariant=row_invariant, warnings=tuple(notes), graph_tokens=graph_tokens)
    with Cores(model.device):  # what is measured here holds for steps
        budget = _budget(config.speculation, plan, Rig(info, scheduler, drafter, batcher, runner, rule))
    return Engine(info, scheduler, drafter, budget, batcher, runner, rule)


def rule_for(model: TargetModel) -> Rule:
    """How drafts are accepted: by the kernels that run the model, where they have the rule."""
    if model.info.kernels != "triton":
        return verify
    from dspark_serve.speculation.triton_verify import verify as fused  # imports Triton, which need not be there

    return fused


def _recorder(device: torch.device) -> Recorder | None:
    """None where launches cost next to nothing."""
    return CudaRecorder(device) if device.type == "cuda" else None


def _limits(scheduler: Scheduler) -> Limits:
    """Of the scheduler's steps. Whoever decodes verifies drafts at most; longer steps are prompts, or few."""
    decoding = scheduler.max_num_seqs * (1 + scheduler.draft_width)
    pool_tokens = scheduler.pool.num_usable * scheduler.pool.page_size
    return Limits(
        max_num_seqs=scheduler.max_num_seqs,
        max_tokens=min(decoding, scheduler.max_num_batched_tokens, pool_tokens),
        max_model_len=scheduler.max_model_len,
    )


def _tested(
    config: Config, path: str, model: TargetModel, plan: DrafterPlan, max_model_len: int
) -> tuple[DrafterPlan, tuple[str, ...]]:
    """The plan to serve with, and what to warn of, after a self-test on a small pool of its own.

    A head that passed is not tested again while its files and the model's stay as they are.
    """
    assert config.speculation.head is not None
    head_dir, key = head_directory(config.speculation.head), head_key(config, Path(path), model)
    if passed("head", key):
        return plan, ()
    num_pages = 1 + -(-_SELF_TEST_TOKENS // config.cache.page_size)
    # Nobody asks this engine whether its arithmetic is row-invariant, and finding out takes a while.
    engine = _assemble(_verify_all(config), path, model, plan, max_model_len, num_pages, row_invariant=False)
    result = run_self_test(engine, head_dir)
    if config.speculation.num_speculative_tokens is not None:
        result = replace(result, expected=None)  # what is stored holds for whole blocks
    insisted = config.speculation.budget.startswith("fixed:")
    warnings = result.warnings(config.speculation.head, insisted)
    for sentence in warnings:
        logger.warning(sentence)
    if not warnings:
        remember("head", key)
    return (DRAFTERS["none"](config.speculation, model) if result.worthless and not insisted else plan), warnings


def _verify_all(config: Config) -> Config:
    """Every draft, whatever the budget: the self-test asks what the head can do."""
    return config.model_copy(update={"speculation": config.speculation.model_copy(update={"budget": "full"})})


def with_shipped_head(config: SpeculationConfig, resolved: ResolvedModel) -> SpeculationConfig:
    """A catalog model drafts with the head that comes along, beside prompt lookup, unless another choice was made."""
    shipped = CATALOG[resolved.name].head_dir if resolved.source == "catalog" else None
    if shipped is None or config.head is not None or config.budget == "off" or config.method in ("ngram", "none"):
        return config
    return config.model_copy(update={"head": str(shipped), "method": config.method or "portfolio"})


def plan_drafter(config: SpeculationConfig, target: TargetModel) -> DrafterPlan:
    """The drafter that the options ask for; raises ValueError or HeadError with one sentence when they contradict."""
    if config.budget == "off":
        return DRAFTERS["none"](config, target)
    method = config.method or ("ngram" if config.head is None else None)
    heads = ("dspark", "dflash", "eagle3", "portfolio")
    if method in heads and config.head is None:
        raise ValueError(f"method {method} needs a draft head: name its directory or hub id with --head")
    if method is not None and method not in heads and config.head is not None:
        raise ValueError(f"method {method} does not use the head {config.head}; leave out one of the two")
    plan = DRAFTERS[method or "dspark"](config, target)  # without a method the head's own kind decides
    if method not in (None, plan.name):
        raise ValueError(f"method {method} was asked for, but the head {config.head} is of the kind {plan.name}")
    return plan


def _plan_ngram(config: SpeculationConfig) -> DrafterPlan:
    width = _NGRAM_DRAFTS if config.num_speculative_tokens is None else config.num_speculative_tokens
    return DrafterPlan("ngram", lambda store, first_layer, record=None: _lookup(config, width, _NGRAM_SHORTEST))


def _lookup(config: SpeculationConfig, width: int, shortest: int) -> NgramDrafter:
    """`shortest`: where the configuration leaves it open."""
    wanted, longest = config.prompt_lookup_min, config.prompt_lookup_max
    return NgramDrafter(width, min(shortest, longest) if wanted is None else wanted, longest)


def _plan_head(config: SpeculationConfig, target: TargetModel) -> DrafterPlan:
    assert config.head is not None
    return plan_head(head_directory(config.head), target, config.verify_mode, config.num_speculative_tokens)


def _plan_portfolio(config: SpeculationConfig, target: TargetModel) -> DrafterPlan:
    head = _plan_head(config, target)

    def make(store: KVStore, first_layer: int, record: Record | None = None) -> PortfolioDrafter:
        drafter = head.make(store, first_layer, record)
        assert isinstance(drafter, AheadDrafter), "every head is"
        wanted = config.num_speculative_tokens
        width = max(drafter.width, LOOKUP_DRAFTS) if wanted is None else wanted
        return PortfolioDrafter(_lookup(config, width, LOOKUP_SHORTEST), drafter, head.name)

    return replace(head, name="portfolio", make=make)


def _draft_width(budget: str, width: int) -> int:
    """Drafts a row may carry: no slots are set aside for drafts that would never be verified."""
    return min(width, int(budget.removeprefix("fixed:"))) if budget.startswith("fixed:") else width


def _budget(config: SpeculationConfig, plan: DrafterPlan, rig: Rig) -> Budget:
    if config.budget.startswith("fixed:"):
        return FixedBudget(int(config.budget.removeprefix("fixed:")))
    if config.budget != "auto" or not rig.drafter.width:
        return KeepAll()
    head_dir = head_directory(config.head) if config.head is not None and plan.costly else None
    profile = machine_profile(rig, plan, head_dir, again=config.measure_again)
    calibrator = Calibrator(
        config.verify_mode,
        rig.drafter.width,
        stored_maps(head_dir) if head_dir is not None else {},
        head=plan.costly or "",
        adaptive=frozenset({LOOKUP}),  # it states how often such copies were right of late
    )
    return AutoBudget(
        CostModel(profile, rig.scheduler.max_num_batched_tokens, rig.scheduler.max_num_seqs),
        calibrator,
        drafter=plan.name,
        costly=plan.costly,
        lookups=rig.drafter.copies if isinstance(rig.drafter, NgramDrafter | PortfolioDrafter) else None,
        tokens_per_s_per_user=float(config.objective.partition(":")[2] or 0.0),
    )


def _engine_info(
    config: Config, path: str, model: TargetModel, store: KVStore, scheduler: Scheduler, plan: DrafterPlan
) -> EngineInfo:
    page_bytes = KVStore.bytes_per_page(store.layers, store.page_size, model.info.dtype)
    draft_page_bytes = KVStore.bytes_per_page(plan.kv_layers, store.page_size, model.info.dtype)
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
        drafter=plan.name,
        num_speculative_tokens=scheduler.draft_width,
        verify_mode=config.speculation.verify_mode,
        row_invariant=False,
        eos_token_ids=generation_defaults(Path(path)).eos_token_ids,
        budget=config.speculation.budget,
        objective=config.speculation.objective,
        head=config.speculation.head if plan.num_bytes else None,
        head_bytes=plan.num_bytes,
        separate_draft_bytes=plan.separate_bytes,
        draft_kv_bytes=store.num_pages * draft_page_bytes,
    )


def choose_device(name: str) -> torch.device:
    """The device an option names; "auto" is cuda where torch sees a GPU, else cpu. Raises ValueError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is no device; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but this torch sees no GPU; install the [gpu] extra or use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} was asked for, but torch sees {torch.cuda.device_count()} GPUs, from cuda:0 on"
        )
    return device


def _max_model_len(wanted: int | None, info: ModelInfo) -> int:
    if wanted is not None and wanted > info.max_model_len:
        raise ValueError(
            f"max_model_len {wanted} is more than the {info.max_model_len} positions the model was made for"
        )
    return wanted or info.max_model_len
