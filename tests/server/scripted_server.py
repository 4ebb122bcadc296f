"""The real server process on a scripted engine: `python scripted_server.py '{"port": 0, ...}' HOLD TEXT [FAILURE]`.

HOLD: a path, or "". While there is a file, no step but the very first is taken: what is asked then is at work until the
file is gone. TEXT 0 leaves the tokenizer out, and with it the seconds that importing Transformers takes. FAILURE "slow"
never loads.
"""

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from fakes import FakeEngine, byte_tokenizer

from dspark_serve.config import load_config
from dspark_serve.server.run import StartupError, serve


class Held(FakeEngine):
    """Two tokens a step. The first step goes through: with it a server tells that it runs something."""

    def step(self):
        while self.steps and sys.argv[2] and Path(sys.argv[2]).exists():
            time.sleep(0.01)
        return super().step()


def load(_):
    if len(sys.argv) > 4:
        time.sleep(600 if sys.argv[4] == "slow" else 0.2)
        raise ValueError(sys.argv[4])
    return Held(burst=2), byte_tokenizer() if sys.argv[3] == "1" else None


if __name__ == "__main__":
    try:
        raise SystemExit(serve(load_config({"model": "fake", **json.loads(sys.argv[1])}), load))
    except StartupError as error:
        print(f"dspark-serve: {error}", file=sys.stderr)
        raise SystemExit(1) from None
