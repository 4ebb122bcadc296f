"""Heads through the composition root and the offline API: options, refusals, budgets, reports, the self-test."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_kernels import native
from dspark_kernels.packed import PackedWeight
from dspark_serve.config import ConfigError, load_config
from dspark_serve.drafters.head_config import HeadError
from dspark_serve.drafters.heads import plan_head
from dspark_serve.engine.build import build_engine, with_shipped_head
from dspark_serve.llm import LLM, SamplingParams
from dspark_serve.models.catalog import CATALOG
from dspark_serve.models.loader import ResolvedModel, load_model, resolve
from dspark_serve.speculation.fixed import FixedBudget
from dspark_serve.tensors import Proposal
from dspark_serve.types import SpeculationParams
from tests.drafters.golden import GOLDENS, golden_runs, golden_target

TARGET = str(GOLDENS / "target")
PROMPTS = [{"prompt_token_ids": run["input_ids"]} for run in golden_runs("dflash")[::2]]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def offline(head=None, **options):
    """Every draft is verified unless the options say otherwise: on a target this small none would pay."""
    head = None if head is None else str(GOLDENS / head)
    return LLM(TARGET, head=head, **{"kv_cache_gib": 0.01, "max_num_seqs": 8, "budget": "full", **options})


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def plain():
    return tokens(offline(method="none").generate(PROMPTS, PARAMS, use_tqdm=False))


def test_a_head_by_its_directory(plain):
    llm = offline("dspark_vanilla", per_request_spec_decode_metrics="detailed")
    assert (llm.info.drafter, llm.info.num_speculative_tokens) == ("dspark", 7)
    assert 0 < llm.info.head_bytes < llm.info.separate_draft_bytes
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert tokens(outputs) == plain
    for output in outputs:
        stats = output.outputs[0].metrics.speculative_decoding
        assert sum(stats.per_step_accepted) == stats.num_accepted_tokens > 0
        assert sum(stats.per_step_drafted) == stats.num_kept_tokens
        assert stats.by_drafter["dspark"].num_accepted_tokens == stats.num_accepted_tokens


@pytest.mark.parametrize("head", ["dspark_rnn", "eagle3"])
def test_a_head_runs_by_the_targets_kernels(head, monkeypatch):
    """`--kernels torch` is for both; otherwise both use the C++ ones, which pack every matrix they multiply by."""
    if native.load() is None:
        pytest.skip("the C++ kernels are not built")
    made, pack = [], PackedWeight.__init__
    monkeypatch.setattr(PackedWeight, "__init__", lambda *a, **k: made.append(a) or pack(*a, **k))
    for kernels, is_native in (("torch", False), ("auto", True)):
        target = load_model(resolve(TARGET), "float32", "cpu", kernels=kernels)
        assert (target.info.kernels == "auto") == bool(made) == is_native
        before = len(made)
        plan_head(GOLDENS / head, target, "coupled")
        assert (len(made) > before) == is_native


def test_a_head_costs_its_own_layers_only():
    """The same head with and without copies of the target's embedding and LM head; and with an embedding of its own."""
    weights = load_file(GOLDENS / "dspark_vanilla" / "model.safetensors")
    own = sum(t.nbytes for name, t in weights.items() if name not in ("embed_tokens.weight", "lm_head.weight"))
    plan = plan_head(GOLDENS / "dspark_vanilla", golden_target(), "coupled")
    assert plan.num_bytes == own
    assert plan.separate_bytes == own + 512 * 64 * 4  # the target's are tied


def test_portfolio_says_who_drafted(plain):
    llm = offline("dspark_vanilla", method="portfolio")
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert tokens(outputs) == plain
    by_drafter = [output.outputs[0].metrics.speculative_decoding.by_drafter for output in outputs]
    assert {name for shares in by_drafter for name in shares} == {"dspark", "ngram"}
    silent = offline("dspark_vanilla", per_request_spec_decode_metrics="none")
    assert silent.generate(PROMPTS[:1], PARAMS, use_tqdm=False)[0].outputs[0].metrics.speculative_decoding is None


@pytest.mark.parametrize(("wanted", "most"), [(None, 16), (0, 0), (3, 3), (12, 12)])
def test_a_portfolio_drafts_no_more_than_was_asked_for(wanted, most):
    llm = offline("dspark_vanilla", method="portfolio", num_speculative_tokens=wanted)
    assert llm.info.num_speculative_tokens == most


