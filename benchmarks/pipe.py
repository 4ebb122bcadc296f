"""Another engine in a process of its own: one JSON line per task in, one per answer out. Must not import torch or ours:
the other side uses this file too, and runs as its own users run it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

_OURS = ("GOMP_SPINCOUNT", "MKL_CBWR", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # set by the package, for itself


class Pipe:
    """Our end. Raises RuntimeError when the process does not start or ends before it has answered."""

    def __init__(self, command: Sequence[str]) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in _OURS}
        self._name = " ".join(command)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
        self.about: dict[str, Any] = self._read()

    def ask(self, **task: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other engine ended with exit code {self._process.wait()}: {self._name}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def serve(about: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Their end: says that it is ready, and what it is; then answers until nobody asks any more."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
