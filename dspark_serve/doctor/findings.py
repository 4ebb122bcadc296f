"""What the doctor says: one finding per line, each ok, a warning or a failure, with what to do about it.

Must not know: what was examined, or how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warn", "fail"]  # as it should be; works, but slower or with less than it could; does not work
_ORDER: tuple[Level, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """`found`: what is so and what follows from it; `advice`: what to do, for all that is not ok."""

    check: str
    level: Level
    found: str
    advice: str = ""

    def lines(self) -> list[str]:
        indent = " " * 18
        return [
            f"{self.level:<5} {self.check:<12}{self.found}",
            *([f"{indent}-> {self.advice}"] if self.advice else []),
        ]


def worst(findings: Sequence[Finding]) -> Level:
    return max((finding.level for finding in findings), key=_ORDER.index, default="ok")


def verdict(findings: Sequence[Finding]) -> str:
    """The last line: how many of what."""
    count = {level: sum(finding.level == level for finding in findings) for level in _ORDER}
    if count["fail"]:
        return f"{count['fail']} of {len(findings)} checks failed, {count['warn']} warned: something will not work."
    if count["warn"]:
        return f"Everything works; {count['warn']} of {len(findings)} checks say what could be better."
    return "Everything is as it should be."


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"level": worst(findings), "findings": [asdict(finding) for finding in findings]}
