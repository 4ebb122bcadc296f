"""The frozen configuration tree {model, cache, engine, speculation, server}. Unknown keys are errors.

Leaf names are unique over the whole tree, so each option has one flat name: `--max-num-seqs` on the command line,
`DSPARK_MAX_NUM_SEQS` in the environment, `engine: {max_num_seqs: ...}` in a YAML file. Must not know: torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    model: str = Field(
        default="smollm2-135m-instruct", description="Catalog name, local directory, GGUF file or hub id."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on CPU, else as stored."
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Longest sequence, prompt and answer; default: the model's."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with a checkpoint.")
    chat_template: str | None = Field(
        default=None, description="Jinja file, or template text, instead of the tokenizer's."
    )
    device: str = Field(default="auto", description="auto: cuda when available, else cpu.")
    kernels: Literal["auto", "torch", "triton"] = Field(
        default="auto",
        description="auto: on a CPU the C++ kernels where they were built, on a GPU Triton's where they can run; "
        "torch: none; triton: Triton's, or an error that says why not.",
    )


class CacheConfig(Section):
    page_size: int = Field(default=16, ge=1, description="Tokens per K/V page.")
    kv_cache_gib: float | None = Field(
        default=None, gt=0, description="Memory for K/V; default: a share of what is free."
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Share of GPU memory the server may use."
    )
    enable_prefix_caching: bool = Field(default=True, description="Reuse K/V of equal prompt prefixes.")


class EngineConfig(Section):
    max_num_seqs: int = Field(default=64, ge=1, description="Most requests running at once.")
    max_num_batched_tokens: int = Field(default=512, ge=1, description="Most tokens through the model in one step.")
    max_prefill_chunk: int | None = Field(default=None, ge=1, description="Most prompt tokens of one request per step.")
    max_queue: int = Field(default=1024, ge=1, description="Most requests waiting; more get 503.")
    seed: int = Field(default=0, description="Seeds of requests that bring none derive from it.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: torch's choice.")
    enforce_eager: bool = Field(default=False, description="Record no CUDA graphs: slower steps, a quicker start.")


class SpeculationConfig(Section):
    method: Literal["ngram", "none", "dspark", "dflash", "eagle3", "portfolio"] | None = Field(
        default=None,
        description="The drafter; portfolio: a head and prompt lookup together. Default: the head's kind; without "
        "--head a portfolio where one comes with the model, else ngram.",
    )
    head: str | None = Field(
        default=None, description="Draft head in DeepSpec format (DSpark, DFlash, EAGLE-3): directory or hub id."
    )
    num_speculative_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Most drafts per request and step; default: as many as the head makes, lookups beside it 10; or 4.",
    )
    head_self_test: bool = Field(default=True, description="Try a draft head on a few prompts at load.")
    budget: str = Field(
        default="auto",
        pattern=r"^(auto|full|off|fixed:[1-9][0-9]{0,2})$",
        description="Drafts to make and verify. auto: those that pay on this machine, now; full: all; fixed:K: K per "
        "request and step; off: none.",
    )
    objective: str = Field(
        default="throughput",
        pattern=r"^(throughput|per-user:[0-9]+(\.[0-9]+)?)$",
        description="What --budget auto is after. throughput: most tokens per second; per-user:X: likewise, but "
        "requests below X tokens per second get drafts first.",
    )
    measure_again: bool = Field(
        default=False, description="Measure what steps and drafts cost here, even if that is in the cache."
    )
    prompt_lookup_min: int | None = Field(
        default=None, ge=1, description="Tokens that a copy begins with. Default: 2, beside a head 3."
    )
    prompt_lookup_max: int = Field(default=5, ge=1, description="Tokens before a copy that are compared at most.")
    per_request_spec_decode_metrics: Literal["none", "summary", "detailed"] = Field(
        default="summary",
        description="Speculation report of each answer; detailed: with drafted and accepted tokens of every step.",
    )
    verify_mode: Literal["coupled", "rejection"] = Field(
        default="coupled",
        description="coupled: same seed, same text with or without speculation. rejection: same distribution.",
    )


class ServerConfig(Section):
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    api_key: str | None = Field(default=None, description="Clients must send it as a Bearer token.")
    served_model_name: str | None = Field(default=None, description="Name in the API; default: MODEL.")
    shutdown_timeout: float = Field(default=30.0, ge=0, description="Seconds that running requests get after SIGTERM.")
    max_body_mib: float = Field(default=4.0, gt=0, description="Larger request bodies get 413.")
    ui: bool = Field(default=True, description="Serve the live page at /: charts and a playground.")
    metrics_compat: Literal["none", "vllm"] = Field(
        default="none", description="vllm: repeat shared metrics under `vllm:`."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe lines to log."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: for people on a terminal, one JSON object per line elsewhere."
    )
    log_prompts: bool = Field(default=False, description="Log the text of prompts; without it no line holds any.")
    otlp_traces_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Send OpenTelemetry traces here, as http://localhost:4318/v1/traces; needs the extra [otel].",
    )


class Config(Section):
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    engine: EngineConfig = EngineConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    server: ServerConfig = ServerConfig()


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence naming the option and where it was set."""


