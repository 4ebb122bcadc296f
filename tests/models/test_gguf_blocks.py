"""GGUF's quantised matrices served as they are: every value and every logit as if they had been widened first."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gguf_files import LLAMA_SHAPE, Shape, original_weights, random_blocks, write_gguf
from helpers import run_one

from dspark_kernels import native
from dspark_kernels.blocks import BlockWeight
from dspark_serve.models.gguf_blocks import _LAYOUTS, _read
from dspark_serve.models.loader import iterate_stored, load_model, resolve

Q = gguf.GGMLQuantizationType


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", sorted(_LAYOUTS))
def test_any_bytes_mean_what_gguf_says(kind: str) -> None:
    data = random_blocks(Q[kind], (64, 1024))
    expected = torch.from_numpy(gguf.dequantize(data, Q[kind]))
    assert torch.equal(_read(kind, data, expected.shape).dequantize(), expected)


@pytest.mark.parametrize("kind", sorted(_LAYOUTS))
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.usefixtures("own_cache")
def test_logits_have_the_bits_of_the_widened_model(arch: str, kind: str, tmp_path: Path) -> None:
    shape = Shape(hidden=256, inner=512, head_dim=64) if kind.endswith("_K") else LLAMA_SHAPE
    write_gguf(tmp_path / "tiny.gguf", arch, original_weights(arch, shape), Q[kind], shape=shape)
    resolved = resolve(str(tmp_path / "tiny.gguf"))
    stored = dict(iterate_stored(resolved.path))
    matrices = {name for name, weight in stored.items() if len(weight.shape) == 2}
    assert {name for name, weight in stored.items() if isinstance(weight, BlockWeight)} == matrices
    served, widened = load_model(resolved), load_model(resolved, "float32")
    tokens = [5, 9, 100, 7, 7, 30]
    assert torch.equal(run_one(served, tokens).logits, run_one(widened, tokens).logits)
    assert "weights in float32" in widened.info.backend
    if native.load() is not None:
        assert f"{4 if kind in ('Q4_0', 'Q4_1', 'Q4_K') else 8}-bit blocks" in served.info.backend


@pytest.mark.usefixtures("own_cache")
def test_mixed_files_and_widths_that_fill_no_block(tmp_path: Path) -> None:
    """As llama.cpp's mixes have them: one part of a fused matrix in other blocks, or in floats."""
    weights = original_weights("llama")
    for odd in (Q.Q8_0, Q.F16):
        path = tmp_path / f"mixed-{odd.name}.gguf"
        write_gguf(path, "llama", weights, Q.Q4_1, exceptions={"attn_v": odd, "ffn_up": odd})
        resolved = resolve(str(path))
        served, widened = load_model(resolved), load_model(resolved, "float32")
        tokens = [3, 1, 4, 1, 5]
        assert torch.equal(run_one(served, tokens).logits, run_one(widened, tokens).logits)


@pytest.mark.usefixtures("own_cache")
def test_plain_torch_serves_the_same_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama", original_weights("llama"), Q.Q4_1)
    resolved = resolve(str(tmp_path / "tiny.gguf"))
    tokens = [5, 9, 100, 7]
    plain = run_one(load_model(resolved, kernels="torch"), tokens).logits
    torch.testing.assert_close(run_one(load_model(resolved), tokens).logits, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("own_cache")
def test_a_damaged_blocks_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    from dspark_serve.models.blocks_file import BLOCKS_FILE
    from dspark_serve.models.catalog import LoadError

    write_gguf(tmp_path / "tiny.gguf", "llama", original_weights("llama"), Q.Q4_1)
    resolved = resolve(str(tmp_path / "tiny.gguf"))
    file = resolved.path / BLOCKS_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoadError, match=BLOCKS_FILE):
        load_model(resolved)


def test_the_default_model_is_served_in_its_blocks(smollm2_dir: Path) -> None:
    stored = dict(iterate_stored(smollm2_dir))
    blocks = {name: weight for name, weight in stored.items() if isinstance(weight, BlockWeight)}
    assert len(blocks) == 211  # seven matrices in each of thirty layers, and the embedding
    assert {name for name, weight in blocks.items() if weight.bits == 8} == {"model.embed_tokens.weight"}
