"""The engine beside llama.cpp: the same file, the same prompts as token ids, greedy, two processes that take turns.

At F32 both have the very weights that the file's blocks stand for. llama-cpp-python may live in any environment
(--llama-python); nothing else needs it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dspark_serve.config import Config  # isort: skip  (before torch: the package decides how its threads wait)

import torch
import typer
from common import MODEL, Spread, facts, prompts, write_json
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize
from pipe import Pipe
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from dspark_serve.engine.build import build_engine
from dspark_serve.models.catalog import CATALOG, cached
from dspark_serve.models.loader import resolve
from dspark_serve.types import Request, SamplingParams

NEW_TOKENS, PROMPT, STREAMS = 128, 512, 16
HERE = Path(__file__).parent
SIDES = ("llama.cpp", "ours, no drafter", "ours, default")
PAUSE_S = 0.03  # the other process's threads stop spinning meanwhile


@dataclass(frozen=True)
class Run:
    """Some prompts answered together. `decode_s` begins when each has its first token; `decoded` came after that."""

    prompt_s: float
    decode_s: float
    decoded: int
    tokens: list[list[int]]

    @property
    def decode_rate(self) -> float:
        return self.decoded / self.decode_s

    @property
    def whole_rate(self) -> float:
        return sum(map(len, self.tokens)) / (self.prompt_s + self.decode_s)


Weights = Literal["F32", "Q4_1"]
Side = Callable[[Sequence[list[int]], int], Run]  # prompts, new tokens of each


def llama_side(pipe: Pipe) -> Side:
    def run(batch: Sequence[list[int]], new_tokens: int) -> Run:
        answer = pipe.ask(prompts=batch, new_tokens=new_tokens)
        return Run(answer["prompt_s"], answer["decode_s"], len(batch) * (new_tokens - 1), answer["tokens"])

    return run


def our_side(dtype: str, method: str | None) -> Side:
    # No prefix cache: every repetition has to do all of its work, as the other side does.
    options = {
        "cache": {"kv_cache_gib": 0.4, "enable_prefix_caching": False},
        "speculation": {"method": method},
        "model": {"model": MODEL, "dtype": dtype, "device": "cpu"},
    }
    engine = build_engine(Config.model_validate(options))

    def run(batch: Sequence[list[int]], new_tokens: int) -> Run:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        tokens: dict[str, list[int]] = {str(i): [] for i in range(len(batch))}
        start = time.perf_counter()
        for i, prompt in enumerate(batch):
            engine.add(Request(str(i), tuple(prompt), params, seed=0))
        prompted, before = 0.0, 0
        while engine.has_work:
            for delta in engine.step().deltas:
                tokens[delta.request_id].extend(delta.token_ids)
            if not prompted and all(tokens.values()):
                prompted, before = time.perf_counter(), sum(map(len, tokens.values()))
        decoded = sum(map(len, tokens.values())) - before
        return Run(prompted - start, time.perf_counter() - prompted, decoded, list(tokens.values()))

    return run


def widen(source: Path, target: Path) -> None:
    """Write at `target` the weights that `source`'s blocks stand for, in float32; both GGUF, all else is copied."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        value = 0 if name == "general.file_type" else field.contents()  # 0: all float32
        writer.add_key_value(name, value, field.types[0], sub_type=element)
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weights, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_turns(items: Sequence[Sequence[list[int]]], new_tokens: int, sides: dict[str, Side]) -> list[dict[str, Run]]:
    """Every side's run of every item; the order turns round, and a short run warms up."""
    for side in sides.values():
        side(items[0], 8)
    runs = []
    for number, item in enumerate(items):
        found: dict[str, Run] = {}
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            time.sleep(PAUSE_S)
            found[name] = sides[name](item, new_tokens)
        runs.append(found)
    return runs


def rates(runs: Sequence[dict[str, Run]], rate: Callable[[Run], float]) -> dict[str, Any]:
    """Tokens per second of each side, and how many times the first one's that is."""
    by_side = {name: [rate(run[name]) for run in runs] for name in runs[0]}
    base = next(iter(by_side.values()))
    return {
        "tokens_per_s": {name: Spread.of(values) for name, values in by_side.items()},
        "ratio": {
            name: Spread.of([b / a for a, b in zip(base, values, strict=True)]) for name, values in by_side.items()
        },
    }


def agreement(runs: Sequence[dict[str, Run]]) -> dict[str, float]:
    """Share of each side's tokens that come before its text first differs from the first side's."""
    first = next(iter(runs[0]))
    total = sum(len(tokens) for run in runs for tokens in run[first].tokens)
    return {
        name: sum(_shared(*pair) for run in runs for pair in zip(run[first].tokens, run[name].tokens, strict=True))
        / total
        for name in runs[0]
    }


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


