"""Who may import whom, by DESIGN's ranks: a module imports its own package and strictly lower ranks.

Reads the syntax tree only, so imports inside functions and under TYPE_CHECKING count. Knows nothing of behaviour.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANKS = {
    0: "dspark_kernels types config transfers",
    0.5: "tensors reports unpruned",  # speak of types' results; add the kernels' noise
    1: "sampling cache text",
    1.5: "choice",  # text and tokens of one answer, for server and llm
    2: "models",
    3: "drafters speculation",
    4: "engine",
    5: "training server llm lossless bench doctor",
    6: "cli",
    7: "__init__ __main__",
}
RANK = {component: rank for rank, components in RANKS.items() for component in components.split()}
TORCH = frozenset({"torch", "tensors", "transfers", "unpruned"})
FORBIDDEN = {
    "types": TORCH,
    "reports": TORCH,
    "config": TORCH,
    "text": TORCH,
    "choice": TORCH,
    "cache.pages": TORCH,
    "engine.scheduler": TORCH,
    "speculation.cost": TORCH,
    "speculation.budget": TORCH,
    "speculation.calibrate": TORCH,
    "bench": TORCH | {"engine", "models", "drafters", "speculation", "dspark_kernels", "sampling", "cache", "text"},
    "server": TORCH | {"models", "drafters", "speculation", "dspark_kernels", "sampling", "cache"},
}


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    """Dotted names a module imports; `from x import y` counts as x.y."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*(["dspark_serve"] if node.level else []), *parents, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        yield from names


def violations(module: str, source: str) -> list[str]:
    """What `module` (dotted, below dspark_serve; or dspark_kernels...) imports against the rules."""
    component = module.split(".")[0]
    if component not in RANK:
        return [f"{module} has no rank"]
    banned = frozenset().union(*(names for key, names in FORBIDDEN.items() if f"{module}.".startswith(f"{key}.")))
    found = []
    for name in imported(ast.parse(source), module):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0] if package == "dspark_serve" else package
        ours = package in ("dspark_serve", "dspark_kernels") and target in RANK
        if target in banned or (ours and target != component and RANK[target] >= RANK[component]):
            found.append(f"{module} imports {name}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for base in (ROOT / "dspark_serve", ROOT / "kernels"):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


def test_every_import_goes_down() -> None:
    assert [found for module, path in modules() for found in violations(module, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cache.pages", "import torch"),
        ("cache.pages", "def f():\n    from torch import nn"),
        ("engine.scheduler", "if TYPE_CHECKING:\n    from dspark_serve.tensors import StepBatch"),
        ("bench.client", "from dspark_serve.engine.build import build_engine"),
        ("server.app", "import dspark_serve.models.loader"),
        ("server.app", "from dspark_serve import models"),
        ("server.app", "from ..speculation import verify"),
        ("server.app", "from dspark_serve.llm import LLM"),
        ("speculation.verify", "from dspark_serve.drafters.base import Drafter"),
        ("dspark_kernels.noise", "from dspark_serve.types import Request"),
        ("text", "from dspark_serve.models.catalog import LoadError"),
        ("brandnew", "import os"),
    ],
)
def test_checker_catches(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("server.app", "from dspark_serve.engine.build import build\nfrom dspark_serve.text import Tokenizer"),
        ("server.app", "from .protocol import Chat\nimport types, json"),
        ("engine.runner", "import torch\nfrom dspark_serve.cache.store import KVStore"),
        ("dspark_kernels.noise", "import types"),
        ("tensors", "import torch\nfrom dspark_serve.types import RowResult"),
    ],
)
def test_checker_allows(module: str, source: str) -> None:
    assert violations(module, source) == []
