"""Heads in DeepSpec format draft what the reference drafts: token for token, and logits to 1e-4."""

from dataclasses import replace

import pytest
import torch

from dspark_kernels import native
from dspark_serve.drafters.rows import Drawer
from tests.drafters.golden import (
    HEADS,
    Recorder,
    golden_plan,
    golden_runs,
    golden_target,
    golden_tensors,
    replay,
    target_of,
)
from tests.toy import make_engine, make_request

TOLERANCE = 1e-4


@pytest.fixture(params=["kernels", "torch"])
def arithmetic(request, monkeypatch):
    """Once as the machine does it, once without the C++ kernels."""
    if request.param == "kernels":
        yield
        return
    with monkeypatch.context() as patch:
        patch.setattr(native, "load", lambda name=None: None)
        golden_target.cache_clear()
        golden_plan.cache_clear()
        yield
    golden_target.cache_clear()
    golden_plan.cache_clear()


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("head", HEADS)
def test_every_round_of_every_run(head):
    """Drafts, confidences, verified and accepted counts, and the text; all runs of a head as one ragged batch."""
    goldens = golden_runs(head)
    for golden, (tokens, rounds) in zip(goldens, replay(head, goldens), strict=True):
        assert tokens[: golden["max_new_tokens"]] == golden["output_ids"]
        wanted = golden["rounds"]
        assert len(rounds) >= len(wanted)
        for index, (got, want) in enumerate(zip(rounds, wanted, strict=False)):
            drafted = len(want["draft_tokens"])  # an EAGLE-3 chain of the reference ends at a stop token
            assert (got["start"], got["anchor"]) == (want["start"], want["anchor"])
            assert got["draft_tokens"][:drafted] == want["draft_tokens"]
            assert min(got["verify_len"], drafted) == want["verify_len"]
            if want.get("confidence_logits") is not None:
                probs = torch.tensor(want["confidence_logits"]).sigmoid().tolist()
                assert got["confidence"] == pytest.approx(probs, abs=TOLERANCE / 4)
            if index + 1 < len(rounds):  # accepted drafts and one more token lead to the next anchor
                assert rounds[index + 1]["start"] - got["start"] - 1 == want["accepted"]
            elif want["terminated_by_stop_token"]:
                stop = next(i for i, token in enumerate(tokens) if token in golden["stop_token_ids"])
                assert len(golden["input_ids"]) + stop - got["start"] in (want["accepted"], want["accepted"] + 1)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("head", HEADS)
def test_tensors_of_the_first_rounds(head, monkeypatch):
    """Hidden states of the block, logits before and after the Markov bias, and layer 0's context K/V."""
    goldens = golden_tensors(head)
    runs = [r for r in golden_runs(head) if not r.get("confidence_threshold") and 10 not in r["stop_token_ids"]]
    for prompt, golden in enumerate(runs[:4]):
        engine = make_engine(target_of(head), golden_plan(head), page_size=8)
        drafter, store = engine.drafter, engine.runner.store
        block, confidence = [], []
        if getattr(drafter._head, "confidence", None):
            heard = type(drafter._head.confidence).logits.__get__(drafter._head.confidence)
            monkeypatch.setattr(
                drafter._head.confidence, "logits", lambda *a, f=heard, out=confidence: out.append(f(*a)) or out[-1]
            )
        if head != "eagle3":
            plain = drafter._head.block
            spied = lambda *a, f=plain, out=block: out.append(f(*a)) or out[-1]  # noqa: E731
            drafter._head = replace(drafter._head)  # the plan's own stays as it is
            object.__setattr__(drafter._head, "block", spied)
            if drafter._head.native is not None:  # its sampler shows no logits; test_native_head.py compares it
                drafter._head.__dict__["native"] = replace(drafter._head.native, sampler=None)
        request = make_request("r", golden["input_ids"], temperature=0.0, max_tokens=40)
        request.speculation = type(request.speculation)(max_draft_tokens=7)
        engine.add(request)
        done = 0
        if len(golden["input_ids"]) == 1:  # the reference does not draft from the prompt's only token
            request.speculation = type(request.speculation)(enabled=False)
            engine.step()
            request.speculation = type(request.speculation)()
        while done < 2:
            drafter._drawer = recorder = Recorder(Drawer("coupled", target_of(head).info.vocab_size))
            block.clear()
            confidence.clear()
            start, pages = len(request.token_ids) - 1, list(request.pages)
            engine.step()
            if not recorder.logits:
                continue
            key = f"p{prompt}.r{done}."

            def check(name, got, key=key):
                torch.testing.assert_close(got, goldens[key + name][0], atol=TOLERANCE, rtol=0)

            assert start == golden["rounds"][done]["start"]
            check("draft_logits", torch.cat(recorder.logits))
            if key + "confidence_logits" in goldens:
                check("confidence_logits", torch.cat(confidence))
            if block:
                check("block_hidden", block[0][0])
                if key + "base_logits" in goldens:
                    check("base_logits", drafter._head.base_logits(block[0])[0])
            shift = 1 if head == "eagle3" else 0  # entry i is kept in the slot of token i + 1
            count = goldens[key + "kv_l0_k"].shape[2] - (0 if head == "eagle3" else 7)
            first = len(target_of(head).info.kv_layers)
            position = torch.arange(count - shift) + shift
            slots = torch.tensor(pages)[position // 8] * 8 + position % 8
            for name, stored in (("kv_l0_k", store.keys), ("kv_l0_v", store.values)):
                got = stored[first].flatten(0, 1)[slots].transpose(0, 1)
                torch.testing.assert_close(got, goldens[key + name][0][:, : count - shift], atol=TOLERANCE, rtol=0)
            done += 1
