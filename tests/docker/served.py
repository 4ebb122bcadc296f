"""What is asked of the image's server, whatever it was started with."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
import pytest

Found = TypeVar("Found")
MODEL = "smollm2-135m-instruct"
QUESTION = {"messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 24, "seed": 7}
UID = 10001


def until(read: Callable[[], Found], right: Callable[[Found], bool], timeout_s: float = 300) -> Found:
    """What `read()` gives once `right` says so of it; AssertionError with the last when that never happens."""
    end = time.monotonic() + timeout_s
    while not right(found := read()):
        assert time.monotonic() < end, f"still {found}"
        time.sleep(0.5)
    return found


def wait_until_ready(client: httpx.Client, ended: Callable[[], str | None], path: str = "/ready") -> None:
    """`ended`: the server's log, once it is over with it."""
    while True:
        if (log := ended()) is not None:
            pytest.fail(f"the server ended: {log}")
        try:
            if client.get(path).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def check_first_lines(lines: str) -> None:
    """Of its log: the default model, its own head, native kernels, exact."""
    assert re.search(rf"^model\s+{MODEL}: .*\bnative (base|avx2|avx512)\b", lines, re.MULTILINE), lines
    assert re.search(r"^exactness\s+bitwise", lines, re.MULTILINE), lines
    assert re.search(r"^speculation\s+portfolio.*/heads/", lines, re.MULTILINE), lines


def check_status(status: str) -> None:
    """Of /proc/PID/status: the first process of its name space, and nobody with rights."""
    assert re.search(rf"^Uid:\t{UID}\t{UID}\t{UID}\t{UID}$", status, re.MULTILINE), status
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE), status
    assert re.search(r"^NSpid:\t(\d+\t)?1$", status, re.MULTILINE), status


def check_answers(client: httpx.Client) -> str:
    """The text it gives, with drafts and without."""
    texts = []
    for enabled in (True, False):
        answer = client.post("/v1/chat/completions", json={**QUESTION, "speculation": {"enabled": enabled}})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        assert found["usage"]["completion_tokens"] > 1
        texts.append(str(found["choices"][0]["message"]["content"]))
    assert texts[0] == texts[1]
    assert texts[0].strip()
    return texts[0]
