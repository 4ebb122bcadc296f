"""Recorded steps by the recorder that calls again: the same sizes, padding and copies as with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_serve.engine.graphs import StepGraphs
from dspark_serve.engine.padding import Limits
from dspark_serve.engine.recorders import EagerRecorder
from dspark_serve.tensors import StepBatch
from tests.engine.ragged import PAGE, ragged_step, written_store
from tests.test_exactness import ragged_prompts
from tests.toy import VOCAB, drafter_named, make_engine, make_request, run, toy_model

PAGES, LENGTH = 60, 24
LIMITS = Limits(8, 48, LENGTH)
rows = st.lists(st.tuples(st.integers(1, 9), st.integers(0, LENGTH - 9)), min_size=1, max_size=8)


class Counting(EagerRecorder):
    """Notes how often anything was recorded, and played."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        again = super().record(call)

        def play() -> Any:
            self.played += 1
            return again()

        return play


@pytest.fixture(scope="module")
def recorded() -> Any:
    """Graphs, their store, and a second store for the model itself."""
    model = toy_model()
    stores = [written_store(model.info, PAGES) for _ in range(2)]
    return model, StepGraphs(model, stores[0], (0, 1), LIMITS, EagerRecorder()), *stores


@settings(max_examples=80, deadline=None)
@given(rows, st.integers(0, 5))
def test_steps_one_after_the_other_have_the_bits_of_the_model(recorded: Any, shape: list[Any], seed: int) -> None:
    """Hypothesis brings steps of all sizes in any order, and whatever they leave behind is the next one's to cope with.

    Stores are not made anew either: contexts are what the steps before wrote.
    """
    model, graphs, store, plain = recorded
    step = ragged_step(shape, PAGES, VOCAB, seed)
    want = model.forward(step, plain, (0, 1))
    got = graphs.run(step)
    if len(step.token_ids) > 48:
        assert got is None
        for tensor, other in zip((*store.keys, *store.values), (*plain.keys, *plain.values), strict=True):
            tensor[1:] = other[1:]
        return
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.taps, want.taps)
    for tensor, other in zip((*store.keys, *store.values), (*plain.keys, *plain.values), strict=True):
        assert torch.equal(tensor[1:], other[1:])


def test_garbage_on_page_0_reaches_nobody() -> None:
    """Nor does what earlier steps left in the buffers: theirs is as good as NaN."""
    model = toy_model()
    store, plain = (written_store(model.info, PAGES) for _ in range(2))
    graphs = StepGraphs(model, store, (), LIMITS, EagerRecorder())
    for tensor in (*store.keys, *store.values):
        tensor[0] = torch.nan
    for shape in ([(9, 15)] * 4, [(1, 3)], [(1, 23), (2, 0)], [(1, 1)] * 5):
        step = ragged_step(shape, PAGES, VOCAB, 3)
        got = graphs.run(step)
        assert got is not None
        assert torch.equal(got.logits, model.forward(step, plain).logits)


def test_a_size_serves_all_counts_up_to_it() -> None:
    model, recorder = toy_model(), Counting()
    graphs = StepGraphs(model, written_store(model.info, PAGES), (), LIMITS, recorder)
    assert graphs.sizes == (1, 2, 4, 8, 16, 24, 32, 48)
    assert recorder.recorded == len(graphs.sizes)
    sizes = []
    for item in graphs._recorded:
        item.inputs.fill = lambda batch, fill=item.inputs.fill, size=item.inputs.tokens: (
            sizes.append(size) or fill(batch)
        )
    for count in range(1, 49):
        some = [(6, 2)] * (count // 6) + ([(count % 6, 1)] if count % 6 else [])
        assert graphs.run(ragged_step(some, PAGES, VOCAB)) is not None
    assert recorder.played == 48
    assert sizes == [next(size for size in graphs.sizes if size >= count) for count in range(1, 49)]


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what waits for the device, and what makes a tensor of host values: a graph would hold those for good."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "_unique2"), name
        return func(*args, **(kwargs or {}))


class Strict(EagerRecorder):
    """What is recorded must be the same operations on the same memory whatever the step."""

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        call()  # once, so that what is made on first use is there

        def play() -> Any:
            with NothingFromTheHost():
                return call()

        return play


def addresses(batch: StepBatch) -> list[int]:
    return [t.data_ptr() for t in (batch.token_ids, batch.positions, batch.slots, batch.page_table, batch.spans)]


def test_a_recording_takes_nothing_from_the_host_and_finds_its_inputs_where_they_were() -> None:
    model = toy_model()
    seen: list[list[int]] = []
    trunk = model.trunk

    class Watched:
        info, device, recordable, logits = model.info, model.device, model.recordable, model.logits

        def trunk(self, batch: StepBatch, *rest: Any) -> Any:
            seen.append(addresses(batch))
            return trunk(batch, *rest)

    graphs = StepGraphs(Watched(), written_store(model.info, PAGES), (1,), Limits(8, 4, LENGTH), Strict())  # type: ignore[arg-type]
    recorded = seen[::-1]  # largest first
    seen.clear()
    tables = model._rotary.table(1).data_ptr()
    for shape in ([(1, 5)], [(1, 0), (1, 8)], [(3, 15)], [(4, 20)]):
        assert graphs.run(ragged_step(shape, PAGES, VOCAB)) is not None
    assert seen == [recorded[0], recorded[1], recorded[2], recorded[2]]
    assert model._rotary.table(LENGTH).data_ptr() == tables
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingFromTheHost():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="lift_fresh"), NothingFromTheHost():
        torch.tensor([1])


