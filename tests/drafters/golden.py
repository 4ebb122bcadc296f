"""Golden targets and heads from tests/goldens, and an engine that records what a drafter proposed in every round."""

import json
from functools import cache
from pathlib import Path

from safetensors.torch import load_file

from dspark_serve.drafters.heads import plan_head
from dspark_serve.models.loader import load_model, resolve
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


class Threshold:
    """The reference's gate: verify up to the first slot whose confidence is below `least`; prompts are not drafted."""

    def __init__(self, least):
        self.least = least
        self.rounds = []

    def choose(self, plan, proposal):
        kept = []
        for index, (row, n) in enumerate(zip(plan.drafting, proposal.n_draft, strict=True)):
            if row.start < row.request.num_prompt:  # the reference never drafts from a prompt's token
                kept.append(0)
                continue
            confidence = None if proposal.confidence is None else proposal.confidence[index]
            low = [] if confidence is None else (confidence < self.least).nonzero().flatten().tolist()
            kept.append(min([n, *low]))
            self.rounds.append(
                {
                    "start": row.start,
                    "anchor": row.request.token_ids[-1],
                    "draft_tokens": proposal.tokens[index].tolist(),
                    "verify_len": kept[-1],
                    "confidence": None if confidence is None else confidence.tolist(),
                }
            )
        return kept


def golden_engine(head, budget, **options):
    return make_engine(target_of(head), golden_plan(head), budget=budget, page_size=8, **options)


def replay(head, golden, **options):
    """Run a golden run's prompt; returns (tokens, rounds as recorded, accepted drafts per round)."""
    budget = Threshold(golden.get("confidence_threshold") or 0.0)
    engine = golden_engine(head, budget, **options)
    accepted = []
    step = engine.step

    def recording():
        before = len(budget.rounds)
        report = step()
        if len(budget.rounds) > before:
            accepted.append(report.rows[0].n_accepted)
        return report

    engine.step = recording
    # The reference always drafts full blocks, even past the end: so the request here has room for one more.
    request = make_request(
        "r",
        golden["input_ids"],
        temperature=0.0,
        max_tokens=golden["max_new_tokens"] + 8,
        stop_token_ids=tuple(golden["stop_token_ids"]),
    )
    got = run(engine, [request], check=False)
    return got.tokens["r"], budget.rounds, accepted
