"""`dspark-serve doctor`: examines machine, model and head, prints as it goes.

Must not know: how any check is made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from dspark_serve.config import Config
from dspark_serve.doctor.findings import Finding, as_json, verdict, worst
from dspark_serve.doctor.machine import judge, look


def doctor(config: Config, with_model: bool, say: Callable[[str], object], path: Path | None = None) -> bool:
    """Say every finding and write them to `path`; False when something will not work. with_model: the model too."""
    logging.getLogger("dspark_serve").addHandler(logging.NullHandler())  # the findings say it, once
    findings: list[Finding] = []
    for finding in chain(judge(look(), config.model.device), _examine(config) if with_model else ()):
        findings.append(finding)
        for line in finding.lines():
            say(line)
    say(verdict(findings))
    if path is not None:
        path.write_text(json.dumps(as_json(findings), indent=2) + "\n", encoding="utf-8")
        say(f"json: {path}")
    return worst(findings) != "fail"


def _examine(config: Config) -> Iterator[Finding]:
    from dspark_serve.doctor.served import examine  # brings Transformers: a look at the machine does without

    yield from examine(config)