def test_a_model_in_plain_torch_is_refused() -> None:
    model = toy_model(kernels="torch")
    store = written_store(model.info, PAGES)
    assert not model.recordable(store)
    with pytest.raises(ValueError, match="plain torch"):
        StepGraphs(model, store, (), LIMITS, EagerRecorder())


@pytest.fixture(scope="module", params=[0.0, 0.8])
def plain(request: pytest.FixtureRequest) -> Any:
    """Requests, and the answer to each of them alone."""

    def requests() -> list[Any]:
        params = {"temperature": request.param, "max_tokens": 14, "logprobs": 2, "ignore_eos": True}
        return [make_request(f"r{i}", prompt, seed=i, **params) for i, prompt in enumerate(ragged_prompts(VOCAB))]

    alone = [run(make_engine(toy_model(), page_size=PAGE, prefix_caching=False), [each]) for each in requests()]
    for other in alone[1:]:
        alone[0].tokens |= other.tokens
        alone[0].logprobs |= other.logprobs
    return requests, alone[0]


@pytest.mark.parametrize("drafter", ["none", "ngram", "right", "wrong", "random"])
@pytest.mark.parametrize("situation", ["batch", "preemption", "prefix", "chunk7", "few"])
def test_the_engine_says_the_same(plain: Any, drafter: str, situation: str) -> None:
    requests, expected = plain
    truth = {r.request_id: [*r.prompt_token_ids, *expected.tokens[r.request_id]] for r in requests()}
    options: dict[str, Any] = {
        "preemption": {"pages": 30, "prefix_caching": False},
        "chunk7": {"chunk": 7},
        "few": {"seqs": 2, "tokens": 9},
    }.get(situation, {})
    recorder = Counting()
    made = drafter_named(drafter, truth)
    engine = make_engine(toy_model(), made, page_size=PAGE, length=64, recorder=recorder, **options)
    engine.runner.store.keys[0][0] = torch.nan
    if situation == "prefix":
        run(engine, requests())
    got = run(engine, requests())
    assert got == expected
    assert recorder.played > 2
    if situation == "preemption":
        assert got.preemptions > 0


def test_prompts_that_are_scored_and_steps_that_are_too_long(plain: Any) -> None:
    """Scores are the LM head's, which is not recorded; a long prompt runs launch by launch beside nobody."""
    model, recorder = toy_model(), Counting()
    prompts = ragged_prompts(VOCAB)
    long = torch.arange(60).remainder(VOCAB).tolist()

    def requests() -> list[Any]:
        params = {"max_tokens": 5, "prompt_logprobs": 1, "logprobs": 1}
        return [make_request(f"r{i}", prompt, seed=i, **params) for i, prompt in enumerate([*prompts[:3], long])]

    want = run(make_engine(model, page_size=PAGE), requests())
    engine = make_engine(model, page_size=PAGE, tokens=80, recorder=recorder)
    engine.runner.graphs.sizes = (1, 2, 4, 8)  # as if nothing larger had been recorded
    steps = 0
    forward = engine.runner.model.forward

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def forward(self, *args: Any) -> Any:
            nonlocal steps
            steps += 1
            return forward(*args)

    engine.runner.model = Counted()
    got = run(engine, requests())
    assert (got.tokens, got.logprobs, got.prompt_logprobs) == (want.tokens, want.logprobs, want.prompt_logprobs)
    assert steps > 0 < recorder.played
