"""A tiny target and text that it wrote, made once for all tests here, which only read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_graft import write_text
from tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def written(model, tmp_path_factory) -> Path:
    """Text of the tiny target, written in two goes."""
    directory = tmp_path_factory.mktemp("records")
    first = write_text(model, directory, 400)
    assert first >= 400
    assert write_text(model, directory, first + 400) >= first + 400
    return directory
