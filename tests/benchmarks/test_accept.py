"""benchmarks/accept.py on a tiny trained target: what it computes offline is what an engine does, round by round."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_serve.drafters.base import DrafterPlan
from dspark_serve.drafters.copies import Copies
from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.portfolio import PortfolioDrafter
from dspark_serve.training.anchors import Passage
from dspark_serve.training.passages import PassageSource
from dspark_serve.training.target import TargetWeights
from tests.drafters.golden import GOLDENS, golden_target
from tests.drafters.made_heads import plan_named
from tests.tiny_model import byte_tokenizer
from tests.toy import make_engine, make_request

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
accept = importlib.import_module("accept")

HEAD, SIZE = GOLDENS / "dspark_vanilla", 7
TEXTS = (
    "count from 4 to 9:",
    "add 3 and 4 to get 7.\nshe put the",
    "two boats came home before the heavy rain fell.\nletters: a b c d",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The golden target with a tokenizer that renders a chat as its bare text."""
    directory = tmp_path_factory.mktemp("model")
    shutil.copytree(GOLDENS / "target", directory, dirs_exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prompts")
    for index, name in enumerate(accept.SETS):
        lines = [json.dumps({"turns": [text, "never asked"]}) for text in TEXTS[index % 3 :][:2]]
        (directory / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def measured(model, prompts, tmp_path_factory):
    """What the program writes, and the texts it measured on."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["--model", model, "--head", HEAD, "--prompts", prompts, "--records", out / "r", "--json", out / "j"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accept, "ANSWER_TOKENS", 40)
        patch.setattr(sys, "argv", ["accept.py", "--quick", *map(str, arguments)])
        accept.main()
        first = json.loads((out / "j").read_text())
        patch.setattr(accept, "answer", None)  # the second run takes the texts of the first
        accept.main()
    assert json.loads((out / "j").read_text())["accepted"] == first["accepted"]
    return first, PassageSource(out / "r", TargetWeights.load(model), (1, 4)).reader.conversations


def portfolio_that_always_looks_up(monkeypatch):
    monkeypatch.setattr(PortfolioDrafter, "_better_copied", lambda self, rows, requests, chances: [*map(bool, chances)])
    return plan_named("portfolio")


def rounds_of_an_engine(plan, conversation):
    """Accepted drafts of every round whose block lies within the text, by serving the prompt alone."""
    request = make_request(
        "r",
        conversation.prompt,
        temperature=conversation.temperature,
        seed=conversation.seed,
        max_tokens=len(conversation.answer),
        ignore_eos=True,
    )
    engine = make_engine(golden_target(), plan)
    engine.add(request)
    rounds = []
    while engine.has_work:
        anchor = len(request.token_ids) - 1
        (row,) = engine.step().rows
        if anchor >= len(conversation.prompt) and anchor + SIZE < len(conversation.tokens):
            rounds.append(row.n_accepted)
    assert request.token_ids == list(conversation.tokens)
    return rounds


@pytest.mark.parametrize("mode", ["T0", "T1 coupled"])
@pytest.mark.parametrize("name", ["head", "ngram", "portfolio"])
def test_rounds_are_those_of_an_engine(measured, mode, name, monkeypatch):
    """Exactly for lookups; heads read states in half precision offline, which may turn a draft now and then."""
    table, conversations = measured
    plans = {
        "head": lambda: plan_named("dspark_vanilla"),
        "ngram": lambda: DrafterPlan("ngram", lambda store, first: NgramDrafter(SIZE)),
        "portfolio": lambda: portfolio_that_always_looks_up(monkeypatch),
    }
    rounds = {}
    for conversation in conversations:
        if (conversation.temperature == 0) == (mode == "T0"):
            found = rounds_of_an_engine(plans[name](), conversation)
            rounds.setdefault(conversation.kind, []).extend(found)
    got = table["accepted"][f"{mode} {name}"]
    assert set(got) == {*accept.SETS, "mean"}
    for kind, accepted in rounds.items():
        length = 1 + sum(accepted) / len(accepted)
        assert got[kind]["accepted_length"] == pytest.approx(length, rel=1e-9 if name == "ngram" else 0.03)
        assert got[kind]["rounds"] == pytest.approx(len(accepted), rel=1e-9 if name == "ngram" else 0.03)
    lengths = [got[kind]["accepted_length"] for kind in accept.SETS]
    assert got["mean"]["accepted_length"] == pytest.approx(sum(lengths) / 4)
    assert got["mean"]["accepted_length"] > (1.1 if name == "ngram" else 1.5)


def test_rejection_is_measured_on_sampled_texts(measured):
    """As often as an engine's rejection accepts, over texts of its own: the same in the mean only."""
    table, conversations = measured
    got = [entry for kind, entry in table["accepted"]["T1 rejection head"].items() if kind != "mean"]
    plan = plan_named("dspark_vanilla", "rejection")
    engine = make_engine(golden_target(), plan, mode="rejection", pages=2000, seqs=64)
    sampled = [c for c in conversations if c.temperature == 1]
    for number, conversation in enumerate(sampled * 12):
        prompt = conversation.prompt
        engine.add(make_request(f"r{number}", prompt, seed=number, temperature=1.0, max_tokens=40, ignore_eos=True))
    rounds = [row.n_accepted for row in rows_of(engine) if row.n_kept == SIZE]
    lengths, weights = zip(*[(entry["accepted_length"], entry["rounds"]) for entry in got], strict=True)
    assert np.average(lengths, weights=weights) == pytest.approx(1 + np.mean(rounds), rel=0.25)
    assert len({c.seed for c in conversations}) == len(conversations)


def rows_of(engine):
    while engine.has_work:
        yield from engine.step().rows


def test_lookups_are_those_of_the_drafter_as_the_text_grows():
    draw = np.random.default_rng(0)
    for trial in range(20):
        tokens = draw.integers(0, 3 + trial % 4, 60).tolist() + [1, 2, 3] * 5
        passage = Passage(torch.tensor(tokens), torch.zeros(0), torch.zeros(0), torch.zeros(0), 4)
        matches, found = accept.lookup(passage, SIZE)
        assert len(matches) == len(tokens) - 5
        copies = Copies(2, 5)
        request = make_request("r", tokens[:4])
        request.token_ids = tokens[:4]
        for row, anchor in enumerate(range(4, len(tokens) - 1)):
            request.token_ids.append(tokens[anchor])
            drafts = copies.tokens(request, SIZE)
            assert found[row] == bool(drafts)
            real = tokens[anchor + 1 : anchor + 1 + SIZE]
            wanted = [a == b for a, b in zip(drafts or [-1] * SIZE, real, strict=False)]
            assert matches[row].tolist() == wanted + [False] * (SIZE - len(real))
        assert found.any()
        assert matches[-1].tolist() == [True] + [False] * (SIZE - 1)  # the text ends in a copy


def test_tables_by_hand():
    table = accept._table({"a": [np.array([0, 2]), np.array([1])], "b": [np.array([3])]}, 3)
    assert table["a"] == {"accepted_length": 2.0, "rounds": 3, "by_slot": (2 / 3, 1 / 2, 0.0)}
    assert table["b"]["accepted_length"] == 4.0
    assert table["mean"] == {"accepted_length": 3.0}  # sets weigh the same, whatever their size
