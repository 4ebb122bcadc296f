"""Numbers per request in arrays against a dict of dicts: nothing is lost, mixed up, or handed on to another."""

from __future__ import annotations

import numpy as np

from dspark_serve.speculation.per_request import PerRequest


def test_like_a_dict_of_numbers() -> None:
    draw, kept = np.random.default_rng(0), PerRequest()
    wanted: dict[str, float] = {}
    for step in range(2000):
        names = tuple(f"r{n}" for n in draw.choice(60, int(draw.integers(1, 40)), replace=False))
        lines = kept.lines(names)
        assert kept.column("a")[lines].tolist() == [wanted.get(name, 0.0) for name in names]
        assert not kept.column("b").any()
        kept.column("a")[lines] += step
        wanted.update({name: wanted.get(name, 0.0) + step for name in names})
        for name in names[: int(draw.integers(0, 8))]:
            kept.release(name)
            del wanted[name]
        assert set(kept) == set(wanted)
    assert len(kept.column("a")) == 64  # lines are used again


def test_a_request_of_the_same_name_begins_anew() -> None:
    kept = PerRequest()
    for _ in range(2):
        lines = kept.lines(("a", "b"))
        assert kept.column("n")[lines].tolist() == [0.0, 0.0]
        kept.column("n")[lines] = 7.0
        kept.release("a")
        kept.release("b")
        kept.release("nobody")
        assert not len(kept)


def test_a_batch_asked_for_again_is_found_again() -> None:
    kept = PerRequest()
    kept.column("n")[kept.lines(("a", "b", "c"))] = [1.0, 2.0, 3.0]
    kept.release("b")
    kept.column("n")[kept.lines(("d",))] = 4.0
    assert kept.column("n")[kept.lines(("a", "b", "c"))].tolist() == [1.0, 0.0, 3.0]
    assert kept.column("n")[kept.lines(("c", "d"))].tolist() == [3.0, 4.0]


def test_more_requests_than_ever_before() -> None:
    kept = PerRequest()
    kept.column("n")[kept.lines(("a", "b"))] = [1.0, 2.0]
    lines = kept.lines(tuple(f"r{n}" for n in range(100)))
    kept.column("n")[lines] = 3.0
    assert kept.column("n")[kept.lines(("a", "r99", "b"))].tolist() == [1.0, 3.0, 2.0]