def test_budgets(plain):
    llm = offline("dspark_vanilla", budget="fixed:2", per_request_spec_decode_metrics="detailed")
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert tokens(outputs) == plain
    drafted = [n for o in outputs for n in o.outputs[0].metrics.speculative_decoding.per_step_drafted]
    assert set(drafted) <= {1, 2}
    assert drafted.count(1) <= len(outputs)  # only an answer's end has no room for two
    assert llm.info.num_speculative_tokens == 2
    assert list(FixedBudget(2).choose(None, Proposal.from_lists([[1, 2, 3], [1], []]))) == [2, 1, 0]
    off = offline("dspark_vanilla", budget="off")
    assert off.info.drafter == "none"
    assert tokens(off.generate(PROMPTS, PARAMS, use_tqdm=False)) == plain
    wide = offline("dspark_vanilla", budget="fixed:9")  # more than the head drafts
    assert wide.info.num_speculative_tokens == 7
    for wrong in ("fixed:0", "fixed", "some"):
        with pytest.raises(ConfigError, match="budget"):
            load_config({"budget": wrong})


def test_the_shipped_head_waits_for_no_other_choice():
    name, entry = next((name, entry) for name, entry in CATALOG.items() if entry.head_dir is not None)
    from_catalog = ResolvedModel(Path("x"), name, "catalog")

    def chosen(resolved=from_catalog, **flags):
        speculation = with_shipped_head(load_config(flags).speculation, resolved)
        return speculation.method, speculation.head

    assert chosen() == ("portfolio", str(entry.head_dir))
    assert chosen(method="dspark") == ("dspark", str(entry.head_dir))
    assert chosen(budget="off") == (None, None)
    assert chosen(method="ngram") == ("ngram", None)
    assert chosen(method="none") == ("none", None)
    assert chosen(head="other") == (None, "other")
    assert chosen(ResolvedModel(Path("x"), name, "directory")) == (None, None)


def test_per_request_control():
    llm = offline("dspark_vanilla", per_request_spec_decode_metrics="detailed")
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, speculation=control)
        for control in (SpeculationParams(enabled=False), SpeculationParams(max_draft_tokens=1))
    ]
    off, one = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert off.outputs[0].metrics.speculative_decoding.num_draft_tokens == 0
    assert set(one.outputs[0].metrics.speculative_decoding.per_step_drafted) == {1}


def test_the_json_form():
    asked = {"method": "dspark", "model": "somewhere", "num_speculative_tokens": 3}
    speculation = load_config(speculative_config=json.dumps(asked)).speculation
    assert (speculation.method, speculation.head, speculation.num_speculative_tokens) == ("dspark", "somewhere", 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "dspark"}, "--head"),
        ({"method": "ngram", "head": "dflash"}, "does not use"),
        ({"method": "eagle3", "head": "dflash"}, "of the kind dflash"),
        ({"head": "gemma4_dspark_random/../target"}, "no draft head"),
    ],
)
def test_contradictions_are_refused(options, words):
    head = options.pop("head", None)
    with pytest.raises(ValueError if "draft head" not in words else HeadError, match=words):
        offline(head, **options)


@pytest.fixture
def changed(tmp_path):
    """A copy of a golden head with another config or other tensors."""

    def make(config=None, drop=(), tensors=None):
        shutil.copytree(GOLDENS / "dspark_vanilla", tmp_path / "head", dirs_exist_ok=True)
        path = tmp_path / "head" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        weights = load_file(tmp_path / "head" / "model.safetensors") | (tensors or {})
        save_file({n: t for n, t in weights.items() if n not in drop}, tmp_path / "head" / "model.safetensors")
        return tmp_path / "head"

    return make


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"hidden_size": 128}}, "128.*64"),
        ({"config": {"vocab_size": 600, "mask_token_id": 599}}, "600.*512"),
        ({"config": {"num_target_layers": 8}}, "8.*6"),
        ({"config": {"target_layer_ids": [1, 5]}}, "5.*4"),
        ({"config": {"num_key_value_heads": 4}}, r"\[32, 64\].*\[64, 64\]"),
        ({"config": {"target_layer_ids": [-2, 1]}}, r"\[-2, 1\].*4"),
        ({"config": {"markov_rank": 8}}, r"markov_w1.weight has shape \[512, 16\].*\[512, 8\]"),
        ({"config": {"block_size": 0}}, "block_size 0"),
        ({"config": {"num_hidden_layers": 3, "layer_types": None}}, r"lacks layers.2.input_layernorm.weight \[64\]"),
        ({"config": {"num_hidden_layers": 1, "layer_types": None}}, "no place for: layers.1"),
        ({"config": {"draft_vocab_size": 100}}, r"lacks draft_vocab \[100\]"),
        ({"drop": ["fc.weight"]}, r"lacks fc.weight \[64, 128\]"),
        ({"drop": ["confidence_head.proj.bias"]}, r"lacks confidence_head.proj.bias \[1\]"),
        ({"drop": ["layers.1.self_attn.k_norm.weight"]}, r"lacks layers.1.self_attn.k_norm.weight \[16\]"),
        ({"tensors": {"embed_tokens.weight": torch.zeros(500, 64)}}, r"\[500, 64\].*\[512, 64\]"),
        ({"tensors": {"extra": torch.zeros(1)}}, "no place for: extra"),
        ({"tensors": {"norm.weight": torch.full((64,), torch.nan)}}, "norm.weight.*not finite"),
    ],
)
def test_heads_that_do_not_fit(changed, change, words):
    with pytest.raises(HeadError, match=words):
        plan_head(changed(**change), golden_target(), "coupled")


