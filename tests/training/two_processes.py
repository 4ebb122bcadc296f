"""Two processes that train one head: how they are started, what each does, and what must hold of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from tiny_graft import SHAPE, TRAIN, opened

from dspark_serve.training.command import GraftOptions, begin, graft, head_config
from dspark_serve.training.device import training_device
from dspark_serve.training.graft import BEST, Grafter
from dspark_serve.training.parallel import joined


def run_in_two(function: Callable[..., None], *arguments: Any) -> None:
    """function(rank, *arguments) in two processes with torchrun's environment. Raises when one of them does.

    As there, the processes meet at a store of the one that starts them: its port is taken before anybody is told of it.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes.spawn(_as_rank, (store.port, function, arguments), nprocs=2)


def _as_rank(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    function(rank, *arguments)


def flat(grafter: Grafter) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in grafter.head.parameters()]).cpu()


def train_some(rank: int, target: Path, text: Path, out: Path, device: str) -> None:
    options = GraftOptions(str(target), out, replace(TRAIN, updates=40), SHAPE, records=text, write=False)
    place = training_device(device)
    source, weights = opened(target, text, place)
    config = head_config(SHAPE, weights, target)
    with joined(place) as group:
        assert (group.rank, group.size, group.is_first) == (rank, 2, rank == 0)
        parameter = torch.nn.Parameter(torch.zeros(3, device=place))
        parameter.grad = torch.full((3,), 4.0 * rank, device=place)
        group.average_gradients([parameter, torch.nn.Parameter(torch.zeros(1, device=place))])
        assert parameter.grad.tolist() == [2.0] * 3
        said: list[str] = []
        grafter = begin(options, source, weights, config, group, said.append)
        assert bool(said) == group.is_first
        assert {p.device for p in grafter.head.parameters()} == {place}
        steps = [grafter.step() for _ in range(20)]
        own = set(grafter.order.seen)
        grafter.save(out)
        found = {
            "weights": flat(grafter),
            "losses": [float(step.loss.detach()) for step in steps],
            "counts": [(step.anchors, step.tokens) for step in steps],
            "anchors": grafter.anchors,
            "own": own,
        }
        torch.save(found, out / f"rank{rank}.pt")


def check_some(target: Path, text: Path, out: Path) -> None:
    """That `train_some` left the same weights in both processes, and a checkpoint for one alone."""
    one, two = (torch.load(out / f"rank{rank}.pt") for rank in (0, 1))
    assert one["weights"].equal(two["weights"])
    assert one["losses"] != two["losses"]  # on texts of their own
    assert not one["own"] & two["own"]
    for losses in (one["losses"], two["losses"]):
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    # What is counted is of both: together they train on more anchors than one process ever takes.
    assert one["counts"] == two["counts"]
    assert one["anchors"] == two["anchors"] == sum(anchors for anchors, _ in one["counts"])
    assert max(anchors for anchors, _ in one["counts"]) > TRAIN.passages_per_update * TRAIN.anchors_per_passage
    # The checkpoint is one process's as well as two's, and no text counts as new that either has seen.
    source, weights = opened(target, text, "cpu")
    resumed = Grafter.resume(TRAIN, source, weights, out)
    assert flat(resumed).equal(one["weights"])
    assert resumed.order.seen == one["own"] | two["own"]
    assert resumed.group.size == 1


def whole_command(rank: int, target: Path, text: Path, out: Path, device: str) -> None:
    said: list[str] = []
    options = GraftOptions(str(target), out, TRAIN, SHAPE, records=text, write=False, device=device)
    found = graft(options, said.append)
    assert found == (out / BEST if rank == 0 else out)
    assert bool(said) == (rank == 0)
