"""Who runs by Triton, and what is said to those who asked for it and cannot; nothing is launched here."""

import pytest
import torch

from dspark_kernels import triton
from dspark_serve.config import ConfigError, load_config
from dspark_serve.models import layers
from dspark_serve.models.catalog import LoadError
from dspark_serve.models.loader import load_model, resolve
from tests.drafters.golden import GOLDENS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some compute capability, as far as asking for it goes."""

    def pretend(capability, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.version, "hip", hip)

    return pretend


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_is_served_by_triton_unless_torch_is_asked_for(gpu, capability, dtype):
    gpu(capability)
    for kernels in ("auto", "triton"):
        ops = layers.operations(dtype, CUDA, kernels)
        assert (ops.choice, ops.name) == ("triton", f"triton {str(dtype).removeprefix('torch.')}")
        assert ops.attention is not None
        assert ops.library is None
    assert layers.operations(dtype, CUDA, "torch").choice == "torch"


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [((8, 0), None, "need compute capability 9.0, and Some GPU has 8.0"), ((9, 4), "6.2", "made for NVIDIA GPUs")],
)
def test_a_gpu_they_are_not_for(gpu, capability, hip, reason, caplog):
    gpu(capability, hip)
    assert layers.operations(torch.float32, CUDA).choice == "torch"
    assert reason in caplog.text
    with pytest.raises(ValueError, match=f"kernels triton were asked for, but they .*{reason}"):
        layers.operations(torch.float32, CUDA, "triton")


def test_another_gpu_than_the_first(gpu):
    """Which would be given pointers into the memory of another."""
    gpu((9, 0))
    assert layers.operations(torch.float32, torch.device("cuda:0")).choice == "triton"
    assert layers.operations(torch.float32, torch.device("cuda:1")).choice == "torch"
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES, not as cuda:1"):
        layers.operations(torch.float32, torch.device("cuda:1"), "triton")


def test_without_triton(gpu, monkeypatch, caplog):
    gpu((9, 0))
    monkeypatch.setattr(triton, "available", lambda: False)
    assert layers.operations(torch.bfloat16, CUDA).choice == "torch"
    assert "Triton is not installed: install the [gpu] extra" in caplog.text
    with pytest.raises(ValueError, match="Triton is not installed"):
        layers.operations(torch.float32, CPU, "triton")


def test_on_a_cpu_they_are_for_the_interpreter():
    with pytest.raises(LoadError, match="kernels triton were asked for, but a GPU is needed, or TRITON_INTERPRET=1"):
        load_model(resolve(str(GOLDENS / "target")), "float32", "cpu", kernels="triton")
    assert layers.operations(torch.float32, CPU).choice != "triton"


def test_the_option():
    assert load_config({"kernels": "triton"}).model.kernels == "triton"
    with pytest.raises(ConfigError, match="--kernels"):
        load_config({"kernels": "cuda"})
