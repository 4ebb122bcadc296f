"""Two processes train one head: the same weights in both, from gradients of both, and files from the first only."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from test_graft import SHAPE, TRAIN, model, written  # noqa: F401 - fixtures

from dspark_serve.training.command import GraftOptions, begin, graft, head_config
from dspark_serve.training.graft import BEST, CHECKPOINT, Grafter
from dspark_serve.training.parallel import ALONE, joined
from dspark_serve.training.passages import PassageSource
from dspark_serve.training.target import TargetWeights


def run_in_two(function, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(_as_rank, (port, function, arguments), nprocs=2)


def _as_rank(rank, port, function, arguments):
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(rank, *arguments)


def flat(grafter):
    return torch.cat([p.detach().flatten() for p in grafter.head.parameters()])


def train_some(rank, target, text, out):
    options = GraftOptions(str(target), out, replace(TRAIN, updates=40), SHAPE, records=text, write=False)
    weights = TargetWeights.load(target, SHAPE.layers)
    config = head_config(SHAPE, weights, target)
    with joined() as group:
        assert (group.rank, group.size, group.is_first) == (rank, 2, rank == 0)
        parameter = torch.nn.Parameter(torch.zeros(3))
        parameter.grad = torch.full((3,), 4.0 * rank)
        group.average_gradients([parameter, torch.nn.Parameter(torch.zeros(1))])
        assert parameter.grad.tolist() == [2.0] * 3
        said: list[str] = []
        grafter = begin(options, PassageSource(text, weights, config.taps), weights, config, group, said.append)
        assert bool(said) == group.is_first
        steps = [grafter.step() for _ in range(20)]
        own = set(grafter.order.seen)
        grafter.save(out)
        found = {
            "weights": flat(grafter),
            "losses": [float(step.loss.detach()) for step in steps],
            "anchors": (sum(step.anchors for step in steps), grafter.anchors),
            "own": own,
        }
        torch.save(found, out / f"rank{rank}.pt")


def test_both_end_with_the_same_weights(model, written, tmp_path):  # noqa: F811
    run_in_two(train_some, model, written, tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one["weights"].equal(two["weights"])
    assert one["losses"] != two["losses"]  # on texts of their own
    assert not one["own"] & two["own"]
    for losses in (one["losses"], two["losses"]):
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert one["anchors"][1] == two["anchors"][1] == one["anchors"][0] + two["anchors"][0]
    # The checkpoint is one process's as well as two's, and no text counts as new that either has seen.
    weights = TargetWeights.load(model, SHAPE.layers)
    source = PassageSource(written, weights, head_config(SHAPE, weights, model).taps)
    resumed = Grafter.resume(TRAIN, source, weights, tmp_path)
    assert flat(resumed).equal(one["weights"])
    assert resumed.order.seen == one["own"] | two["own"]
    assert resumed.group == ALONE


def whole_command(rank, target, text, out):
    said: list[str] = []
    options = GraftOptions(str(target), out, TRAIN, SHAPE, records=text, write=False)
    found = graft(options, said.append)
    assert found == (out / BEST if rank == 0 else out)
    assert bool(said) == (rank == 0)


def test_the_command_in_two_processes(model, written, tmp_path):  # noqa: F811
    (tmp_path / BEST).mkdir()  # as an earlier run leaves it: the second process must not take it for its own
    run_in_two(whole_command, model, written, tmp_path)
    assert (tmp_path / CHECKPOINT).exists()
    assert (tmp_path / BEST / "report.json").exists()
    assert not [path for path in Path(tmp_path).rglob("*.partial")]


def test_a_process_without_text_says_so(model, written, tmp_path):  # noqa: F811
    weights = TargetWeights.load(model, SHAPE.layers)
    config = head_config(SHAPE, weights, model)
    source = PassageSource(written, weights, config.taps)
    grafter = Grafter.create(TRAIN, source, weights, config)
    grafter.group = replace(ALONE, rank=1, size=10_000)
    with pytest.raises(ValueError, match="no text for process 1 of 10000"):
        grafter.step()
