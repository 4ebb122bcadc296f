"""Where options come from, who wins, and what is said of a wrong one."""

import json
from pathlib import Path

import pytest

from dspark_serve.config import Config, ConfigError, leaves, load_config, unknown_variables


def test_leaf_names_are_unique_and_described():
    names = [name for _, name, _ in leaves()]
    assert len(names) == len(set(names))
    assert all(info.description for _, _, info in leaves())


def test_defaults():
    assert load_config() == Config()


def test_precedence(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("server: {port: 1, host: a}\nengine: {seed: 1, max_num_seqs: 1}\nmodel:\n")
    environment = {"DSPARK_PORT": "2", "DSPARK_SEED": "2", "DSPARK_HOST": ""}
    config = load_config({"port": 3, "seed": None}, environment=environment, file=file)
    assert (config.server.port, config.engine.seed, config.engine.max_num_seqs, config.server.host) == (3, 2, 1, "a")
    assert load_config(environment={"DSPARK_CONFIG": str(file)}).server.port == 1


def test_environment_values_have_the_options_types():
    environment = {"DSPARK_ENABLE_PREFIX_CACHING": "false", "DSPARK_KV_CACHE_GIB": "0.5", "DSPARK_MAX_MODEL_LEN": "64"}
    config = load_config(environment=environment)
    assert config.cache.enable_prefix_caching is False
    assert (config.cache.kv_cache_gib, config.model.max_model_len) == (0.5, 64)


def test_speculative_config():
    asked = {"method": "ngram", "num_speculative_tokens": 7}
    for value in (asked, json.dumps(asked)):
        assert load_config(speculative_config=value).speculation.num_speculative_tokens == 7
    environment = {"DSPARK_SPECULATIVE_CONFIG": json.dumps(asked), "DSPARK_METHOD": "none"}
    speculation = load_config({"num_speculative_tokens": 2}, environment=environment).speculation
    assert (speculation.method, speculation.num_speculative_tokens) == ("none", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sever: {port: 1}", "unknown section 'sever'; did you mean 'server'"),
        ("port: 1", "'port'; it belongs under 'server'"),
        ("server: {prot: 1}", "unknown key 'prot' in section 'server'; did you mean 'port'"),
        ("model: {port: 1}", "it belongs under 'server'"),
        ("server: [1]", "must be a mapping"),
        ("- 1", "must hold a mapping"),
        ("server: {port: [}", "not valid YAML"),
        ("server: {port: many}", "port: Input should be a valid integer"),
    ],
)
def test_wrong_files_are_told_by_name(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file=file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"flags": {"max_num_seq": 1}}, "unknown option 'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"flags": {"max_num_seqs": 0}}, "--max-num-seqs: "),
        ({"environment": {"DSPARK_MAX_NUM_SEQS": "x"}}, "DSPARK_MAX_NUM_SEQS: "),
        ({"flags": {"dtype": "int4"}}, "--dtype: "),
        ({"speculative_config": "{"}, "--speculative-config is not valid JSON"),
        ({"speculative_config": "[1]"}, "must be a JSON object"),
        ({"speculative_config": {"num_speculative_token": 1}}, "did you mean 'num_speculative_tokens'"),
        ({"speculative_config": {"method": "magic"}}, "--speculative-config, method: "),
        ({"file": "/nowhere.yaml"}, "cannot read /nowhere.yaml: No such file"),
    ],
)
def test_wrong_options_are_told_with_their_source(sources, message):
    with pytest.raises(ConfigError) as caught:
        load_config(**sources)
    assert message in str(caught.value)


def test_unknown_variables():
    found = unknown_variables(["DSPARK_PROT", "DSPARK_CACHE", "DSPARK_CONFIG", "DSPARK_MODEL", "HOME"])
    assert len(found) == 1
    assert "DSPARK_PROT" in found[0]
    assert "DSPARK_PORT" in found[0]


def test_shipped_configurations_load():
    files = set((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    files = {file for file in files if file.name != "compose.yaml"}  # how a server is started, not how it is configured
    assert files
    for file in files:
        load_config(file=str(file))