@pytest.mark.parametrize(
    ("ids", "words"), [([*range(199), 7], "must ascend"), (range(400, 600), "must ascend within the vocabulary of 512")]
)
def test_a_draft_vocabulary_outside_the_targets_is_refused(changed, ids, words):
    tensors = {"draft_vocab": torch.tensor(list(ids), dtype=torch.int32)}
    tensors["markov_head.markov_w2.weight"] = torch.zeros(200, 16)
    with pytest.raises(HeadError, match=words):
        plan_head(changed(config={"draft_vocab_size": 200}, tensors=tensors), golden_target(), "coupled")


class TestHubIds:
    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        """A hub that has one head, one repository without weights, and says what it was asked for."""
        asked = []
        (tmp_path / "config.json").write_text((GOLDENS / "dspark_vanilla" / "config.json").read_text())
        shelf = {"someone/head": GOLDENS / "dspark_vanilla", "someone/config-only": tmp_path}

        def snapshot_download(repo, allow_patterns):
            asked.append((repo, allow_patterns))
            if repo not in shelf:
                raise OSError(f"404 Client Error.\n\nRepository Not Found for url: .../{repo}")
            return str(shelf[repo])

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    def test_a_head_by_its_hub_id(self, hub, plain):
        llm = LLM(TARGET, head="someone/head", kv_cache_gib=0.01)
        assert (llm.info.drafter, llm.info.head) == ("dspark", "someone/head")
        assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == plain
        for repo, patterns in hub:
            assert repo == "someone/head"
            assert {"*.json", "*.safetensors"} <= set(patterns)
            assert "*.py" not in patterns

    @pytest.mark.parametrize(
        ("head", "words"),
        [
            ("someone/nothing", "someone/nothing.*404 Client Error"),
            ("someone/config-only", "someone/config-only.*no safetensors weights"),
            ("no-such-directory", "no-such-directory.*no local directory"),
            ("smollm2.bin", "smollm2.bin.*pickle"),
        ],
    )
    def test_what_is_no_head_is_said(self, hub, head, words):
        with pytest.raises(HeadError, match=f"^the draft head {words}") as caught:
            LLM(TARGET, head=head, kv_cache_gib=0.01)
        assert "\n" not in str(caught.value)


def test_an_embedding_of_its_own_is_kept(changed):
    weights = load_file(GOLDENS / "dspark_vanilla" / "model.safetensors")
    whole = plan_head(GOLDENS / "dspark_vanilla", golden_target(), "coupled")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        path = changed(tensors={name: weights[name] * 1.01})
        assert plan_head(path, golden_target(), "coupled").num_bytes == whole.num_bytes + weights[name].nbytes


class TestSelfTest:
    def test_a_head_far_below_its_promise_is_warned_of(self, changed):
        path = changed()
        for promised, words in ((1.1, None), (6.5, "far below the 6.50")):
            (path / "dspark.json").write_text(json.dumps({"expected_accepted_length": {"greedy": promised}}))
            engine = build_engine(load_config({"model": TARGET, "head": str(path), "kv_cache_gib": 0.01}))
            assert engine.info.drafter == "dspark"
            if words is None:
                assert engine.info.warnings == ()
            else:
                assert words in engine.info.warnings[0]

    @pytest.mark.parametrize("limit", [{"budget": "fixed:1"}, {"num_speculative_tokens": 1}])
    def test_a_limit_on_drafts_is_no_fault_of_the_head(self, changed, limit):
        """Whole blocks keep this promise; their first draft alone would not."""
        path = changed()
        (path / "dspark.json").write_text(json.dumps({"expected_accepted_length": {"greedy": 1.8}}))
        engine = build_engine(load_config({"model": TARGET, "head": str(path), "kv_cache_gib": 0.01, **limit}))
        assert engine.info.warnings == ()

    def test_a_worthless_head_is_not_used_unless_insisted_on(self, changed):
        generator = torch.Generator().manual_seed(0)
        noise = {"fc.weight": torch.randn(64, 128, generator=generator)}
        noise["markov_head.markov_w2.weight"] = torch.randn(512, 16, generator=generator) * 9
        path = changed(tensors=noise)
        options = {"model": TARGET, "head": str(path), "kv_cache_gib": 0.01}
        engine = build_engine(load_config(options))
        assert engine.info.drafter == "none"
        assert "without speculation" in engine.info.warnings[0]
        engine = build_engine(load_config({**options, "head_self_test": False}))
        assert (engine.info.drafter, engine.info.warnings) == ("dspark", ())
        engine = build_engine(load_config({**options, "budget": "fixed:2"}))
        assert engine.info.drafter == "dspark"
        assert "insists" in engine.info.warnings[0]
