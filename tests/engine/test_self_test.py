"""The self-test of a head: what it asks, what it counts, what it promises against, and where it draws its lines."""

import json
from types import SimpleNamespace

import pytest

from dspark_serve.engine.self_test import _MAX_TOKENS, SelfTest, expected_length, run_self_test
from dspark_serve.reports import RowReport, StepReport
from tests.tiny_model import byte_tokenizer


class Scripted:
    """An engine that says what it is told to, and remembers what it was asked."""

    def __init__(self, steps=(), model_dir="", max_model_len=500):
        self.info = SimpleNamespace(model_dir=model_dir, max_model_len=max_model_len, vocab_size=300)
        self._steps, self.asked = list(steps), []

    def add(self, request):
        self.asked.append(request)

    @property
    def has_work(self):
        return bool(self._steps)

    def step(self):
        return StepReport(rows=self._steps.pop(0))


def test_only_verified_drafts_of_the_head_count(tmp_path):
    steps = [
        (RowReport(5, 5, 3, "dspark"), RowReport(5, 5, 5, "ngram")),
        (RowReport(5, 2, 0, "dspark"), RowReport(0, 0, 0)),  # the last row had nothing to verify
        (RowReport(5, 5, 4, "dspark"),),
    ]
    result = run_self_test(Scripted(steps), tmp_path)
    assert (result.num_steps, result.expected) == (3, None)
    assert result.measured == pytest.approx(1 + 7 / 3)


def test_nothing_drafted_is_no_verdict(tmp_path):
    result = run_self_test(Scripted([(RowReport(0, 0, 0),)]), tmp_path)
    assert (result.num_steps, result.measured, result.worthless) == (0, 1.0, False)
    assert result.warnings("x", insisted=False) == ()


def test_asks_greedily_and_as_chat(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    engine = Scripted(model_dir=str(tmp_path), max_model_len=90)
    run_self_test(engine, tmp_path)
    for request in engine.asked:
        assert request.params.greedy
        assert request.params.ignore_eos
        text = bytes(request.prompt_token_ids).decode()
        assert text.startswith("<|user|>")
        assert text.endswith("\n<|assistant|>")
        assert 0 < request.params.max_tokens == min(_MAX_TOKENS, 90 - len(request.prompt_token_ids))
    lengths = [len(request.prompt_token_ids) for request in engine.asked]
    assert 0 < len(lengths) < 4  # one prompt of the four is longer than this model's context


def test_asks_something_without_a_tokenizer(tmp_path):
    engine = Scripted()
    run_self_test(engine, tmp_path)
    assert len({request.prompt_token_ids for request in engine.asked}) == 4
    assert all(0 <= token < 300 for request in engine.asked for token in request.prompt_token_ids)


@pytest.mark.parametrize(
    ("measured", "expected", "words"),
    [
        (1.04, None, "below 1.05; serving without speculation"),
        (1.04, 1.1, "below 1.05; serving without speculation"),
        (1.06, None, None),
        (1.06, 1.08, None),
        (1.69, 2.0, "far below the 2.00 stored with it"),  # less than 0.7 of the drafts that were promised
        (1.71, 2.0, None),
        (2.5, 2.0, None),
    ],
)
def test_warnings(measured, expected, words):
    (*found,) = SelfTest(measured, expected, 10).warnings("some/head", insisted=False)
    assert len(found) == (words is not None)
    assert all(words in sentence and f"some/head reaches {measured:.2f}" in sentence for sentence in found)


def test_insisting_is_said():
    assert "because the budget insists" in SelfTest(1.0, 2.0, 10).warnings("x", insisted=True)[0]


@pytest.mark.parametrize(
    ("stored", "length"),
    [
        (json.dumps({"expected_accepted_length": {"greedy": 2.5, "rejection": 2.0}}), 2.5),
        (json.dumps({"expected_accepted_length": 1.5}), 1.5),
        (json.dumps({"expected_accepted_length": {"sampled": 2.0}}), None),
        (json.dumps({"expected_accepted_length": None}), None),
        ("{}", None),
        ("not JSON", None),
        (None, None),
    ],
)
def test_stored_length(tmp_path, stored, length):
    if stored is not None:
        (tmp_path / "dspark.json").write_text(stored)
    assert expected_length(tmp_path) == length
