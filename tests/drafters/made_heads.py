"""Heads for the exactness tests: the recorded ones, and variations of them that no recording covers."""

from dataclasses import replace
from functools import cache

import torch

from dspark_serve.drafters.base import DrafterPlan
from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.drafters.heads import plan_from_tensors
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.none import NoDrafter
from dspark_serve.drafters.portfolio import LOOKUP_DRAFTS, LOOKUP_SHORTEST, PortfolioDrafter
from dspark_serve.models.loader import iterate_weights, read_config
from dspark_serve.speculation.fixed import KeepAll
from tests.drafters.golden import GOLDENS, golden_plan, golden_target


def stored(head):
    """A golden head's (config, tensors)."""
    return HeadConfig.parse(read_config(GOLDENS / head)), dict(iterate_weights(GOLDENS / head, progress=False))


def gated(mode):
    """The vanilla head with a random gate: nobody trained it, but its mathematics is the gated head's."""
    config, tensors = stored("dspark_vanilla")
    generator = torch.Generator().manual_seed(0)
    rank, hidden = config.markov_rank, config.hidden_size
    tensors["markov_head.gate_proj.weight"] = torch.randn(rank, hidden + rank, generator=generator) * 0.1
    tensors["markov_head.gate_proj.bias"] = torch.ones(rank)
    return plan_from_tensors(replace(config, markov_type="gated"), tensors, golden_target(), mode)


def few_tokens(mode, count=200):
    """The vanilla head with a draft vocabulary: the bytes below 128 and some others."""
    config, tensors = stored("dspark_vanilla")
    ids = torch.cat([torch.arange(128), torch.arange(130, 130 + 2 * (count - 128), 2)]).int()
    tensors["draft_vocab"] = ids
    tensors["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"][ids.long()]
    return plan_from_tensors(replace(config, draft_vocab_size=count), tensors, golden_target(), mode)


def portfolio(mode):
    head = golden_plan("dspark_vanilla", mode)

    def make(store, first):
        ngram = NgramDrafter(LOOKUP_DRAFTS, LOOKUP_SHORTEST)
        return PortfolioDrafter(ngram, head.make(store, first), head.name)

    return replace(head, name="portfolio", make=make)


@cache
def plan_named(name, mode="coupled"):
    """A DrafterPlan for the golden Qwen3 target; "none" drafts nothing."""
    made = {"gated": gated, "few_tokens": few_tokens, "portfolio": portfolio}
    if name == "none":
        return DrafterPlan("none", lambda store, first: NoDrafter())
    return made[name](mode) if name in made else golden_plan(name, mode)


class Watch(KeepAll):
    """A budget that keeps every draft and remembers what was proposed, by (request, anchor's position)."""

    def __init__(self):
        self.seen = {}
        self.confidence = {}

    def choose(self, plan, proposal):
        for index, (row, n) in enumerate(zip(plan.drafting, proposal.n_draft, strict=True)):
            where = row.request.request_id, row.start
            self.seen[where] = proposal.tokens[index, :n].tolist()
            if proposal.confidence is not None:
                self.confidence[where] = proposal.confidence[index, :n].tolist()
        return proposal.n_draft
