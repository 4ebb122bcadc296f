"""What a step waits for, counted on a pretended device: one copy, of its tokens and all that the next decision needs.

Whatever would make the host wait for a GPU counts: copies back, copies there that block, single numbers, and results
whose size depends on values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dspark_serve.cache.pages import PagePool
from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.heads import plan_head
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.portfolio import PortfolioDrafter
from dspark_serve.engine.batch import Batcher
from dspark_serve.engine.drafting import DraftFirst
from dspark_serve.engine.engine import Engine
from dspark_serve.engine.runner import Runner
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.speculation.fixed import KeepAll
from dspark_serve.transfers import to_device, to_host
from dspark_serve.types import VerifyMode
from tests.drafters.golden import GOLDENS
from tests.test_exactness import deciding_budget
from tests.toy import make_engine, make_request, toy_model
from tests.training import stand_in as pretended

SIZED_BY_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


def waits(name: str, source: Any, out: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """What an operation counts as, if it does; `source`: what it reads."""
    was_there, is_there = (isinstance(x, pretended.ThereTensor) for x in (source, out))
    if name in ("_to_copy", "copy_"):
        if was_there == is_there:
            return None
        at_once = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        return "copy back" if was_there else "copies there" if at_once else "blocking copy there"
    if not was_there:
        return None
    masks = args[1] if name in ("index", "index_put", "index_put_") else ()
    by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
    repeated = name == "repeat_interleave" and kwargs.get("output_size") is None
    return name if name in SIZED_BY_VALUES or by_mask or repeated else None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The pretended device, and what happened on the way there and back since this was last emptied."""
    found: Counter[str] = Counter()
    inner = pretended._run

    def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = inner(func, args, kwargs)
        name = func.name().removeprefix("aten::").partition(".")[0]
        source = args[1] if name == "copy_" else next((x for x in args if isinstance(x, torch.Tensor)), None)
        what = waits(name, source, out, args, kwargs)
        if what is not None:
            found[what] += 1
        return out

    monkeypatch.setattr(pretended, "_run", run)
    with pretended.stand_in(monkeypatch):
        yield found


def engine_there(drafter: str, mode: VerifyMode = "coupled", judged: bool = True, ahead: bool = True) -> Engine:
    """A golden target on the pretended device, with as much of a drafter; a budget decides where it is a head's, if it
    is `judged`. ahead: drafts are made as the engine chooses to; else always at the start of a step."""
    model = load_model(resolve(str(GOLDENS / "target")), "float32", str(pretended.DEVICE))
    width, layers = 3, model.info.kv_layers
    ngram = NgramDrafter(0 if drafter == "none" else width, 1, 3)
    head = "dspark_vanilla" if drafter == "portfolio" else drafter
    plan = None if drafter in ("none", "ngram") else plan_head(GOLDENS / head, model, mode, width)
    store = KVStore((*layers, *(plan.kv_layers if plan else ())), 60, 8, model.info.dtype, model.device)
    made: Any = ngram if plan is None else plan.make(store, len(layers))
    made = PortfolioDrafter(ngram, made, head) if drafter == "portfolio" else made
    scheduler = Scheduler(
        PagePool(60, 8), max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, max_queue=9,
        vocab_size=model.info.vocab_size, draft_width=made.width,
    )  # fmt: skip
    budget = deciding_budget(made, "generous", mode) if plan and judged else KeepAll()
    batcher, runner = Batcher(8, model.device), Runner(model, store, made.taps)
    info, drafting = make_engine(toy_model(), mode=mode).info, None if ahead else DraftFirst(made)
    return Engine(info, scheduler, made, budget, batcher, runner, drafting=drafting)


def serve(engine: Engine, counted: Counter[str], *asked: dict[str, Any]) -> list[dict[str, int]]:
    """What was counted in each step, of which the first has the prompts: what is set up once was so for another
    request. Whoever drafts has some verified.

    Three requests, greedy but for what is `asked`: of the first, the second, ..., then of the first again.
    """
    engine.add(make_request("first", [8, 9, 8, 9], temperature=0.0, max_tokens=20, ignore_eos=True))
    while engine.has_work:
        engine.step()
    for index in range(3):
        params = {"temperature": 0.0, "max_tokens": 8} | (asked[index % len(asked)] if asked else {})
        prompt = [5 + index, 6, 7, 6, 7, 6, 7]
        engine.add(make_request(f"r{index}", prompt, seed=index, ignore_eos=True, **params))
    found, kept = [], 0
    while engine.has_work:
        counted.clear()
        kept += sum(row.n_kept for row in engine.step().rows)
        found.append(dict(counted))
    assert (kept > 0) == (engine.drafter.width > 0)
    return found


def check(steps: list[dict[str, int]], back: set[int], there: int) -> None:
    """Nothing but copies: as often back as `back` says, and at most `there` in the other direction."""
    assert {name for step in steps for name in step} == {"copy back", "copies there"}
    assert {step["copy back"] for step in steps} == back
    assert max(step["copies there"] for step in steps) <= there


