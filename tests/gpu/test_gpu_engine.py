"""The engine that `--kernels triton` makes, on the device: against that of `--kernels torch`, with and without drafts.

Torch's products on a GPU are not bitwise row-invariant, so no bits are promised here. In float32 their differences are
a millionth of the distance between tokens, and texts must be equal; in bfloat16 they must agree as far as they go
together, and how far that is gets reported as a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_KERNELS, REHEARSAL
from shapes import QWEN3_4B, Shape, write_checkpoint

from dspark_serve.config import Config
from dspark_serve.engine import build
from dspark_serve.types import Request, SamplingParams
from tests.toy_head import write_toy_head

pytestmark = ON_KERNELS
TOKENS = 4 if REHEARSAL else 48
LENGTHS = (1, 9, 14) if REHEARSAL else (1, 9, 40, 130, 17, 64, 3, 200)
TEMPERATURES = (1.5, 0.0, 0.8)
SHAPE = Shape(64, 96, 4, 2, 16, 300) if REHEARSAL else replace(QWEN3_4B, vocab=32_000)


@dataclass
class Served:
    """What came out, by request."""

    backend: str
    row_invariant: bool
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    kept: int = 0
    accepted: int = 0
    waits: list[int] = field(default_factory=list)  # of each step: how often torch made the host wait for the GPU


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of the target and of its head."""
    place = tmp_path_factory.mktemp("gpu_engine")
    target = write_checkpoint(place / "target", SHAPE, layers=2)
    return target, write_toy_head(place / "head", target)


@pytest.fixture(autouse=True)
def _own_memory(monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path]) -> None:
    """What start-up checks found is remembered, but not from another run."""
    monkeypatch.setenv("DSPARK_CACHE", str(files[0].parent))
    if REHEARSAL:  # test_interpreted_engine.py lets it look; every engine of another kind would take minutes for it
        monkeypatch.setattr(build, "row_variance", lambda model, page_size: None)


def serve(
    files: tuple[Path, Path],
    dtype: str,
    kernels: str = "triton",
    drafts: bool = True,
    temperatures: tuple[float, ...] = TEMPERATURES,
    **speculation: object,
) -> Served:
    """All prompts together, through an engine made from options alone."""
    head = {"head": str(files[1]), "budget": "full", "head_self_test": False}
    options = {
        "model": {"model": str(files[0]), "device": DEVICE.type, "dtype": dtype, "kernels": kernels},
        "cache": {"kv_cache_gib": 0.001 if REHEARSAL else 0.25},
        "speculation": {**(head if drafts else {"method": "none"}), **speculation},
    }
    engine = build.build_engine(Config.model_validate(options))
    got = Served(engine.info.backend, engine.info.row_invariant)
    generator = torch.Generator().manual_seed(3)
    for index, count in enumerate(LENGTHS):
        prompt = tuple(torch.randint(3, SHAPE.vocab, (count,), generator=generator).tolist())
        warmth = temperatures[index % len(temperatures)]
        params = SamplingParams(temperature=warmth, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
        engine.add(Request(str(index), prompt, params, seed=index))
    while engine.has_work:
        with _waits_counted(got.waits):
            report = engine.step()
        engine.check_integrity()
        got.kept += sum(row.n_kept for row in report.rows)
        got.accepted += sum(row.n_accepted for row in report.rows)
        for delta in report.deltas:
            got.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            got.logprobs.setdefault(delta.request_id, []).extend(entry.logprob for entry in delta.logprobs)
    assert [len(tokens) for tokens in got.tokens.values()] == [TOKENS] * len(LENGTHS)
    return got


@contextmanager
def _waits_counted(found: list[int]) -> Iterator[None]:
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))


def test_greedy_text_is_that_of_torch(files: tuple[Path, Path]) -> None:
    torchs, ours = (serve(files, "float32", kernels, False, (0.0,)) for kernels in ("torch", "triton"))
    assert ours.backend.startswith("triton float32")
    assert "triton" not in torchs.backend
    assert ours.tokens == torchs.tokens
    for name, logprobs in torchs.logprobs.items():
        assert ours.logprobs[name] == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_drafts_are_accepted_as_torch_accepts_them(files: tuple[Path, Path], mode: str) -> None:
    """The same head, noise and rule: the same texts from as many drafts."""
    torchs, ours = (serve(files, "float32", kernels, verify_mode=mode) for kernels in ("torch", "triton"))
    assert ours.tokens == torchs.tokens
    assert (ours.kept, ours.accepted) == (torchs.kept, torchs.accepted)
    assert 0 < ours.accepted < ours.kept


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_drafts_change_no_text(files: tuple[Path, Path], dtype: str, tolerance: float) -> None:
    """Coupled speculation on and off at the same seeds."""
    off, on = serve(files, dtype, drafts=False), serve(files, dtype)
    assert on.backend.startswith(f"triton {dtype}")
    assert 0 < on.accepted < on.kept
    equal = 0
    for name, wanted in off.tokens.items():
        pairs = list(zip(wanted, on.tokens[name], strict=True))
        together = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
        equal += together == len(pairs)
        assert on.logprobs[name][:together] == pytest.approx(off.logprobs[name][:together], abs=tolerance)
    if dtype == "float32" or on.row_invariant:
        assert on.tokens == off.tokens
    elif equal < len(LENGTHS):
        warnings.warn(
            f"{dtype} on {DEVICE.type}: {equal} of {len(LENGTHS)} texts of {TOKENS} tokens are the same with and "
            "without drafts; the others part where rounding decides",
            stacklevel=1,
        )


@pytest.mark.skipif(REHEARSAL, reason="needs a CUDA GPU: a CPU is not waited for")
@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("budget", ["full", "auto"])
def test_a_step_waits_for_what_it_brings_back(files: tuple[Path, Path], mode: str, budget: str) -> None:
    """Tokens, with what a budget goes by next, and the log-probabilities that these requests ask for. The first steps
    set things up."""
    assert set(serve(files, "bfloat16", verify_mode=mode, budget=budget).waits[3:]) == {2}


@pytest.mark.skipif(REHEARSAL, reason="needs a CUDA GPU: interpreted, measuring what steps cost takes minutes")
def test_the_budget_measures_and_decides(files: tuple[Path, Path]) -> None:
    """As a server starts: a self-test of the head, a sweep over steps, a budget that may draft nothing."""
    decided = serve(files, "bfloat16", budget="auto", head_self_test=True)
    assert decided.kept >= decided.accepted >= 0
