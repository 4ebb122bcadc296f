"""The files in configs/ are read as a server reads them, and say what their comments claim."""

import re
from pathlib import Path

import pytest

from dspark_serve.config import Config, ConfigError, load_config
from dspark_serve.models.catalog import CATALOG

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(file for file in CONFIGS.iterdir() if file.is_file() and file.name != "compose.yaml")


def loaded(name: str) -> Config:
    return load_config(file=CONFIGS / name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_loads(file: Path) -> None:
    assert file.suffix == ".yaml"
    assert (load_config(file=file) == Config()) == (file.stem == "cpu-default")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_key_nobody_knows_would_be_seen(file: Path, tmp_path: Path) -> None:
    changed = tmp_path / file.name
    changed.write_text(file.read_text(encoding="utf-8").replace("  model:", "  modell:", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key 'modell' in section 'model'"):
        load_config(file=changed)


def test_the_default_needs_no_download_by_hand() -> None:
    """And is what a server without a file does."""
    config = loaded("cpu-default.yaml")
    assert config.model.model in CATALOG
    assert config.speculation.budget == "auto"


@pytest.mark.parametrize("file", [file for file in FILES if "dspark" in file.stem], ids=lambda file: file.stem)
def test_a_head_is_drafted_with_as_it_was_trained(file: Path) -> None:
    config = load_config(file=file)
    size = config.model.model.rpartition("-")[2].lower()
    assert config.speculation.head == f"deepseek-ai/dspark_qwen3_{size}_block7"  # the head of this very model
    assert (config.speculation.method, config.speculation.num_speculative_tokens) == ("dspark", 7)
    assert (config.model.device, config.model.dtype) == ("cuda", "bfloat16")
    assert config.server.host == "127.0.0.1"
    assert config.server.api_key is None  # a key in a published file is no key


def test_shared_memory_is_left_to_the_system() -> None:
    assert loaded("dgx-spark-qwen3-4b-dspark.yaml").cache.gpu_memory_utilization <= 0.45
    assert loaded("h100-qwen3-8b-dspark.yaml").cache.gpu_memory_utilization == 0.9


def test_memory_adds_up_as_the_comments_say() -> None:
    """Weights and K/V of the comments against the fraction and the machine: 80 GB, and 128 GB shared."""
    token_bytes = 36 * 8 * 128 * 2 * 2
    assert token_bytes == 144 << 10
    h100, spark = loaded("h100-qwen3-8b-dspark.yaml"), loaded("dgx-spark-qwen3-4b-dspark.yaml")
    small = loaded("h100-qwen3-4b-dspark.yaml")
    for config, total, weights in ((h100, 80e9, 16.4e9), (spark, 128e9, 8.0e9), (small, 80e9, 8.0e9)):
        assert config.model.max_model_len is not None
        left = config.cache.gpu_memory_utilization * total - weights - 3e9  # the head and activations
        assert left > 8 * config.model.max_model_len * token_bytes  # some requests at full length
        everything = config.engine.max_num_seqs * config.model.max_model_len * token_bytes
        assert left < everything
    assert h100.cache.gpu_memory_utilization * 80e9 - 16.4e9 - 3e9 > 50e9
    assert small.cache.gpu_memory_utilization * 80e9 - 8.0e9 - 3e9 > 60e9


def test_a_cpu_for_many_has_room_for_them() -> None:
    config = loaded("cpu-throughput.yaml")
    token_bytes = 30 * 3 * 64 * 2 * 4
    assert token_bytes == 45 << 10
    assert config.cache.kv_cache_gib is not None
    assert config.cache.kv_cache_gib * 2**30 // token_bytes // config.engine.max_num_seqs in range(1400, 1500)
    assert config.speculation.method == "none"


def test_containers_are_documented_with_these_files() -> None:
    """README's lines for both machines: the file is there, and no flag takes more memory than it."""
    text = (CONFIGS.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^docker run --gpus all .* serve --config /etc/dspark-serve/(\S+)(.*)$", text, re.MULTILINE)
    assert {name.partition("-qwen3")[0] for name, _ in lines} == {"h100", "dgx-spark"}
    for name, flags in lines:
        given = re.findall(r"--gpu-memory-utilization (\S+)", flags)
        assert all(float(share) <= loaded(name).cache.gpu_memory_utilization for share in given)
