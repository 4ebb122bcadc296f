"""From nothing to a head on disk with a tiny random target: written, trained, stopped, resumed, calibrated."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_graft import SHAPE, TRAIN, check_states, make
from tiny_model import write_tiny_model

from dspark_serve.training.command import GraftOptions, graft, recalibrate
from dspark_serve.training.graft import BEST, Grafter
from dspark_serve.training.passages import PassageSource, is_held_out
from dspark_serve.training.records import RecordReader
from dspark_serve.training.synthesize import file_turns, grammar_turns
from dspark_serve.training.target import TargetWeights
from dspark_serve.training.topics import OPEN, load_grammar


def test_recorded_states_give_the_targets_own_distribution(model, written):
    check_states(model, written)


def test_same_seed_same_head_and_another_seed_another(model, written):
    heads = []
    for seed in (0, 0, 1):
        grafter = make(model, written, replace(TRAIN, seed=seed))
        for _ in range(4):
            grafter.step()
        heads.append(torch.cat([p.detach().flatten() for p in grafter.head.parameters()]))
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


def test_resumed_run_equals_an_uninterrupted_one(model, written, tmp_path):
    whole = make(model, written, TRAIN)
    for _ in range(6):
        whole.step()
    broken = make(model, written, TRAIN)
    for _ in range(3):
        broken.step()
    broken.save(tmp_path)
    resumed = Grafter.resume(TRAIN, broken.source, broken.weights, tmp_path)
    for _ in range(3):
        resumed.step()
    for (name, a), b in zip(whole.head.named_parameters(), resumed.head.parameters(), strict=True):
        assert a.equal(b), name
    assert resumed.anchors == whole.anchors


def test_training_helps(model, written):
    grafter = make(model, written, replace(TRAIN, updates=40))
    losses = [float(grafter.step().loss.detach()) for _ in range(20)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("variant", ["dspark", "dflash"])
def test_graft_command(model, written, tmp_path, variant):
    said: list[str] = []
    options = GraftOptions(str(model), tmp_path, TRAIN, replace(SHAPE, variant=variant), records=written, write=False)
    best = graft(options, said.append)
    assert best == tmp_path / BEST
    facts = json.loads((best / "dspark.json").read_text())
    weights = TargetWeights.load(model)
    assert facts["target_fingerprint"] == weights.fingerprint
    training = facts["training"]
    assert (training["updates"], training["device"], training["processes"]) == (6, "cpu", 1)
    assert training["anchors_per_s"] > 0 < training["tokens_per_s"]
    assert training["written_tokens_per_s"] == 0  # nobody wrote
    assert training["peak_device_gib"] is None
    assert any(re.search(r"trained on cpu: .* anchors/s, 0 answer tokens/s written$", line) for line in said)
    assert 1 <= facts["expected_accepted_length"]["greedy"] <= 4
    assert len(facts["calibration"]["greedy"]["slots"]) == 3
    tensors = load_file(best / "model.safetensors")
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(tensors)
    assert ("markov_head.markov_w2.weight" in tensors) == (variant == "dspark")
    report = (best / "report.json").read_text()
    recalibrate(str(model), best, written, said.append)
    assert (best / "report.json").read_text() == report


def test_command_writes_and_trains_at_once(model, tmp_path):
    train = replace(TRAIN, updates=3)
    options = GraftOptions(str(model), tmp_path, train, SHAPE, first_tokens=300, rows=8)
    assert graft(options, print) in (tmp_path / BEST, tmp_path)
    assert RecordReader(tmp_path / "records").conversations


def test_text_of_another_target_is_refused(written, tmp_path):
    other = TargetWeights.load(write_tiny_model(tmp_path, seed=1))
    with pytest.raises(ValueError, match="was written by"):
        PassageSource(written, other, (0,))


def test_held_out_texts_are_never_trained_on(model, written):
    grafter = make(model, written, TRAIN)
    for _ in range(10):
        grafter.step()
    held_out = {c.index for c in grafter.source.reader.conversations if is_held_out(c)}
    assert held_out
    assert not held_out & grafter.order.seen


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps(messages[:1]) + "\n")
    turns = file_turns(path, 1)
    assert [next(turns).messages for _ in range(2)] == [({"role": "user", "content": "a"},)] * 2
    path.write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(ValueError, match="line 1"):
        next(file_turns(path, 0))


def test_grammar_is_closed_and_addressed():
    grammar = load_grammar()
    for _, turn in zip(range(500), grammar_turns(0, 0), strict=False):
        text = turn.messages[0]["content"]
        assert "{story}" not in text
        assert OPEN not in text.removesuffix("...\n```") or turn.kind == "task"
    later = grammar_turns(0, 7)
    assert next(later) == [t for _, t in zip(range(8), grammar_turns(0, 0), strict=False)][7]
    assert set(grammar.kinds) <= set(grammar.table)
