"""A head's pass over a block, recorded: the same bits for rows of any number, and of the engine's text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.dspark import DSparkDrafter
from dspark_serve.drafters.heads import plan_head
from dspark_serve.drafters.rows import DraftRows
from dspark_serve.engine import build
from dspark_serve.engine.graph_check import with_block_graphs
from dspark_serve.engine.graphs import BlockGraphs
from dspark_serve.engine.padding import Limits, tiers
from dspark_serve.engine.recorders import EagerRecorder
from dspark_serve.llm import LLM, SamplingParams
from dspark_serve.tensors import SamplingBatch
from tests.drafters.golden import GOLDENS, golden_target
from tests.engine.test_graph_check import Broken
from tests.engine.test_graphs import Counting, Strict

HEADS = ["dspark_vanilla", "dspark_rnn", "dflash"]
PAGE, PAGES, LIMITS = 4, 40, Limits(11, 11, 60)


class Fixed:
    """A head's own pass over a store in which everything is written, and what recording it came to."""

    def __init__(self, head: str) -> None:
        target = golden_target()
        plan = plan_head(GOLDENS / head, target, "coupled")
        self.store = KVStore((*target.info.kv_layers, *plan.kv_layers), PAGES, PAGE)
        self.refill()
        self.passes: list[Callable[[DraftRows], torch.Tensor]] = []
        drafter = plan.make(self.store, len(target.info.kv_layers), self.passes.append)  # type: ignore[arg-type]
        assert isinstance(drafter, DSparkDrafter)
        drafter._head.__dict__["native"] = None  # layer after layer, as on a GPU
        [self.block] = self.passes

    def refill(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for tensor in (*self.store.keys, *self.store.values):
            tensor.normal_(generator=generator)

    def tensors(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in (*self.store.keys, *self.store.values)]


def draft_rows(starts: list[int], seed: int) -> DraftRows:
    generator = torch.Generator().manual_seed(seed)
    longest = max(starts)
    pages = torch.zeros(len(starts), DraftRows.width(longest, PAGE), dtype=torch.int64)
    for line, start in zip(pages, starts, strict=True):
        count = -(-start // PAGE)
        line[:count] = torch.randperm(PAGES - 1, generator=generator)[:count] + 1
    return DraftRows(
        anchors=torch.randint(0, 90, (len(starts),), generator=generator),
        start=torch.tensor(starts),
        pages=pages,
        page_size=PAGE,
        counts=(1,) * len(starts),
        longest=longest,
        sampling=SamplingBatch.none(torch.device("cpu")),
    )


@pytest.mark.parametrize("head", HEADS)
def test_rows_of_any_number_have_their_bits(head: str) -> None:
    """One after the other, so that each finds what the ones before left; and nothing is written to the store."""
    fixed, recorder = Fixed(head), Counting()
    graphs = BlockGraphs(fixed.block, fixed.store, LIMITS, recorder)
    assert graphs.sizes == (1, 2, 4, 8, 11)
    before = fixed.tensors()
    draw = torch.Generator().manual_seed(2)
    for turn, count in enumerate([11, 1, 3, 9, 2, 5, 8, 4, 10, 7, 6]):
        rows = draft_rows(torch.randint(0, 60, (count,), generator=draw).tolist(), turn)
        assert torch.equal(graphs(rows), fixed.block(rows)), count
    assert recorder.played == 11
    assert all(torch.equal(a, b) for a, b in zip(before, fixed.tensors(), strict=True))
    more = draft_rows([4] * 12, 0)
    assert torch.equal(graphs(more), fixed.block(more))
    assert recorder.played == 11  # twelve rows are more than were recorded


def test_garbage_on_page_0_reaches_nobody() -> None:
    fixed = Fixed("dspark_vanilla")
    graphs = BlockGraphs(fixed.block, fixed.store, LIMITS, Strict())
    rows = draft_rows([59, 0, 7], 3)
    want = fixed.block(rows)
    for tensor in (*fixed.store.keys, *fixed.store.values):
        tensor[0] = torch.nan
    assert torch.equal(graphs(rows), want)


def test_what_holds_is_used_and_what_does_not_is_not() -> None:
    fixed = Fixed("dspark_vanilla")

    def outcome(recorder: EagerRecorder) -> tuple[Any, tuple[str, ...]]:
        return with_block_graphs(fixed.block, fixed.store, 90, LIMITS, recorder)

    graphs, warnings = outcome(EagerRecorder())
    assert isinstance(graphs, BlockGraphs)
    assert warnings == ()
    assert not any(bool(tensor[:5].any()) for tensor in fixed.tensors())

    def stale(play: Any) -> Any:
        result = play().clone()
        return lambda: result

    def swapped(play: Any) -> Any:
        return lambda: play().roll(1, 0)

    def refused(play: Any) -> Any:
        raise RuntimeError("out of memory")

    for spoil, good, words in (
        (stale, 0, "CUDA graphs of up to 1 drafting rows differ from the same steps without: hidden states by"),
        (swapped, 0, "CUDA graphs of up to 2 drafting rows differ"),
        (swapped, 1, "CUDA graphs of up to 2 drafting rows differ"),
        (refused, 3, "CUDA graphs could not be recorded (out of memory); serving without them"),
    ):
        block, [warning] = outcome(Broken(spoil, good))
        assert block is fixed.block
        assert warning.startswith(words)


@pytest.mark.parametrize("head", [*HEADS, "eagle3", "portfolio"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_engine_drafts_the_same(head: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE-3's chain is not recorded; the target beneath it is."""
    name, method = ("dspark_vanilla", "portfolio") if head == "portfolio" else (head, None)
    prompts = [{"prompt_token_ids": [5 + i, 6, 7, 8] * (1 + i)} for i in range(5)]
    params = SamplingParams(temperature=temperature, max_tokens=20, seed=3, ignore_eos=True)

    def serve(recorder: Any) -> Any:
        monkeypatch.setattr(build, "_recorder", lambda device: recorder)
        llm = LLM(
            str(GOLDENS / "target"), head=str(GOLDENS / name), method=method, kv_cache_gib=0.01, max_num_seqs=3,
            budget="full", head_self_test=False,
        )  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
        spoken = [output.outputs[0].metrics.speculative_decoding for output in outputs]
        counts = [(stats.num_draft_tokens, stats.num_accepted_tokens) for stats in spoken]
        return llm.info, [output.outputs[0].token_ids for output in outputs], counts

    info, texts, counts = serve(None)
    recorder = Counting()
    recorded, same, same_counts = serve(recorder)
    assert (same, same_counts) == (texts, counts)
    assert sum(drafts for drafts, _ in counts) > 0
    assert (info.graph_tokens, recorded.warnings) == (0, ())
    blocks = 0 if head == "eagle3" else 3  # of 1, 2 and 3 rows
    steps = 3 * (1 + recorded.num_speculative_tokens)
    assert recorded.graph_tokens == steps
    assert recorder.recorded == blocks + len(tiers(steps))


def test_a_block_that_does_not_hold_is_drafted_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_recorder", lambda device: OnlyBlocks())
    llm = LLM(
        str(GOLDENS / "target"), head=str(GOLDENS / "dspark_vanilla"), kv_cache_gib=0.01, max_num_seqs=3, budget="full"
    )
    assert [warning[:22] for warning in llm.info.warnings] == ["CUDA graphs of up to 1"]
    assert llm.info.graph_tokens > 0
    [output] = llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=9), use_tqdm=False)
    assert output.outputs[0].metrics.speculative_decoding.num_draft_tokens > 0


class OnlyBlocks(EagerRecorder):
    """Breaks what gives one tensor, as a drafter's pass does."""

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        play = super().record(call)
        return play if isinstance(play(), tuple) else lambda: play() * torch.nan
