"""What README.md, docs/ and benchmarks/README.md tell their reader to type: commands, and snippets of Python."""

import contextlib
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAMS = r"(?:dspark-serve|make|python|pytest|pip|torchrun|docker|curl) "


def commands(text: str) -> list[str]:
    """All commands of a page, in order: of fenced sh blocks, then of code spans; comments and line breaks removed."""
    found = []
    for fence in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = ""
        for line in fence.splitlines(keepends=True):
            lines += line
            with contextlib.suppress(ValueError):  # a quotation that goes on
                if not lines.endswith("\\\n") and (words := shlex.split(lines.replace("\\\n", " "), comments=True)):
                    found.append(words)
                    lines = ""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [shlex.split(span) for span in re.findall(rf"`({_PROGRAMS}[^`]+)`", prose)]
    return [" ".join(word if re.fullmatch(r"[^\s{}]*", word) else _quoted(word) for word in words) for words in found]


def _quoted(word: str) -> str:
    name, _, value = word.partition("=")
    return f'{name}="{value}"' if name.isupper() else shlex.quote(word)


def snippets() -> list[str]:
    return [code for page in PAGES for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.DOTALL)]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))))
