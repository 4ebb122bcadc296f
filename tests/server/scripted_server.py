"""The real server process on a scripted engine: `python scripted_server.py '{"port": 0, ...}' DELAY_S TEXT [FAILURE]`.

TEXT 0 leaves the tokenizer out, and with it the seconds that importing Transformers takes. FAILURE "slow" never loads.
"""

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from fakes import FakeEngine, byte_tokenizer

from dspark_serve.config import load_config
from dspark_serve.server.run import StartupError, serve


def load(_):
    if len(sys.argv) > 4:
        time.sleep(600 if sys.argv[4] == "slow" else 0.2)
        raise ValueError(sys.argv[4])
    return FakeEngine(delay_s=float(sys.argv[2]), burst=2), byte_tokenizer() if sys.argv[3] == "1" else None


if __name__ == "__main__":
    try:
        raise SystemExit(serve(load_config({"model": "fake", **json.loads(sys.argv[1])}), load))
    except StartupError as error:
        print(f"dspark-serve: {error}", file=sys.stderr)
        raise SystemExit(1) from None
