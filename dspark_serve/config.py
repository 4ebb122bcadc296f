"""The frozen configuration tree {model, cache, engine, speculation, server}. Unknown keys are errors.

Leaf names are unique over the whole tree, so each option has one flat name: `--max-num-seqs` on the command line,
`DSPARK_MAX_NUM_SEQS` in the environment, `engine: {max_num_seqs: ...}` in a YAML file. Must not know: torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    model: str = Field("smollm2-135m-instruct", description="Catalog name, local directory, GGUF file or hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: float32 on CPU, else as stored.")
    max_model_len: int | None = Field(None, ge=1, description="Longest sequence, prompt and answer; default: the model's.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a checkpoint.")
    chat_template: str | None = Field(None, description="Jinja file, or template text, instead of the tokenizer's.")
    device: str = Field("auto", description="auto: cuda when available, else cpu.")


class CacheConfig(Section):
    page_size: int = Field(16, ge=1, description="Tokens per K/V page.")
    kv_cache_gib: float | None = Field(None, gt=0, description="Memory for K/V; default: a share of what is free.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of GPU memory the server may use.")
    enable_prefix_caching: bool = Field(True, description="Reuse K/V of equal prompt prefixes.")


class EngineConfig(Section):
    max_num_seqs: int = Field(64, ge=1, description="Most requests running at once.")
    max_num_batched_tokens: int = Field(512, ge=1, description="Most tokens through the model in one step.")
    max_prefill_chunk: int | None = Field(None, ge=1, description="Most prompt tokens of one request per step.")
    max_queue: int = Field(1024, ge=1, description="Most requests waiting; more get 503.")
    seed: int = Field(0, description="Seeds of requests that bring none derive from it.")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: torch's choice.")


class SpeculationConfig(Section):
    method: Literal["ngram", "none"] = Field("ngram", description="The drafter.")
    num_speculative_tokens: int = Field(4, ge=0, description="Most drafts per request and step.")
    prompt_lookup_min: int = Field(2, ge=1, description="Shortest n-gram looked up.")
    prompt_lookup_max: int = Field(5, ge=1, description="Longest n-gram looked up.")
    verify_mode: Literal["coupled", "rejection"] = Field(
        "coupled", description="coupled: same seed, same text with or without speculation. rejection: same distribution."
    )


class ServerConfig(Section):
    host: str = Field("127.0.0.1")
    port: int = Field(8000, ge=0, le=65535)
    api_key: str | None = Field(None, description="Clients must send it as a Bearer token.")
    served_model_name: str | None = Field(None, description="Name in the API; default: MODEL.")
    shutdown_timeout: float = Field(30.0, ge=0, description="Seconds that running requests get after SIGTERM.")
    max_body_mib: float = Field(4.0, gt=0, description="Larger request bodies get 413.")
    metrics_compat: Literal["none", "vllm"] = Field("none", description="vllm: repeat shared metrics under `vllm:`.")


class Config(Section):
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    engine: EngineConfig = EngineConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    server: ServerConfig = ServerConfig()
