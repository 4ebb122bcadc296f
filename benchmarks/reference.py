"""Transformers' generate in a process of its own, as its users run it: greedy, fp32, one JSON line per batch.

`python reference.py MODEL_DIR`; in: {"prompts": [[ids]], "new_tokens": n}, out: {"seconds": s, "tokens": [[ids]]}.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
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
