"""llama.cpp in a process of its own, under an interpreter that has llama-cpp-python, through its C interface.

`python llama_process.py FILE.gguf THREADS`. Greedy; all prompts first, then a token of each per step: {"prompts":
[[ids]], "new_tokens": n} -> {"prompt_s": s, "decode_s": s, "tokens": [[ids]]}; decode_s is that of n - 1 tokens each.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from pipe import serve

CONTEXT = 1024  # tokens per sequence
STREAMS = 16
AT_ONCE = 2048  # tokens that one call may bring, llama.cpp's own default

Item = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


class Sequences:
    """A context for `streams` sequences, otherwise with llama.cpp's default settings."""

    def __init__(self, model: Any, streams: int, threads: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch = CONTEXT * streams, streams, AT_ONCE
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {streams} sequences")
        self._batch = llama_cpp.llama_batch_init(AT_ONCE, 0, 1)
        self._width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        items = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        start = time.perf_counter()
        newest = [token for at in range(0, len(items), AT_ONCE) for token in self._run(items[at : at + AT_ONCE])]
        prompted = time.perf_counter()
        tokens = [[token] for token in newest]
        for step in range(new_tokens - 1):
            newest = self._run([(t, len(prompts[i]) + step, i, True) for i, t in enumerate(newest)])
            for own, token in zip(tokens, newest, strict=True):
                own.append(token)
        return {"prompt_s": prompted - start, "decode_s": time.perf_counter() - prompted, "tokens": tokens}

    def _run(self, items: Sequence[Item]) -> list[int]:
        """The likeliest tokens after those whose logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed on {len(items)} tokens")
        rows = sum(wanted for *_, wanted in items)
        if not rows:
            return []
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape=(rows, self._width))
        return [int(token) for token in logits.argmax(-1)]


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    keep = llama_cpp.llama_log_callback(lambda level, text, data: None)  # stdout is for answers, stderr for mishaps
    llama_cpp.llama_log_set(keep, None)
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    contexts = {streams: Sequences(model, streams, threads) for streams in (1, STREAMS)}

    def answer(task: dict[str, Any]) -> dict[str, Any]:
        prompts = task["prompts"]
        return contexts[1 if len(prompts) == 1 else STREAMS].generate(prompts, task["new_tokens"])

    about = {"llama-cpp-python": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode().strip()}
    serve(about, answer)


if __name__ == "__main__":
    main()
