"""From what the user called the model to a model that runs: find its directory, read its config, stream its weights.

Reads safetensors only (GGUF is converted once, into the cache); pickle files are refused. Every failure is a LoadError
with one sentence. Must not know: requests, the engine, the server.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dspark_kernels.blocks import BlockWeight
from dspark_serve.models.blocks_file import BLOCKS_FILE, read_blocks
from dspark_serve.models.catalog import CATALOG, CatalogEntry, LoadError, ModelNotFound, cached, fetch

if TYPE_CHECKING:
    from dspark_serve.models.base import TargetModel

logger = logging.getLogger(__name__)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ResolvedModel:
    """A complete local model directory, and the name the user knows it by."""

    path: Path
    name: str
    source: Literal["catalog", "directory", "gguf", "hub"]


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint says about generating: ids that end an answer, and its recommended sampling (often none)."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    sampling: dict[str, float] = field(default_factory=dict)  # keys as in SamplingParams


def resolve(model: str, trust_remote_code: bool = False) -> ResolvedModel:
    """Find `model`: a catalog name, a local directory, a .gguf file, or a hub id (organisation/name), in that order.

    May download (catalog, hub) or convert (catalog, GGUF) on first use. Raises LoadError or its ModelNotFound.
    """
    if model in CATALOG:
        return ResolvedModel(_from_catalog(CATALOG[model]), model, "catalog")
    path = Path(model).expanduser()
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise LoadError(
            f"{model} is a pickle file, which can run code when read; only safetensors and GGUF are loaded."
        )
    if path.is_dir():
        _check_directory(path)
        return ResolvedModel(path.resolve(), model, "directory")
    if path.suffix.lower() == ".gguf":
        return ResolvedModel(_from_gguf(path), path.stem, "gguf")
    if path.exists():
        raise LoadError(f"{model} is neither a model directory nor a .gguf file.")
    if _HUB_ID.fullmatch(model):
        return ResolvedModel(_from_hub(model, trust_remote_code), model, "hub")
    raise ModelNotFound(
        f"No model {model!r}: it is no local directory or .gguf file, no hub id (organisation/name), "
        f"and not in the catalog ({', '.join(CATALOG)})."
    )


def load_model(
    resolved: ResolvedModel,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    kernels: str = "auto",
) -> TargetModel:
    """Build the target model: native code for the dense family, Transformers' for any other decoder.

    dtype "auto" is the checkpoint's on a GPU. On CPU it is float32 arithmetic on weights that stay as they are stored
    where the C++ kernels can read them so (bfloat16, float16, GGUF blocks): results equal those of "float32" bit for
    bit. kernels "torch" leaves out all of ours; "triton" insists on those (models/layers.py says where they run).
    Raises LoadError naming the file, tensor or architecture.
    """
    config = read_config(resolved.path)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    number = _resolve_dtype(dtype, place, config)
    architectures = config.get("architectures") or []
    if not architectures:
        raise LoadError(f"{resolved.path / 'config.json'} names no architecture.")
    try:
        return _build(resolved.path, architectures[0], number, place, trust_remote_code, kernels, dtype == "auto")
    except LoadError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, NotImplementedError, SafetensorError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            text = f"{text} is missing"
        raise LoadError(f"The model {resolved.name} ({architectures[0]}) cannot be loaded: {text}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json. Raises LoadError when it is missing or not a JSON object."""
    return _read_json(directory / "config.json", required=True)


def iterate_stored(directory: Path) -> Iterator[tuple[str, Tensor | BlockWeight]]:
    """As iterate_weights, but what a GGUF file held in blocks comes as such."""
    try:
        blocks = read_blocks(directory / BLOCKS_FILE)
    except (SafetensorError, ValueError, OSError) as error:
        raise LoadError(f"{directory / BLOCKS_FILE} is damaged or truncated: {error}") from error
    yield from blocks.items()
    yield from iterate_weights(directory, without=blocks)


