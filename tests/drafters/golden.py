"""Golden targets and heads from tests/goldens, and an engine that records what a drafter proposed in every round."""

import json
from functools import cache
from pathlib import Path

from safetensors.torch import load_file

from dspark_serve.drafters.heads import plan_head
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.speculation.fixed import KeepAll
from tests.toy import make_engine, make_request, run

GOLDENS = Path(__file__).parents[1] / "goldens"
HEADS = ["dspark_vanilla", "dspark_rnn", "dflash", "eagle3", "gemma4_dspark_random"]


@cache
def golden_target(name="target"):
    return load_model(resolve(str(GOLDENS / name)), "float32", "cpu")


def target_of(head):
    return golden_target("gemma4_target" if head.startswith("gemma4") else "target")


@cache
def golden_plan(head, mode="coupled", width=None):
    return plan_head(GOLDENS / head, target_of(head), mode, width)


@cache
def golden_runs(head):
    return json.loads((GOLDENS / head / "goldens.json").read_text())["runs"]


@cache
def golden_tensors(head):
    return load_file(GOLDENS / head / "goldens.safetensors")


class Threshold(KeepAll):
    """The reference's gate: verify up to the first slot whose confidence is below the request's threshold.

    `rounds` lists what was drafted, by request id. The reference never drafts from a prompt's own token.
    """

    def __init__(self, least):
        self.least = least
        self.rounds = {name: [] for name in least}

    def choose(self, plan, proposal):
        return [self._keep(index, row, proposal) for index, row in enumerate(plan.drafting)]

    def _keep(self, index, row, proposal):
        name = row.request.request_id
        if row.start < row.request.num_prompt:
            return 0
        confidence = None if proposal.confidence is None else proposal.confidence[index]
        low = [] if confidence is None else (confidence < self.least[name]).nonzero().flatten().tolist()
        self.rounds[name].append(
            {
                "start": row.start,
                "anchor": row.request.token_ids[-1],
                "draft_tokens": proposal.tokens[index].tolist(),
                "verify_len": min([proposal.n_draft[index], *low]),
                "confidence": None if confidence is None else confidence.tolist(),
            }
        )
        return self.rounds[name][-1]["verify_len"]


class Recorder:
    """A Drawer that keeps the logits it was given."""

    def __init__(self, drawer):
        self.drawer, self.logits = drawer, []

    def draw(self, logits, sampling, slot):
        self.logits.append(logits.clone())
        return self.drawer.draw(logits, sampling, slot)


def replay(head, goldens):
    """Run golden runs as one batch; returns (tokens, rounds as recorded) of each."""
    names = [f"r{index}" for index in range(len(goldens))]
    budget = Threshold(
        {name: golden.get("confidence_threshold") or 0.0 for name, golden in zip(names, goldens, strict=True)}
    )
    engine = make_engine(
        target_of(head), golden_plan(head), budget=budget, page_size=8, pages=1500, seqs=64, tokens=1024
    )
    # The reference always drafts full blocks, even past the end: so requests here have room for one more.
    requests = [
        make_request(
            name,
            golden["input_ids"],
            temperature=0.0,
            max_tokens=golden["max_new_tokens"] + 8,
            stop_token_ids=tuple(golden["stop_token_ids"]),
        )
        for name, golden in zip(names, goldens, strict=True)
    ]
    got = run(engine, requests, check=False)
    return [(got.tokens[name], budget.rounds[name]) for name in names]