# Environment variables that are ours but no option of the tree.
OTHER_VARIABLES = frozenset({"DSPARK_CACHE", "DSPARK_CONFIG", "DSPARK_SPECULATIVE_CONFIG"})


def sections() -> dict[str, type[Section]]:
    """The sections of the tree by name, in order."""
    types = {name: info.annotation for name, info in Config.model_fields.items()}
    return {name: kind for name, kind in types.items() if isinstance(kind, type) and issubclass(kind, Section)}


def leaves() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every option as (section, name, field)."""
    for section, model in sections().items():
        for name, info in model.model_fields.items():
            yield section, name, info


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    file: Path | str | None = None,
    speculative_config: str | Mapping[str, Any] | None = None,
) -> Config:
    """Merge flags (by leaf name; None is "not given"), then environment, then the YAML file, then defaults.

    `speculative_config` is vLLM's JSON object: its keys are leaves of `speculation`, as if they had been flags, and a
    flag of the same name beats it; its `model` is our `head`. Raises ConfigError.
    """
    environment = environment or {}
    file = file or environment.get("DSPARK_CONFIG") or None
    flags = {name: value for name, value in (flags or {}).items() if value is not None}
    known = {name for _, name, _ in leaves()}
    for name in flags:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{_nearest(name, known)}")
    variables = {name: environment.get(f"DSPARK_{name.upper()}", "") for name in known}
    layers = [  # strongest first; each maps leaf -> value, with the words for where it comes from
        (flags, "--{}"),
        (_speculation(speculative_config, "--speculative-config"), "--speculative-config, {}"),
        ({name: value for name, value in variables.items() if value != ""}, "DSPARK_{}"),
        (_speculation(environment.get("DSPARK_SPECULATIVE_CONFIG"), "DSPARK_SPECULATIVE_CONFIG"), "{}"),
        ({} if file is None else _read_yaml(Path(file)), f"{file}, {{}}"),
    ]
    tree: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    sources: dict[str, str] = {}
    for section, name, _ in leaves():
        for layer, source in layers:
            if name in layer:
                tree[section][name] = layer[name]
                sources[name] = source.format(_spell(name, source))
                break
    return _build(tree, sources)


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """One sentence for each DSPARK_ variable that no option reads."""
    known = {f"DSPARK_{name.upper()}" for _, name, _ in leaves()} | OTHER_VARIABLES
    strangers = [name for name in environment if name.startswith("DSPARK_") and name not in known]
    return [f"environment variable {name} is not an option and is ignored{_nearest(name, known)}" for name in strangers]


def _spell(name: str, source: str) -> str:
    if source.startswith("--{"):
        return name.replace("_", "-")
    return name.upper() if source.startswith("DSPARK_{") else name


def _build(tree: dict[str, dict[str, Any]], sources: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][1]) if len(first["loc"]) > 1 else str(first["loc"][0])
        raise ConfigError(f"{sources.get(name, name)}: {first['msg']}, not {first['input']!r}") from None


def _speculation(value: str | Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """vLLM's speculative_config, from JSON or a mapping, with every key known."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source} must be a JSON object")
    value = {("head" if key == "model" else key): option for key, option in value.items()}
    for key in value:
        if key not in SpeculationConfig.model_fields:
            raise ConfigError(f"{source}: unknown key {key!r}{_nearest(str(key), SpeculationConfig.model_fields)}")
    return dict(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The options of a YAML file, flat. Every section and key must exist."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of sections ({', '.join(sections())})")
    home = {name: section for section, name, _ in leaves()}
    flat: dict[str, Any] = {}
    for section, options in document.items():
        if section not in sections():
            hint = f"; it belongs under {home[section]!r}" if section in home else _nearest(str(section), sections())
            raise ConfigError(f"{path}: unknown section {section!r}{hint}")
        if not isinstance(options, dict | None):
            raise ConfigError(f"{path}: section {section!r} must be a mapping")
        for name, value in (options or {}).items():
            if home.get(name) != section:
                hint = f"; it belongs under {home[name]!r}" if name in home else _nearest(str(name), home)
                raise ConfigError(f"{path}: unknown key {name!r} in section {section!r}{hint}")
            flat[name] = value
    return flat


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