def iterate_weights(
    directory: Path, progress: bool = True, without: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the checkpoint, memory-mapped: a tensor's bytes are read when they are first used.

    Raises LoadError for a missing, truncated or garbled file.
    """
    files = weight_files(directory)
    total = sum(file.stat().st_size for file in files)
    disable = None if progress else True  # None: only where someone can see it
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=disable) as bar:
        for file in files:
            try:
                with safe_open(file, framework="pt", device="cpu") as handle:
                    for name in handle.keys():  # noqa: SIM118 - not a mapping
                        tensor = handle.get_tensor(name)
                        if name not in without:
                            yield name, tensor
                        bar.update(tensor.nbytes)
            except (SafetensorError, OSError) as error:
                raise LoadError(f"{file} is damaged or truncated: {error}") from error
        bar.update(total - bar.n)


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's safetensors files, by the index when there is one. Raises LoadError when there are none."""
    index = directory / _INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LoadError(f"{index} has no weight_map.")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(set(directory.glob("*.safetensors")) - {directory / BLOCKS_FILE})
        if (directory / "model.safetensors") in files:  # adapters or a consolidated copy may lie beside it
            files = [directory / "model.safetensors"]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise LoadError(f"{index} names {missing[0].name}, which is not there.")
    if not files:
        pickles = [file.name for file in sorted(directory.iterdir()) if file.suffix.lower() in _PICKLES]
        reason = f" ({pickles[0]} is a pickle file, which can run code when read)" if pickles else ""
        raise LoadError(f"{directory} holds no safetensors weights{reason}; use safetensors or GGUF.")
    return files


def generation_defaults(directory: Path) -> GenerationDefaults:
    """Ids that end an answer (generation_config.json, else config.json; and the tokenizer's eos), sampling hints."""
    config = read_config(directory)
    config = {**config.get("text_config", {}), **config}
    generation = _read_json(directory / "generation_config.json")
    ends = _as_ids(generation.get("eos_token_id")) or _as_ids(config.get("eos_token_id"))
    tokenizer_end = _tokenizer_eos(directory)
    if tokenizer_end is not None:  # chat checkpoints often end a turn with it and state another id in their config
        ends += (tokenizer_end,)

    def one(key: str) -> int | None:
        ids = _as_ids(generation.get(key, config.get(key)))
        return ids[0] if ids else None

    hints = {key: float(generation[key]) for key in _SAMPLING_KEYS if isinstance(generation.get(key), int | float)}
    return GenerationDefaults(tuple(dict.fromkeys(ends)), one("bos_token_id"), one("pad_token_id"), hints)


def _from_catalog(entry: CatalogEntry) -> Path:
    def build(target: Path) -> None:
        from dspark_serve.models.gguf_convert import convert

        convert(fetch(entry, target), target)

    return cached(f"{entry.name}-{entry.member_sha256[:12]}", build)


def _from_gguf(path: Path) -> Path:
    def build(target: Path) -> None:
        from dspark_serve.models.gguf_convert import convert

        convert(path, target)

    try:
        facts = path.resolve(strict=True).stat()
    except OSError as error:
        raise ModelNotFound(f"The GGUF file {path} cannot be opened: {error.strerror}.") from error
    identity = f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}"
    return cached(f"gguf-{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}", build)


def _from_hub(model: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    try:
        path = Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, unknown repository: many classes, one answer
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelNotFound(f"The model {model} is not here and the hub did not give it: {reason}") from error
    _check_directory(path)
    return path


def _check_directory(path: Path) -> None:
    read_config(path)
    weight_files(path)


def _build(
    path: Path, architecture: str, dtype: torch.dtype, device: torch.device, trust: bool, kernels: str, as_stored: bool
) -> TargetModel:
    from dspark_serve.models.dense import DenseModel
    from dspark_serve.models.dense_config import SUPPORTED_ARCHITECTURES, UnsupportedConfig

    if architecture in SUPPORTED_ARCHITECTURES:
        try:
            weights = iterate_stored(path) if as_stored else iterate_weights(path)
            return DenseModel.from_weights(read_config(path), weights, dtype, device, kernels, as_stored)
        except UnsupportedConfig as error:  # a variation of the family that only the general code knows
            logger.info("%s goes through Transformers: %s", path.name, error)
    from dspark_serve.models.hf import HFModel  # imports Transformers' modelling code, which takes seconds
    from dspark_serve.models.hf_probe import UnsupportedModel

    try:
        return HFModel.from_pretrained(str(path), dtype, device, trust, kernels)
    except UnsupportedModel as error:
        raise LoadError(str(error)) from error


def _resolve_dtype(dtype: str, device: torch.device, config: dict[str, Any]) -> torch.dtype:
    if dtype == "auto":
        stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        dtype = "float32" if device.type == "cpu" else str(stored)
    number = getattr(torch, dtype.removeprefix("torch."), None)
    if number not in (torch.float32, torch.bfloat16, torch.float16):
        raise LoadError(f"dtype {dtype} is not one of float32, bfloat16, float16.")
    assert isinstance(number, torch.dtype)
    return number


def _tokenizer_eos(directory: Path) -> int | None:
    settings = _read_json(directory / "tokenizer_config.json")
    end = settings.get("eos_token")
    text = end.get("content") if isinstance(end, dict) else end
    if not isinstance(text, str):
        return None
    for number, token in settings.get("added_tokens_decoder", {}).items():
        if token.get("content") == text:
            return int(number)
    for token in _read_json(directory / "tokenizer.json").get("added_tokens", []):
        if token.get("content") == text:
            return int(token["id"])
    return None


def _as_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(int(v) for v in value) if isinstance(value, list) else ()


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"{path.parent} is not a model directory: it has no {path.name}.") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} does not hold a JSON object.")
    return value