def test_tokens_are_all_that_comes_back(counted: Counter[str]) -> None:
    check(serve(engine_there("none"), counted), {1}, 3)


def test_lookups_only_go_there(counted: Counter[str]) -> None:
    check(serve(engine_there("ngram"), counted), {1}, 4)


HEADS = ["dspark_vanilla", "dflash", "eagle3", "portfolio"]


@pytest.mark.parametrize("drafter", HEADS)
def test_what_a_head_says_comes_with_the_tokens(counted: Counter[str], drafter: str) -> None:
    """How sure it is of its drafts decides how many are verified: they are made before the last tokens are fetched."""
    check(serve(engine_there(drafter), counted), {1}, 10)


@pytest.mark.parametrize("drafter", HEADS)
def test_a_head_that_drafts_first_is_waited_for_once_more(counted: Counter[str], drafter: str) -> None:
    check(serve(engine_there(drafter, ahead=False), counted), {1, 2}, 8)


@pytest.mark.parametrize("drafter", ["dflash", "eagle3", "portfolio"])
def test_a_head_that_nobody_judges_is_not_waited_for(counted: Counter[str], drafter: str) -> None:
    check(serve(engine_there(drafter, judged=False), counted), {1}, 8 if drafter == "portfolio" else 6)


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("drafter", ["ngram", *HEADS])
def test_sampling_is_not_waited_for(counted: Counter[str], drafter: str, mode: VerifyMode) -> None:
    """However target and drafter draw, filter and penalise, the copies are those of greedy requests."""
    engine = engine_there(drafter, mode)
    sampled = {"temperature": 0.8, "max_tokens": 8 if drafter == "ngram" else 5}  # the text must repeat itself first
    check(serve(engine, counted, sampled, sampled | {"temperature": 0.0}), {1}, 10)
    filters: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.9, "frequency_penalty": 0.5}, {"min_p": 0.1}]
    check(serve(engine, counted, *(sampled | each for each in filters)), {1}, 12)


@pytest.mark.parametrize(
    "asked",
    [{"logprobs": 3}, {"prompt_logprobs": 2, "logprobs": 0}, {"presence_penalty": 0.5}, {"logit_bias": ((3, 1.0),)}],
)
def test_what_requests_ask_for_costs_no_copy_more(counted: Counter[str], asked: dict[str, Any]) -> None:
    """Log-probabilities come with the tokens; penalties count drafts where they are, and biases need nothing."""
    check(serve(engine_there("ngram"), counted, asked), {1}, 6)


def test_waiting_is_noticed(counted: Counter[str]) -> None:
    there = torch.arange(4, device=pretended.DEVICE)
    assert int(there.max()) == 3
    assert bool((there >= 0).all())
    assert there[there > 1].cpu().tolist() == [2, 3]
    assert (there > 2).nonzero().tolist() == [[3]]
    assert torch.tensor([1, 2], device=pretended.DEVICE).tolist() == [1, 2]
    wanted = {"copy back": 3, "blocking copy there": 1, "_local_scalar_dense": 2, "nonzero": 1, "index": 1}
    assert {name: counted[name] for name in wanted} == wanted


def test_arrays_go_there_in_one_copy(counted: Counter[str]) -> None:
    arrays = [
        np.arange(12).reshape(3, 4).T,
        np.zeros((2, 0), dtype=np.int64),
        np.array([], dtype=np.int64),
        np.array([True, False, True]),
        np.array([0.5, float("-inf"), float("nan")], dtype=np.float32),
        np.array([-(1 << 63), 7]),
    ]
    moved = to_device(pretended.DEVICE, *arrays)
    assert counted == {"copies there": 1}
    assert {type(each) for each in moved} == {pretended.ThereTensor}
    for array, there, here in zip(arrays, moved, to_device(torch.device("cpu"), *arrays), strict=True):
        for each in (there.cpu(), here):
            assert each.is_contiguous()
            np.testing.assert_array_equal(each.numpy(), array, strict=True)
        assert there.storage_offset() * there.itemsize % 16 == 0


def test_tensors_come_back_in_one_copy(counted: Counter[str]) -> None:
    here = [
        torch.tensor([True, False, True]),
        torch.arange(12).view(3, 4).T,
        torch.zeros(2, 0, dtype=torch.int64),
        torch.tensor([[0.5, float("-inf"), float("nan")]]),
        torch.tensor([-(1 << 63), 7]),
    ]
    there = [tensor.to(pretended.DEVICE) for tensor in here]
    counted.clear()
    fetched = to_host(*there)
    assert counted == {"copy back": 1}
    for tensor, *arrays in zip(here, fetched, to_host(*here), strict=True):
        for array in arrays:
            np.testing.assert_array_equal(array, tensor.numpy(), strict=True)
