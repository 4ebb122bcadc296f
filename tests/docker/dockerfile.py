"""The Dockerfile as its tests read it: stages of instructions, and what of the context .dockerignore lets through."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Stage:
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, the rest of its line

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]

    def environment(self) -> dict[str, str]:
        return dict(item.split("=", 1) for line in self.all("ENV") for item in shlex.split(line))

    def copied(self) -> list[str]:
        """Sources in the build context."""
        lines = [shlex.split(line) for line in self.all("COPY")]
        return [source for parts in lines if not parts[0].startswith("--from=") for source in parts[:-1]]

    def health(self) -> list[str]:
        """The command of the health check."""
        (line,) = self.all("HEALTHCHECK")
        command: list[str] = json.loads(line[line.index("CMD ") + 4 :])
        return command


def stages() -> dict[str, Stage]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = current = Stage(base)
        else:
            current.steps.append((instruction, rest))
    return found


STAGES = stages()


def allowed(path: str) -> bool:
    """What .dockerignore lets through; its last matching line decides."""
    passes = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.lstrip("!")
        if line and not line.startswith("#"):
            parents = [path, *(str(parent) for parent in Path(path).parents)]
            if any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parents):
                passes = line.startswith("!")
    return passes
