"""The start-up comparison of recorded steps with the model: what passes, what it sees, and what happens then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dspark_serve.cache.store import KVStore
from dspark_serve.config import load_config
from dspark_serve.engine import build, padding
from dspark_serve.engine.graph_check import graph_fault, with_graphs
from dspark_serve.engine.graphs import StepGraphs
from dspark_serve.engine.padding import Limits
from dspark_serve.engine.recorders import EagerRecorder
from dspark_serve.engine.runner import Runner
from dspark_serve.llm import LLM, SamplingParams
from tests.drafters.golden import GOLDENS
from tests.engine.ragged import PAGE
from tests.toy import toy_model

LIMITS = Limits(8, 48, 64)
Play = Callable[[], Any]


class Broken(EagerRecorder):
    """Records its first `good` calls as it should, and lets `spoil` have the others; the largest size comes first."""

    def __init__(self, spoil: Callable[[Play], Play], good: int = 0) -> None:
        self._spoil, self._good = spoil, good

    def record(self, call: Play) -> Play:
        play = super().record(call)
        self._good -= 1
        return play if self._good >= 0 else self._spoil(play)


def stale(play: Play) -> Play:
    """What was recorded is what comes, whatever is asked."""
    hidden, taps = play()
    return lambda: (hidden, taps)


def swapped(play: Play) -> Play:
    """Rows change places."""

    def changed() -> Any:
        hidden, taps = play()
        return hidden.roll(1, 0), taps

    return changed


def of_nothing(play: Play) -> Play:
    def changed() -> Any:
        hidden, taps = play()
        return hidden * torch.nan, taps

    return changed


def wrong_taps(play: Play) -> Play:
    def changed() -> Any:
        hidden, taps = play()
        return hidden, None if taps is None else taps + 0.5

    return changed


def a_little_off(play: Play) -> Play:
    def changed() -> Any:
        hidden, taps = play()
        return hidden * (1 + 1e-6), taps

    return changed


def plain_runner(taps: tuple[int, ...] = (0, 1), pages: int = 80) -> Runner:
    model = toy_model()
    return Runner(model, KVStore(model.info.kv_layers, pages, PAGE), taps)


def test_what_is_right_passes_and_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    runner = plain_runner()
    recorded, warnings = with_graphs(runner, LIMITS, EagerRecorder())
    assert recorded.graphs is not None
    assert (recorded.model, recorded.store, recorded.taps, warnings) == (runner.model, runner.store, runner.taps, ())
    assert "8 graphs of up to 48 tokens" in caplog.text
    assert not any(bool(tensor.any()) for tensor in (*runner.store.keys, *runner.store.values))


@pytest.mark.parametrize("spoil", [stale, swapped, of_nothing, wrong_taps])
@pytest.mark.parametrize("good", [0, 6])
def test_what_is_wrong_is_seen_and_not_used(
    spoil: Callable[[Play], Play], good: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Every size is looked at: six good ones do not hide the two smallest. A step of one token has no rows to swap."""
    runner = plain_runner()
    served, [warning] = with_graphs(runner, LIMITS, Broken(spoil, good))
    assert served is runner
    assert served.graphs is None
    assert warning.startswith(f"CUDA graphs of steps of up to {2 if spoil is swapped else 1} tokens differ from")
    assert warning.endswith("; serving without them, slower")
    assert ("taps by" if spoil is wrong_taps else "logits by") in warning
    assert warning in caplog.text


def test_rounding_is_no_fault() -> None:
    served, warnings = with_graphs(plain_runner(), LIMITS, Broken(a_little_off))
    assert served.graphs is not None
    assert warnings == ()


def test_what_cannot_be_recorded_is_not() -> None:
    def refuse(play: Play) -> Play:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    runner = plain_runner()
    served, [warning] = with_graphs(runner, LIMITS, Broken(refuse, good=2))
    assert served is runner
    assert "could not be recorded (operation not permitted when stream is capturing); serving without" in warning


@pytest.mark.parametrize("part", ["positions", "slots", "spans", "page_table"])
def test_an_input_that_is_not_filled_in_is_seen(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = padding.StepInputs.fill

    def forgetful(self: padding.StepInputs, batch: Any) -> None:
        before = getattr(self.batch, part).clone()
        filled(self, batch)
        getattr(self.batch, part).copy_(before)

    monkeypatch.setattr(padding.StepInputs, "fill", forgetful)
    assert with_graphs(plain_runner(), LIMITS, EagerRecorder())[1]


@pytest.mark.parametrize(("seqs", "pages", "length"), [(1, 3, 8), (3, 4, 5), (16, 6, 64), (64, 500, 1000)])
def test_pools_and_models_of_any_size(seqs: int, pages: int, length: int) -> None:
    runner = plain_runner((), pages)
    limits = Limits(seqs, min(48, (pages - 1) * PAGE), length)
    graphs = StepGraphs(runner.model, runner.store, (), limits, EagerRecorder())  # type: ignore[arg-type]
    assert graph_fault(Runner(runner.model, runner.store, (), graphs), limits) is None


def test_a_model_that_cannot_be_recorded_is_served_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = toy_model(kernels="torch")
    runner = Runner(model, KVStore(model.info.kv_layers, 80, PAGE))
    assert with_graphs(runner, LIMITS, EagerRecorder()) == (runner, ())
    assert "no CUDA graphs: attention of LlamaForCausalLM runs in plain torch" in caplog.text


def served(monkeypatch: pytest.MonkeyPatch, recorder: EagerRecorder | None, **options: Any) -> tuple[Any, Any]:
    """Facts and texts of an engine that is built as on a GPU, with this recorder."""
    monkeypatch.setattr(build, "_recorder", lambda device: recorder)
    llm = LLM(str(GOLDENS / "target"), kv_cache_gib=0.01, max_num_seqs=6, method="ngram", budget="full", **options)
    prompts = [{"prompt_token_ids": [5, 6, 7, 8] * n} for n in (1, 2, 3)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=12, seed=3), use_tqdm=False)
    return llm.info, [output.outputs[0].token_ids for output in outputs]


def test_the_engine_is_built_with_graphs_that_hold_and_without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, text = served(monkeypatch, None)
    assert (plain.graph_tokens, plain.warnings) == (0, ())
    info, same = served(monkeypatch, EagerRecorder())
    assert (info.graph_tokens, info.warnings, same) == (6 * (1 + 4), (), text)
    info, same = served(monkeypatch, Broken(stale))
    assert (info.graph_tokens, same) == (0, text)
    assert [sentence.startswith("CUDA graphs") for sentence in info.warnings] == [True]
    info, same = served(monkeypatch, Broken(stale), enforce_eager=True)
    assert (info.graph_tokens, info.warnings, same) == (0, (), text)


def test_only_cuda_is_recorded() -> None:
    assert build._recorder(torch.device("cpu")) is None
    assert load_config({"enforce_eager": True}).engine.enforce_eager
