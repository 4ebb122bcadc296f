"""HeadConfig: DeepSpec's config.json in and out, and refusals that name the numbers."""

from dataclasses import replace

import pytest

from dspark_serve.drafters.head_config import HeadConfig, HeadError

QWEN = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "num_target_layers": 6,
    "target_layer_ids": [-1, 2, 4],
    "block_size": 7,
    "mask_token_id": 511,
    "markov_rank": 16,
    "markov_head_type": "rnn",
    "enable_confidence_head": True,
    "confidence_head_with_markov": False,
}


def test_parse_and_write():
    config = HeadConfig.parse(QWEN)
    assert (config.kind, config.family, config.taps, config.markov_type) == ("dspark", "qwen3", (-1, 2, 4), "rnn")
    assert config.drafted_tokens == 512
    assert HeadConfig.parse(config.to_dict()) == config
    small = replace(config, draft_vocab_size=100)
    assert small.to_dict()["draft_vocab_size"] == 100
    assert HeadConfig.parse(small.to_dict()) == small
    assert small.drafted_tokens == 100


def test_dflash_lacks_the_keys_of_what_it_lacks():
    config = HeadConfig.parse(QWEN)
    written = replace(config, markov_rank=0, markov_type="vanilla", confidence=False).to_dict()
    assert "markov_head_type" not in written
    assert "confidence_head_with_markov" not in written
    assert HeadConfig.parse(written).markov_rank == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"block_size": None}, "cannot be read"),
        ({"mask_token_id": 512}, "512"),
        ({"rope_parameters": {}}, "rope_theta"),
        ({"target_layer_ids": [4, 2]}, "[4, 2]"),
        ({"num_key_value_heads": 3}, "3"),
        ({"draft_vocab_size": 513}, "513"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention"),
        ({"markov_head_type": "lstm"}, "lstm"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(HeadError, match=words.replace("[", r"\[").replace("]", r"\]")):
        HeadConfig.parse({**QWEN, **change})


def test_missing_key_is_named():
    with pytest.raises(HeadError, match="mask_token_id"):
        HeadConfig.parse({key: value for key, value in QWEN.items() if key != "mask_token_id"})


@pytest.mark.parametrize(
    ("target", "numbers"),
    [((500, 64, 6), ("512", "500")), ((512, 32, 6), ("64", "32")), ((512, 64, 5), ("6", "5"))],
)
def test_a_head_for_another_target(target, numbers):
    with pytest.raises(HeadError, match=".*".join(numbers)):
        HeadConfig.parse(QWEN).check_target(*target)


def test_the_last_layer_cannot_be_tapped():
    HeadConfig.parse({**QWEN, "target_layer_ids": [4]}).check_target(512, 64, 6)
    for taps in ([5], [-2, 1]):
        with pytest.raises(HeadError, match="4"):
            HeadConfig.parse({**QWEN, "target_layer_ids": taps}).check_target(512, 64, 6)
