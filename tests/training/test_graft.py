"""From nothing to a head on disk with a tiny random target: written, trained, stopped, resumed, calibrated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import write_tiny_model

from dspark_serve.training.command import GraftOptions, HeadShape, graft, head_config, recalibrate
from dspark_serve.training.graft import BEST, Grafter, TrainOptions
from dspark_serve.training.passages import PassageSource, is_held_out
from dspark_serve.training.records import RecordReader
from dspark_serve.training.synthesize import SynthesisOptions, file_turns, grammar_turns, synthesize
from dspark_serve.training.target import TargetWeights
from dspark_serve.training.topics import OPEN, load_grammar

SHAPE = HeadShape(layers=1, markov_rank=4, block_size=3, taps=(-1, 0), draft_vocab=64, mask_token_id=299)
TRAIN = TrainOptions(updates=6, anchors_per_passage=8, held_out=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> Path:
    """Text of the tiny target, written in two goes."""
    directory = tmp_path_factory.mktemp("records")
    options = SynthesisOptions(
        str(model),
        (-1, 0, 1),
        rows=8,
        max_answer_tokens=24,
        max_turn_tokens=8,
        max_prompt_tokens=200,
        kv_cache_gib=0.01,
    )
    first = synthesize(options, directory, lambda: False, print, max_tokens=400)
    assert first >= 400
    assert synthesize(options, directory, lambda: False, print, max_tokens=first + 400) >= first + 400
    return directory


def test_recorded_states_give_the_targets_own_distribution(model, written):
    weights = TargetWeights.load(model)
    source = PassageSource(written, weights, (0,))
    conversations = source.reader.conversations
    assert len({c.index for c in conversations}) == len(conversations) > 8
    for conversation in conversations[:10]:
        passage = source.load(conversation)
        logits = weights.logits(passage.last_hidden)[passage.num_prompt - 1 :]
        torch.testing.assert_close(logits.logsumexp(-1), torch.tensor(conversation.log_totals), atol=0.02, rtol=0)
        if conversation.temperature == 0.0:
            agree = logits.argmax(-1) == torch.tensor(conversation.answer)
            assert agree.float().mean() > 0.95  # but for half precision


def make(model: Path, written: Path, options: TrainOptions) -> Grafter:
    weights = TargetWeights.load(model, SHAPE.layers)
    config = head_config(SHAPE, weights, model)
    return Grafter.create(options, PassageSource(written, weights, config.taps), weights, config)


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
    assert facts["training"]["updates"] == 6
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
