"""What a server says in /metrics about its speculation, before and after a run, under vLLM's names or ours.

Must not know: who asks, how the difference is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

PREFIXES = ("dspark:", "vllm:")  # a server may tell both; then they say the same, and the first counts
_STEM = "spec_decode_num_"


@dataclass(frozen=True)
class Drafts:
    """Counts since the server started, or between two moments. per_position: accepted drafts by place in the draft."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    per_position: tuple[int, ...] = ()

    def since(self, before: Drafts) -> Drafts:
        return self._with(before, -1)

    def plus(self, other: Drafts) -> Drafts:
        return self._with(other, 1)

    def _with(self, other: Drafts, sign: int) -> Drafts:
        width = max(len(self.per_position), len(other.per_position))
        ours, theirs = ((*each.per_position, *[0] * (width - len(each.per_position))) for each in (self, other))
        return Drafts(
            self.drafts + sign * other.drafts,
            self.draft_tokens + sign * other.draft_tokens,
            self.accepted_tokens + sign * other.accepted_tokens,
            tuple(a + sign * b for a, b in zip(ours, theirs, strict=True)),
        )

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that was accepted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per verified draft, the bonus token included."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else 1.0

    @property
    def per_position_rates(self) -> list[float]:
        return [accepted / self.drafts if self.drafts else 0.0 for accepted in self.per_position]


def read_drafts(text: str) -> Drafts | None:
    """The counts in a page of Prometheus text, summed over models and engines; None where it tells of no drafts."""
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError:  # a page, but not of metrics
        return None
    counts: dict[str, dict[str, float]] = {prefix: {} for prefix in PREFIXES}
    positions: dict[str, dict[int, float]] = {prefix: {} for prefix in PREFIXES}
    for family in families:
        for sample in family.samples:
            prefix, colon, name = sample.name.partition(":")
            prefix += colon
            if prefix not in counts or not name.startswith(_STEM) or not name.endswith("_total"):
                continue
            what = name.removeprefix(_STEM).removesuffix("_total")
            if what == "accepted_tokens_per_pos":
                at = int(sample.labels["position"])
                positions[prefix][at] = positions[prefix].get(at, 0.0) + sample.value
            else:
                counts[prefix][what] = counts[prefix].get(what, 0.0) + sample.value
    for prefix in PREFIXES:
        found, places = counts[prefix], positions[prefix]
        if {"drafts", "draft_tokens", "accepted_tokens"} <= found.keys():
            per_position = tuple(int(places.get(at, 0)) for at in range(max(places, default=-1) + 1))
            drafts, drafted, accepted = (int(found[name]) for name in ("drafts", "draft_tokens", "accepted_tokens"))
            return Drafts(drafts, drafted, accepted, per_position)
    return None


def difference(before: str | None, after: str | None) -> Drafts | None:
    """What was drafted between two pages; None where a page is missing or tells of no drafts."""
    first, last = (None if text is None else read_drafts(text) for text in (before, after))
    return None if first is None or last is None else last.since(first)