class Bench:
    """Prompts, and the two engines at each precision."""

    def __init__(self, python: str, quick: bool) -> None:
        self.quick = quick
        directory = resolve(MODEL).path
        source = directory / Path(CATALOG[MODEL].member).name
        self._python = python
        key = f"{MODEL}-{CATALOG[MODEL].member_sha256[:12]}-f32-gguf"
        wide = cached(key, lambda folder: widen(source, folder / "f32.gguf")) / "f32.gguf"
        self._files = {"F32": wide, "Q4_1": source}
        tokenizer = AutoTokenizer.from_pretrained(directory)

        def encode(text: str) -> list[int]:
            messages = [{"role": "user", "content": text}]
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return list(tokenizer.encode(rendered, add_special_tokens=False))

        self._prompts = [encode(text) for text in prompts()]

    def measure(self, weights: Weights) -> dict[str, Any]:
        pipe = Pipe(
            [
                self._python,
                str(HERE / "llama_process.py"),
                str(self._files[weights]),
                str(torch.get_num_threads()),
            ]
        )
        dtype = "float32" if weights == "F32" else "auto"
        sides = dict(zip(SIDES, (llama_side(pipe), our_side(dtype, "none"), our_side(dtype, None)), strict=True))
        everything = [token for prompt in self._prompts for token in prompt]
        pieces = [[everything[at : at + PROMPT]] for at in range(0, len(everything) - PROMPT, PROMPT)]
        groups = [self._prompts[at : at + STREAMS] for at in range(0, len(self._prompts) - STREAMS + 1, STREAMS)]
        single = in_turns([[prompt] for prompt in self._prompts[:: 8 if self.quick else 3]], NEW_TOKENS, sides)
        long = in_turns(pieces[: 4 if self.quick else 8], 1, sides)
        many = in_turns((groups * 3)[: 2 if self.quick else 6], NEW_TOKENS // (2 if self.quick else 1), sides)
        pipe.close()
        return {
            "llama.cpp": pipe.about,
            "measured": {
                "decoding, 1 stream": rates(single, lambda run: run.decode_rate),
                f"a prompt of {PROMPT} tokens": rates(long, lambda run: PROMPT / run.prompt_s),
                f"decoding, {STREAMS} streams": rates(many, lambda run: run.decode_rate),
                f"{STREAMS} streams with their prompts": rates(many, lambda run: run.whole_rate),
            },
            "agreement": {"1 stream": agreement(single), f"{STREAMS} streams": agreement(many)},
        }


def show(result: dict[str, Any]) -> None:
    console = Console()
    for weights, found in result["weights"].items():
        table = Table(
            "tokens/s", *SIDES, *(f"times, {name}" for name in SIDES[1:]), title=f"{MODEL}, greedy, {weights}"
        )
        for label, row in found["measured"].items():
            ratios = (str(row["ratio"][name]) for name in SIDES[1:])
            table.add_row(label, *(str(row["tokens_per_s"][name]) for name in SIDES), *ratios)
        console.print(table)
        for streams, shares in found["agreement"].items():
            told = ", ".join(f"{name} {shares[name]:.0%}" for name in SIDES[1:])
            console.print(f"tokens before the text first differs from llama.cpp's, {streams}: {told}")
    console.print(found["llama.cpp"])
    console.print("K/V: ours float32, llama.cpp float16 (its default)")
    console.print(result["facts"])


def _check(python: str) -> None:
    """Exit with a sentence unless that interpreter has llama-cpp-python."""
    done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise typer.BadParameter(
            f"{python} cannot import llama_cpp ({reason}). To build it (cmake, a C++ compiler, some minutes): "
            "`python3 -m venv DIR && DIR/bin/pip install llama-cpp-python`; then pass --llama-python DIR/bin/python."
        )


def main(
    llama_python: Annotated[str, typer.Option(help="Interpreter that has llama-cpp-python.")] = sys.executable,
    weights: Annotated[Literal["F32", "Q4_1", "both"], typer.Option(help="What to compare.")] = "both",
    quick: Annotated[bool, typer.Option(help="Fewer repetitions, about five minutes on two cores.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Measure, print a table, exit 0 whatever the figures say."""
    _check(llama_python)
    bench = Bench(llama_python, quick)
    chosen: tuple[Weights, ...] = ("F32", "Q4_1") if weights == "both" else (weights,)
    result = {"facts": facts(), "weights": {name: bench.measure(name) for name in chosen}}
    show(result)
    write_json(json_path, result)


if __name__ == "__main__":
    typer.run(main)
