"""Transformers in a process of its own, as its users run it: fp32, its own settings, one JSON line per task.

`python reference.py MODEL_DIR`. Greedy generate: {"prompts": [[ids]], "new_tokens": n} -> {"seconds": s, "tokens":
[[ids]]}. One forward of `rows` tokens after `context` cached ones: {"rows": n, "context": n} -> {"seconds": s}.
"""

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

_OURS = ("GOMP_SPINCOUNT", "MKL_CBWR", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # set by the package, for itself


class Reference:
    """The other side of the pipe. Raises RuntimeError when the process does not start."""

    def __init__(self, model_dir: str) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in _OURS}
        command = [sys.executable, __file__, model_dir]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError("the reference process did not start")

    def ask(self, **task: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


class Steps:
    """Forwards after a context that is computed once."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, DynamicCache()

    @torch.inference_mode()
    def seconds(self, rows: int, context: int) -> float:
        ids = torch.arange(context + rows).unsqueeze(0)
        if self._cache.get_seq_length() != context:
            self._cache = DynamicCache()
            self._model(ids[:, :context], past_key_values=self._cache)
        start = time.perf_counter()
        self._model(ids[:, context:], past_key_values=self._cache)
        seconds = time.perf_counter() - start
        self._cache.crop(-rows)
        return seconds


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    steps = Steps(model)
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "rows" in task:
            print(json.dumps({"seconds": steps.seconds(task["rows"], task["context"])}), flush=True)
            continue
        padded = tokenizer.pad({"input_ids": task["prompts"]}, return_tensors="pt")
        length = task["new_tokens"]
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                **padded, max_new_tokens=length, min_new_tokens=length, do_sample=False, eos_token_id=None
            )
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": out[:, padded["input_ids"].shape[1] :].tolist()}), flush=True)


if __name__ == "__main__":
    main()
