"""Accepted length of a head, offline and exact: the target answers prompts once, the head drafts at every position.

Speculation never changes the text, so rounds can be walked over the target's own answers. Prints a table per prompt
set and temperature, beside prompt lookup; `--json` keeps it. Prompts: a directory of JSON lines with "turns".
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dspark_serve.models.catalog import CATALOG  # isort: skip  (before torch: the package decides how threads wait)

import numpy as np
import torch
from common import facts, write_json

from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.portfolio import LOOKUP_DRAFTS, LOOKUP_SHORTEST
from dspark_serve.models.loader import read_config, resolve
from dspark_serve.training.anchors import Passage
from dspark_serve.training.evaluate import acceptance_by_slot, draft_passage, overlap_passage, walk_rounds
from dspark_serve.training.export import load_exported
from dspark_serve.training.passages import PassageSource
from dspark_serve.training.records import Conversation, Manifest, RecordWriter
from dspark_serve.training.synthesize import SynthesisOptions, Synthesizer, Turn, recording_engine
from dspark_serve.training.target import TargetWeights
from dspark_serve.types import Request, Row, SamplingParams

SETS = ("gsm8k", "humaneval", "mbpp", "mt-bench")
TEMPERATURES = (0.0, 1.0)
ANSWER_TOKENS = 128


def turns(prompts: Path, count: int) -> Iterator[Turn]:
    index = 0
    for name in SETS:
        for line in (prompts / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
            message = {"role": "user", "content": json.loads(line)["turns"][0]}
            for temperature in TEMPERATURES:
                yield Turn(index, name, (message,), temperature=temperature)
                index += 1


def answer(model: str, weights: TargetWeights, taps: tuple[int, ...], prompts: Path, count: int, out: Path) -> None:
    """The target's answers and hidden states, into `out`."""
    layers = (*taps, weights.config.num_layers - 1)
    options = SynthesisOptions(model, layers, rows=64, max_answer_tokens=ANSWER_TOKENS, max_prompt_tokens=400)
    engine, tokenizer = recording_engine(options)
    writer = RecordWriter(out, Manifest(weights.fingerprint, layers, weights.config.hidden_size), options.max_bytes)
    Synthesizer(engine, tokenizer, writer, options).run(turns(prompts, count), lambda: False)
    writer.close()


def lookup(passage: Passage, size: int, shortest: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Prompt-lookup drafts at every anchor as matches [anchors, size], and whether anything was found [anchors]."""
    tokens, drafter = passage.tokens.tolist(), NgramDrafter(size, shortest)
    anchors = range(passage.num_prompt, len(tokens) - 1)
    matches, found = np.zeros((len(anchors), size), dtype=bool), np.zeros(len(anchors), dtype=bool)
    prompt = tokens[: passage.num_prompt]
    request = Request("", tuple(prompt), SamplingParams(), seed=0, token_ids=prompt)
    for row, anchor in enumerate(anchors):
        request.token_ids.append(tokens[anchor])
        drafts = drafter.look_up(Row(request, anchor, 1, samples=True, max_drafts=size))
        found[row] = bool(drafts)
        real = tokens[anchor + 1 : anchor + 1 + size]
        matches[row, : len(real)] = [a == b for a, b in zip(drafts or [-1] * size, real, strict=False)]
    return matches, found


def measure(
    head_directory: Path, weights: TargetWeights, source: PassageSource
) -> dict[str, dict[str, dict[str, object]]]:
    head, target = load_exported(head_directory, weights.embedding, weights.head)
    size = head.config.block_size
    rounds: dict[str, dict[str, list[np.ndarray]]] = {}

    def add(mode: str, conversation: Conversation, accepted: np.ndarray) -> None:
        rounds.setdefault(mode, {}).setdefault(conversation.kind, []).append(accepted)

    draw = np.random.default_rng(0)
    for conversation in source.reader.conversations:
        passage = source.load(conversation)
        if passage.num_prompt + 1 >= len(passage.tokens):
            continue
        sampled = conversation.temperature > 0
        drafts = draft_passage(head, passage, target, conversation.seed if sampled else None)
        found, _ = lookup(passage, size)
        longer, is_found = lookup(passage, max(size, LOOKUP_DRAFTS), LOOKUP_SHORTEST)
        beyond = np.zeros((len(longer), longer.shape[1] - size), dtype=bool)
        both = np.where(is_found[:, None], longer, np.hstack([drafts.matches, beyond]))
        tag = "T1 coupled" if sampled else "T0"
        for name, matches in (("head", drafts.matches), ("ngram", found), ("portfolio", both)):
            add(f"{tag} {name}", conversation, walk_rounds(matches, drafts.labels))
        if sampled:
            followed, ratios = overlap_passage(head, passage, target)
            add("T1 rejection head", conversation, walk_rounds(draw.random(ratios.shape) < ratios, followed.labels))
    return {mode: _table(by_set, LOOKUP_DRAFTS if "portfolio" in mode else size) for mode, by_set in rounds.items()}


def _table(by_set: dict[str, list[np.ndarray]], size: int) -> dict[str, dict[str, object]]:
    table: dict[str, dict[str, object]] = {}
    for name, parts in by_set.items():
        accepted = np.concatenate(parts)
        table[name] = {
            "accepted_length": 1 + float(accepted.mean()),
            "rounds": len(accepted),
            "by_slot": acceptance_by_slot(accepted, size),
        }
    lengths = [float(str(entry["accepted_length"])) for entry in table.values()]
    table["mean"] = {"accepted_length": float(np.mean(lengths))}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--head", type=Path, help="default: the head that comes with the model")
    parser.add_argument("--prompts", type=Path, required=True, help=f"directory of {', '.join(SETS)} as .jsonl")
    parser.add_argument("--records", type=Path, help="keep the target's answers here, and use them when they are there")
    parser.add_argument("--quick", action="store_true", help="5 prompts of each set instead of 20")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    head = options.head or CATALOG[options.model].head_dir
    torch.set_num_threads(1)
    weights = TargetWeights.load(resolve(options.model).path)
    taps = HeadConfig.parse(read_config(head)).taps
    with tempfile.TemporaryDirectory() as temporary:
        records = options.records or Path(temporary)
        if not (records / "conversations.jsonl").exists():
            answer(options.model, weights, taps, options.prompts, 5 if options.quick else 20, records)
        result = measure(head, weights, PassageSource(records, weights, taps))
    columns = [*SETS, "mean"]
    print(f"{'accepted length':20}" + "".join(f"{name:>11}" for name in columns))
    for mode, table in result.items():
        cells = [table[name]["accepted_length"] if name in table else float("nan") for name in columns]
        print(f"{mode:20}" + "".join(f"{cell:11.3f}" for cell in cells))
    about = facts()
    print(about)
    write_json(options.json, {"facts": about, "accepted": result})


if __name__ == "__main__":
    main()
