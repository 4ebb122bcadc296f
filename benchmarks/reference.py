"""Transformers in a process of its own, as its users run it: fp32, its own settings.

`python reference.py MODEL_DIR`. Greedy generate: {"prompts": [[ids]], "new_tokens": n} -> {"seconds": s, "tokens":
[[ids]]}. One forward of `rows` tokens after `context` cached ones: {"rows": n, "context": n} -> {"seconds": s}.
"""

import sys
import time
from typing import Any

import torch
from pipe import Pipe, serve
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


class Reference(Pipe):
    """The other side of the pipe."""

    def __init__(self, model_dir: str) -> None:
        super().__init__([sys.executable, __file__, model_dir])


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

    def answer(task: dict[str, Any]) -> dict[str, Any]:
        if "rows" in task:
            return {"seconds": steps.seconds(task["rows"], task["context"])}
        padded = tokenizer.pad({"input_ids": task["prompts"]}, return_tensors="pt")
        length = task["new_tokens"]
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                **padded, max_new_tokens=length, min_new_tokens=length, do_sample=False, eos_token_id=None
            )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": out[:, padded["input_ids"].shape[1] :].tolist()}

    serve({}, answer)


if __name__ == "__main__":
    main()
