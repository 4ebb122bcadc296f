"""Threads that compute together have a core each, and the caller's thread has all of them back afterwards."""

import contextlib
import os
import threading

import pytest
import torch

from dspark_kernels import native
from dspark_serve.engine.cores import Cores
from tests.toy import make_engine, make_request, run, toy_model

CPU = torch.device("cpu")
ALL = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

pytestmark = [
    pytest.mark.skipif(len(ALL) < 2, reason="needs Linux and two cores"),
    pytest.mark.skipif(native.load() is None, reason="needs the C++ kernels, which were not built"),
]


@pytest.fixture
def as_many_threads_as_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(len(ALL))
    yield
    torch.set_num_threads(before)


def bound_to() -> set[int]:
    """Cores that a thread of this process is bound to."""
    masks = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # a thread of another test that ended meanwhile
            masks.append(os.sched_getaffinity(int(task)))
    return {min(mask) for mask in masks if len(mask) == 1}


def multiply() -> None:
    torch.ones(512, 512) @ torch.ones(512, 512)  # has torch's threads take part


def test_each_thread_has_a_core_of_its_own(as_many_threads_as_cores):
    cores = Cores(CPU)
    for _ in range(3):  # the first time all are bound, later the caller only
        with cores:
            multiply()
            assert os.sched_getaffinity(0) == {min(ALL)}
            assert bound_to() == ALL
        assert os.sched_getaffinity(0) == ALL


def test_another_thread_that_steps_is_bound_with_its_own(as_many_threads_as_cores):
    cores, seen = Cores(CPU), []

    def step():
        with cores:
            multiply()
            seen.append((os.sched_getaffinity(0), bound_to()))
        seen.append(os.sched_getaffinity(0))

    with cores:
        multiply()
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert seen == [({min(ALL)}, ALL), ALL]


def test_nothing_is_bound_where_threads_and_cores_are_not_as_many():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Cores(CPU):
            assert os.sched_getaffinity(0) == ALL
    finally:
        torch.set_num_threads(before)


def test_nothing_is_bound_for_a_gpu(as_many_threads_as_cores):
    with Cores(torch.device("cuda")):
        assert os.sched_getaffinity(0) == ALL


def test_cores_come_back_from_a_failure_and_from_within(as_many_threads_as_cores):
    outer, inner = Cores(CPU), Cores(CPU)

    def fail():
        with outer:
            with inner:
                assert os.sched_getaffinity(0) == {min(ALL)}
            assert os.sched_getaffinity(0) == {min(ALL)}
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert os.sched_getaffinity(0) == ALL


def test_where_it_is_forbidden_steps_are_computed_all_the_same(as_many_threads_as_cores, monkeypatch):
    """As a sandbox would: nothing raises, and nobody asks twice."""
    asked = []
    monkeypatch.setattr(native.Kernels, "bind", lambda self, cores: asked.append(cores))

    def forbidden(pid, cores):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    cores, computed = Cores(CPU), 0
    for _ in range(3):
        with cores:
            multiply()
            computed += 1
    assert computed == 3
    assert asked == [sorted(ALL)]


def test_fewer_cores_than_before_are_kept_to(as_many_threads_as_cores):
    """Somebody else, `taskset` for one, may take cores away meanwhile."""
    cores = Cores(CPU)
    with cores:
        multiply()
    os.sched_setaffinity(0, {max(ALL)})
    try:
        with cores:
            assert os.sched_getaffinity(0) == {max(ALL)}
        assert os.sched_getaffinity(0) == {max(ALL)}
    finally:
        os.sched_setaffinity(0, ALL)


def test_a_step_is_computed_on_cores_of_its_own(as_many_threads_as_cores):
    engine = make_engine(toy_model())
    inside, forward = [], engine.runner.run
    engine.runner.run = lambda batch: (inside.append(os.sched_getaffinity(0)), forward(batch))[1]
    assert run(engine, [make_request("a", range(5, 12), max_tokens=3)]).tokens["a"]
    assert inside
    assert all(cores == {min(ALL)} for cores in inside)
    assert os.sched_getaffinity(0) == ALL
