"""The whole engine as `--kernels triton` makes it: speculation, neighbours and chunks change no bit of plain decoding.

A small random Qwen3 with a random DSpark head, served through Triton's interpreter, against itself without drafts and
against the engine that `--kernels torch` makes of the same files. Which kernels ran is counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from dspark_kernels.triton import norms
from dspark_serve.config import Config
from dspark_serve.drafters.base import DrafterPlan
from dspark_serve.drafters.heads import plan_head
from dspark_serve.engine.build import build_engine
from dspark_serve.models.base import TargetModel
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.types import Request, VerifyMode
from tests.toy import Collected, drafter_named, make_engine, make_request, run
from tests.toy_head import write_toy_head

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from shapes import Shape, write_checkpoint

SHAPE = Shape(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=120)
LENGTHS, TEMPERATURES = [1, 9, 12, 17], [1.5, 0.8, 2.0, 0.0]
TOKENS = 5
LAYERS = {"rms_norm_kernel", "swiglu_kernel", "rope_kernel", "attention_kernel"}
COUPLED = {"scan_kernel", "coupled_kernel"}
REJECTION = {"mass_kernel", "rejection_kernel", "residual_kernel", "append_kernel"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of the target and of its head."""
    place = tmp_path_factory.mktemp("toy")
    target = write_checkpoint(place / "target", SHAPE, layers=2)
    return target, write_toy_head(place / "head", target)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of every kernel, by name."""
    found: Counter[str] = Counter()
    launch = InterpretedFunction.run

    def counted(self: InterpretedFunction, *args: object, **options: object) -> object:
        found[self.fn.__name__] += 1
        return launch(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return found


@cache
def model(target: Path, kernels: str) -> TargetModel:
    return load_model(resolve(str(target)), "float32", "cpu", kernels=kernels)


@cache
def head(files: tuple[Path, Path], kernels: str, mode: VerifyMode) -> DrafterPlan:
    return plan_head(files[1], model(files[0], kernels), mode)


def requests(rows: tuple[int, ...] = (0, 1, 2, 3)) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, SHAPE.vocab, (count,), generator=generator).tolist() for count in LENGTHS]
    options = {"max_tokens": TOKENS, "logprobs": 0, "ignore_eos": True}
    return [make_request(f"r{i}", prompts[i], seed=i, temperature=TEMPERATURES[i], **options) for i in rows]


def serve(target: TargetModel, drafter: object, some: list[Request], **options: object) -> Collected:
    engine = make_engine(target, drafter, page_size=4, pages=80, prefix_caching=False, **options)
    if target.info.kernels == "triton":  # torch multiplies what it does not need by zero
        for tensor in (*engine.runner.store.keys, *engine.runner.store.values):
            tensor.fill_(torch.nan)  # whatever is read has been written
    return run(engine, some)


@pytest.fixture(scope="module")
def plain(files: tuple[Path, Path]) -> Collected:
    """Each request alone, without drafts, its prompt in one piece."""
    whole = Collected()
    for request in requests():
        got = serve(model(files[0], "triton"), None, [request])
        whole.tokens |= got.tokens
        whole.logprobs |= got.logprobs
    return whole


def test_plain_decoding_says_what_torch_says(files: tuple[Path, Path], plain: Collected) -> None:
    torchs = serve(model(files[0], "torch"), None, requests())
    assert torchs.tokens == plain.tokens
    for name, logprobs in torchs.logprobs.items():
        assert plain.logprobs[name] == pytest.approx(logprobs, abs=1e-4)
    assert len({tuple(tokens) for tokens in plain.tokens.values()}) == len(LENGTHS)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("drafter", ["none", "right", "random", "head", "ahead"])
def test_same_bits(
    files: tuple[Path, Path], plain: Collected, drafter: str, chunk: int | None, launched: Counter[str]
) -> None:
    """Drafts are "ahead" where the head makes them at the end of the step before."""
    if drafter in ("head", "ahead"):
        made: object = head(files, "triton", "coupled")
    else:
        truth = {r.request_id: [*r.prompt_token_ids, *plain.tokens[r.request_id]] for r in requests()}
        made = drafter_named(drafter, truth, SHAPE.vocab)
    got = serve(model(files[0], "triton"), made, requests(), chunk=chunk, ahead=drafter == "ahead")
    assert got == plain
    assert set(launched) == LAYERS | COUPLED | ({"markov_kernel"} if drafter in ("head", "ahead") else set())
    if drafter == "right":
        assert got.accepted == got.kept > 0
    elif drafter != "none":
        assert 0 < got.accepted < got.kept


@pytest.mark.parametrize("drafter", ["head", "ahead", "random"])
def test_rejection_is_that_of_the_torch_engine(
    files: tuple[Path, Path], plain: Collected, drafter: str, launched: Counter[str]
) -> None:
    """The same draws from the same distributions: drafts of a head, and certain ones."""
    truth = {r.request_id: [*r.prompt_token_ids, *plain.tokens[r.request_id]] for r in requests()}
    both = []
    for kernels in ("torch", "triton"):
        made = drafter_named("random", truth, SHAPE.vocab) if drafter == "random" else head(files, kernels, "rejection")
        served = serve(model(files[0], kernels), made, requests(), mode="rejection", ahead=drafter == "ahead")
        both.append(served)
    torchs, got = both
    assert got.tokens == torchs.tokens
    assert (got.accepted, got.kept) == (torchs.accepted, torchs.kept)
    assert 0 < got.accepted < got.kept
    assert set(launched) == LAYERS | REJECTION | (set() if drafter == "random" else {"markov_kernel"})


def test_drafts_and_confidences_are_those_of_the_torch_engine(files: tuple[Path, Path]) -> None:
    """What the head proposes for rows of mixed temperatures: its layers, its context and its sampler at once."""
    proposals = []
    for kernels in ("torch", "triton"):
        engine = make_engine(model(files[0], kernels), head(files, kernels, "coupled"), page_size=4, pages=80)
        for request in requests():
            engine.add(request)
        engine.step()
        rows = [row for row in engine.scheduler.plan().rows if row.max_drafts > 0]
        proposals.append(engine.drafter.propose(rows))
    torchs, got = proposals
    assert len(got.n_draft) == len(LENGTHS)
    assert got.tokens.tolist() == torchs.tokens.tolist()
    torch.testing.assert_close(got.confidence, torchs.confidence, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.largest, torchs.largest, atol=1e-5, rtol=1e-4)


def test_an_engine_by_its_options(
    files: tuple[Path, Path], plain: Collected, launched: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The composition root with nothing but options: it says what serves, and that rows are invariant."""
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    options = {
        "model": {"model": str(files[0]), "device": "cpu", "dtype": "float32", "kernels": "triton"},
        "cache": {"kv_cache_gib": 0.001, "page_size": 4},
        "speculation": {"head": str(files[1]), "budget": "full", "head_self_test": False},
    }
    engine = build_engine(Config.model_validate(options))
    assert engine.info.backend == "triton float32, weights in float32"
    assert engine.info.row_invariant
    launched.clear()
    some = requests((1, 2))
    got = run(engine, some)
    assert got.tokens == {request.request_id: plain.tokens[request.request_id] for request in some}
    assert got.accepted > 0
    assert set(launched) == LAYERS | COUPLED | {"markov_kernel"}


def test_a_broken_kernel_would_be_seen(
    files: tuple[Path, Path], plain: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison itself can fail: norms that look at how many rows there are."""
    intact = norms.rms_norm

    def broken(x: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = intact(x, *rest)
        return out * (1 + 1e-6 * len(x)), total

    monkeypatch.setattr(norms, "rms_norm", broken)
    assert serve(model(files[0], "triton"), None, requests((1, 2))).logprobs["r1"] != plain.logprobs["r1"]
