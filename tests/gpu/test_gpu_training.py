"""A head grafted on the device: the target writes there, losses are the CPU's, and either goes on with the other's.

Float32 on both sides; what differs is the order of sums, which Adam's first steps, all of one size, make more of.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, REHEARSAL
from tiny_graft import SHAPE, TRAIN, assert_same_signals, check_states, make, opened, write_text
from tiny_model import write_tiny_model
from two_processes import check_some, flat, run_in_two, train_some, whole_command

from dspark_serve.training.command import GraftOptions, graft, recalibrate
from dspark_serve.training.device import training_device
from dspark_serve.training.graft import BEST, Grafter

pytestmark = ON_GPU
THERE, HERE = DEVICE.type, "cpu"
TWO = pytest.mark.skipif(not REHEARSAL and torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
# Of a loss, over six updates. On a CPU, products and sums that are off by 1e-6 move the sixth by 1e-4.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("records")
    write_text(model, directory, 800, THERE)
    return directory


def losses(grafter: Grafter, count: int) -> list[float]:
    return [float(grafter.step().loss.detach()) for _ in range(count)]


def test_the_target_writes_there(model: Path, written: Path) -> None:
    check_states(model, written)


def test_losses_are_those_of_the_cpu(model: Path, written: Path) -> None:
    there, here = (make(model, written, TRAIN, training_device(name)) for name in (THERE, HERE))
    assert {p.device.type for p in there.head.parameters()} == {THERE}
    expected = losses(here, 6)
    found = losses(there, 6)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)  # before any update
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert_same_signals(there, here, 1e-2)


def test_the_same_seed_gives_the_same_head(model: Path, written: Path) -> None:
    one, two = (make(model, written, TRAIN, training_device(THERE)) for _ in range(2))
    assert losses(one, 6) == losses(two, 6)
    assert flat(one).equal(flat(two))


@pytest.mark.parametrize(("first", "second"), [(THERE, HERE), (HERE, THERE), (THERE, THERE)])
def test_a_checkpoint_goes_on_elsewhere(model: Path, written: Path, tmp_path: Path, first: str, second: str) -> None:
    expected = losses(make(model, written, TRAIN, training_device(first)), 6)
    broken = make(model, written, TRAIN, training_device(first))
    losses(broken, 3)
    broken.save(tmp_path)
    source, weights = opened(model, written, training_device(second))
    resumed = Grafter.resume(TRAIN, source, weights, tmp_path)
    assert {p.device.type for p in resumed.head.parameters()} == {second}
    found = losses(resumed, 3)
    assert found == (expected[3:] if first == second else pytest.approx(expected[3:], rel=TOLERANCE))


def test_from_nothing_to_a_calibrated_head(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = GraftOptions(
        str(model), tmp_path, replace(TRAIN, updates=3), SHAPE, first_tokens=900, rows=8, device=THERE
    )
    assert graft(options, said.append) == tmp_path / BEST
    facts = json.loads((tmp_path / BEST / "dspark.json").read_text())
    place = training_device(THERE)
    assert facts["training"]["device"] == str(place)
    assert facts["training"]["anchors_per_s"] > 0
    assert (facts["training"]["peak_device_gib"] is None) == (place.type == "cpu")
    assert any(f"trained on {place}: " in line for line in said)
    assert f"the target writes on {place}, float32" in (tmp_path / "records" / "write.log").read_text()
    recalibrate(str(model), tmp_path / BEST, tmp_path / "records", said.append, HERE)
    again = json.loads((tmp_path / BEST / "dspark.json").read_text())
    for mode, length in facts["expected_accepted_length"].items():
        assert again["expected_accepted_length"][mode] == pytest.approx(length, abs=0.05), mode
    assert again["training"] == facts["training"]


@TWO
def test_two_processes_on_a_gpu_each(model: Path, written: Path, tmp_path: Path) -> None:
    run_in_two(train_some, model, written, tmp_path, THERE)
    check_some(model, written, tmp_path)
    run_in_two(whole_command, model, written, tmp_path / "command", THERE)
    facts = json.loads((tmp_path / "command" / BEST / "dspark.json").read_text())
    assert (facts["training"]["processes"], facts["training"]["device"]) == (2, str(training_device(THERE)))
