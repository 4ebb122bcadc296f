"""Training away from main memory: on a pretended device, whose tensors do not mix with others, and which one it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stand_in import DEVICE, ThereTensor, stand_in
from tiny_graft import SHAPE, TRAIN, assert_same_signals, check_states, make, opened, write_text
from typer.testing import CliRunner

from dspark_serve.cli import app
from dspark_serve.training.device import training_device
from dspark_serve.training.graft import Grafter
from dspark_serve.training.progress import Rates
from dspark_serve.training.report import calibrate_head


@pytest.fixture
def pretended(monkeypatch):
    with stand_in(monkeypatch) as device:
        yield device


def losses(grafter: Grafter, count: int) -> list[float]:
    return [float(grafter.step().loss.detach()) for _ in range(count)]


def weights_of(grafter: Grafter) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in grafter.head.named_parameters()}


def assert_same(one: Grafter, other: Grafter) -> None:
    for (name, a), b in zip(weights_of(one).items(), weights_of(other).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_pretended_device_refuses_what_a_gpu_refuses(pretended):
    x = torch.arange(4.0, device=pretended)
    assert type(x + 1) is type(x * torch.tensor(2.0)) is ThereTensor
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert x.device == DEVICE
    with pytest.raises(AssertionError, match="mixes devices"):
        x + torch.arange(4)
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()


# The whole vocabulary takes other paths than a draft vocabulary, and a plain head than one with all its parts.
@pytest.mark.parametrize(
    "shape",
    [SHAPE, replace(SHAPE, variant="dflash"), replace(SHAPE, draft_vocab=None, kv_heads=2)],
    ids=["dspark", "dflash", "whole"],
)
def test_updates_evaluation_and_export_stay_on_their_device(model, written, tmp_path, pretended, shape):
    """Past the switch of losses, so that every one of them is met."""
    options = replace(TRAIN, trained_tokens=100)
    there, here = (make(model, written, options, device, shape) for device in (pretended, "cpu"))
    assert {type(p.data) for p in there.head.parameters()} == {ThereTensor}
    assert losses(there, 6) == pytest.approx(losses(here, 6), rel=1e-5)
    assert_same(there, here)
    assert_same_signals(there, here, 1e-5)
    assert there.evaluate() == here.evaluate()
    told: dict[torch.device, list[str]] = {}
    for grafter in (there, here):
        device = grafter.weights.device
        grafter.export(tmp_path / str(device), grafter.evaluate(), Rates(1.0, 2.0, 3.0, None))
        calibrate_head(tmp_path / str(device), grafter.source, grafter.weights, told.setdefault(device, []).append)
    assert told[DEVICE] == told[torch.device("cpu")] != []


def test_a_checkpoint_goes_on_elsewhere(model, written, tmp_path, pretended):
    whole = make(model, written, TRAIN)
    expected = losses(whole, 6)
    first = make(model, written, TRAIN)
    losses(first, 2)
    first.save(tmp_path)
    found: list[float] = []
    for device in (pretended, torch.device("cpu")):
        source, weights = opened(model, written, device)
        grafter = Grafter.resume(TRAIN, source, weights, tmp_path)
        assert {p.device for p in grafter.head.parameters()} == {device}
        states = [tensor for state in grafter.optimizer.state.values() for tensor in state.values()]
        assert {tensor.device for tensor in states} == {device}
        found += losses(grafter, 2)
        grafter.save(tmp_path)
    assert found == pytest.approx(expected[2:], rel=1e-5)
    assert_same(grafter, whole)


def test_the_target_writes_on_its_device(model, tmp_path, pretended, capsys):
    assert write_text(model, tmp_path, 300, str(pretended)) >= 300
    assert f"the target writes on {pretended}, float32" in capsys.readouterr().out
    check_states(model, tmp_path)


def gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_which_device(monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    gpus(monkeypatch, 0)
    assert training_device("auto") == training_device("cpu") == torch.device("cpu")
    gpus(monkeypatch, 4)
    assert training_device("cpu") == torch.device("cpu")
    assert training_device("auto") == training_device("cuda") == torch.device("cuda:0")
    assert training_device("cuda:3") == torch.device("cuda:3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert training_device("auto") == training_device("cuda") == torch.device("cuda:2")
    assert training_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("cuda", 0, "device cuda was asked for, but this torch sees no GPU"),
        ("cuda", 2, "process 2 has no GPU of its own, as torch sees 2: start no more than 2 here"),
        ("cuda:3", 2, "device cuda:3 was asked for, but torch sees 2 GPUs"),
        ("cuda:1", 2, "several processes take a GPU each: say device cuda"),
        ("gpu", 2, "'gpu' is no device; use auto, cpu or cuda"),
        ("meta", 2, "training runs on cpu or cuda, not on meta"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, model, tmp_path, name, count, said):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    gpus(monkeypatch, count)
    for arguments in (
        ["graft", str(model), "--out", str(tmp_path), "--device", name],
        ["calibrate", str(model), "--head", str(tmp_path), "--records", str(tmp_path), "--device", name],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert said in result.stderr
    assert not list(tmp_path.iterdir())
