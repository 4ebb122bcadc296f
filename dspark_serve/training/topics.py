"""What users ask: user turns from the small grammar of topics.yaml, seeds of the target's own training conversations.

`{name}` expands to a random entry of the table's list, `{3-40}` to a whole number in that range. An entry that ends in
OPEN is the beginning of a user turn, which the target completes itself. Must not know: models, files of conversations.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

OPEN = "..."
_SYMBOL = re.compile(r"\{(\w+|\d+-\d+)\}")


@dataclass(frozen=True)
class Grammar:
    kinds: dict[str, int]  # share of each kind of request; the keys are symbols
    table: dict[str, tuple[str, ...]]  # symbol -> what it may expand to

    def expand(self, text: str, draw: random.Random) -> str:
        def one(match: re.Match[str]) -> str:
            symbol = match[1]
            if symbol in self.table:
                return self.expand(draw.choice(self.table[symbol]), draw)
            low, _, high = symbol.partition("-")
            return str(draw.randint(int(low), int(high)))

        return _SYMBOL.sub(one, text)


@cache
def load_grammar() -> Grammar:
    given = yaml.safe_load(Path(__file__).with_name("topics.yaml").read_text(encoding="utf-8"))
    return Grammar(given["kinds"], {symbol: tuple(entries) for symbol, entries in given["table"].items()})


def write_turn(draw: random.Random) -> tuple[str, str, bool]:
    """A user turn: its kind, its text, and whether the text is only the beginning of the turn."""
    grammar = load_grammar()
    kind = draw.choices(list(grammar.kinds), weights=list(grammar.kinds.values()))[0]
    text = grammar.expand(f"{{{kind}}}", draw)
    is_open = text.endswith(OPEN)
    text = text.removesuffix(OPEN) if is_open else text
    return kind, text[:1].upper() + text[1:] if kind == "maths" else text, is_open
