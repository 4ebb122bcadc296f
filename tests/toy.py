"""A tiny seeded target, drafters with known manners, and an engine around them, for property tests."""

from functools import cache

import torch
from transformers import LlamaForCausalLM

from dspark_kernels.noise import DRAFT
from dspark_serve.cache.pages import PagePool
from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.base import DrafterPlan
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.none import NoDrafter
from dspark_serve.engine.batch import Batcher
from dspark_serve.engine.build import rule_for
from dspark_serve.engine.drafting import DraftAhead
from dspark_serve.engine.engine import Engine
from dspark_serve.engine.graphs import StepGraphs
from dspark_serve.engine.padding import Limits
from dspark_serve.engine.runner import Runner
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.models.dense import DenseModel
from dspark_serve.reports import EngineInfo
from dspark_serve.speculation.fixed import KeepAll
from dspark_serve.tensors import Proposal
from dspark_serve.types import Request, SamplingParams
from tests.tiny_model import tiny_config

VOCAB = 96


@cache
def toy_model(seed=0, vocab=VOCAB, kernels="auto"):
    """A random two-layer Llama, the same for the same seed; its heads fill the vectors of every instruction set."""
    torch.manual_seed(seed)
    config = tiny_config(vocab, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    weights = LlamaForCausalLM(config).state_dict()
    return DenseModel.from_weights(config, weights, torch.float32, torch.device("cpu"), kernels)


class Oracle:
    """Knows what the target will say (`truth`: token ids by request id) and drafts it right, wrong or at random."""

    taps = ()

    def __init__(self, truth, manner, width=4, vocab=VOCAB):
        self.truth, self.manner, self.width, self.vocab = truth, manner, width, vocab
        self.released = []

    def propose(self, rows):
        drafts = []
        for row in rows:
            request = row.request
            known = len(request.token_ids)
            count = min(self.width, row.max_drafts)
            right = list(self.truth[request.request_id][known : known + count])
            mixed = torch.Generator().manual_seed(known * 1000 + request.seed)
            if self.manner == "right":
                drafts.append(right)
            elif self.manner == "wrong":
                drafts.append([(token + 1) % self.vocab for token in right])
            else:  # a random number of drafts, each right or random
                keep = int(torch.randint(0, len(right) + 1, (), generator=mixed))
                guess = torch.randint(0, self.vocab, (keep,), generator=mixed).tolist()
                coin = torch.randint(0, 2, (keep,), generator=mixed).tolist()
                drafts.append([t if c else g for t, c, g in zip(right, coin, guess, strict=False)])
        return Proposal.from_lists(drafts)

    def observe(self, batch, taps, verdict):
        pass

    def release(self, request_id):
        self.released.append(request_id)


class RandomProbsDrafter:
    """Draws drafts from a fixed distribution of its own and says so, for the rejection rule."""

    taps = ()

    def __init__(self, probs, width=3, noise=None):
        self.probs, self.width, self.noise = probs, width, noise

    def propose(self, rows):
        counts = [min(self.width, row.max_drafts) for row in rows]
        width = max(counts)
        tokens = torch.full((len(rows), width), -1)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            for slot in range(count):
                position = torch.tensor(len(row.request.token_ids) + slot)
                gumbel = self.noise(torch.tensor(row.request.seed), position, torch.arange(len(self.probs)), DRAFT)
                tokens[index, slot] = torch.argmax(self.probs.log() + gumbel)
        return Proposal(tokens, tuple(counts), self.probs.expand(len(rows), width, -1).clone())

    def observe(self, batch, taps, verdict):
        pass

    def release(self, request_id):
        pass


def make_engine(
    model,
    drafter=None,
    *,
    mode="coupled",
    pages=400,
    page_size=8,
    seqs=16,
    tokens=256,
    chunk=None,
    length=None,
    budget=None,
    prefix_caching=True,
    recorder=None,
    ahead=False,
):
    """An engine around a drafter, or around a DrafterPlan, whose K/V layers then join the target's.

    With a `recorder` its steps are padded and recorded, as on a GPU; `ahead` drafts are made as there, too, whatever
    the budget.
    """
    info = model.info
    store = KVStore((*info.kv_layers, *getattr(drafter, "kv_layers", ())), pages, page_size, info.dtype)
    if isinstance(drafter, DrafterPlan):
        drafter = drafter.make(store, len(info.kv_layers))
    drafter = drafter or NoDrafter()
    length = length or info.max_model_len
    scheduler = Scheduler(
        PagePool(pages, page_size, prefix_caching),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=length,
        max_queue=1000,
        vocab_size=info.vocab_size,
        draft_width=drafter.width,
        max_prefill_chunk=chunk,
    )
    facts = EngineInfo(
        model="toy",
        model_dir="",
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        max_model_len=length,
        dtype="float32",
        device="cpu",
        backend=info.backend,
        page_size=page_size,
        pool_tokens=(pages - 1) * page_size,
        kv_bytes=0,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        drafter=type(drafter).__name__,
        num_speculative_tokens=drafter.width,
        verify_mode=mode,
        row_invariant=True,
        eos_token_ids=(),
    )
    graphs = recorder and StepGraphs(model, store, drafter.taps, Limits(seqs, tokens, length), recorder)
    runner = Runner(model, store, drafter.taps, graphs)
    batcher, rule, budget = Batcher(page_size), rule_for(model), budget or KeepAll()
    drafting = DraftAhead(drafter, scheduler, batcher.device) if ahead else None
    return Engine(facts, scheduler, drafter, budget, batcher, runner, rule, drafting)


def make_request(name, prompt, seed=0, **params):
    return Request(name, tuple(prompt), SamplingParams(**params), seed=seed)


class Collected:
    """Tokens and logprobs of every request of a run, by id."""

    def __init__(self):
        self.tokens, self.logprobs, self.prompt_logprobs = {}, {}, {}
        self.finished, self.preemptions, self.accepted, self.kept, self.cached = {}, 0, 0, 0, {}

    def __eq__(self, other):
        return self.tokens == other.tokens and self.logprobs == other.logprobs


def run(engine, requests, check=True):
    """Serve the requests together until all are done; integrity is checked after every step."""
    got = Collected()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        report = engine.step()
        if check:
            engine.check_integrity()
        got.preemptions += report.num_preempted
        for row in report.rows:
            got.accepted += row.n_accepted
            got.kept += row.n_kept
        for delta in report.deltas:
            got.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.logprobs:
                got.logprobs.setdefault(delta.request_id, []).extend(entry.logprob for entry in delta.logprobs)
            if delta.prompt_logprobs:
                got.prompt_logprobs.setdefault(delta.request_id, []).extend(delta.prompt_logprobs)
            if delta.finish_reason:
                got.finished[delta.request_id] = delta.finish_reason
                got.cached[delta.request_id] = delta.num_cached
    return got


def drafter_named(name, truth, vocab=VOCAB):
    if name == "none":
        return NoDrafter()
    if name == "ngram":
        return NgramDrafter(4, 1, 3)
    return Oracle(truth, name, vocab=vocab)
