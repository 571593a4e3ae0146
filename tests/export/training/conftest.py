"""Runs on rectangles."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.training.squares import Squares
from tests.threads import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def squares() -> Squares:
    return Squares(seed=1, count=300)


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    return tmp_path / "run"
