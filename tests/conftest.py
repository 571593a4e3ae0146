"""Fixtures that all three packages' tests share."""

import os
from pathlib import Path

import pytest

# Read when torch loads its OpenMP: threads that spin while they wait double the suite's time on two shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the blood-cell photographs and the checkpoint; skips where it is absent."""
    folder = Path(os.environ.get("FPN_ENGINE_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data" / "bccd").is_dir():
        pytest.skip(f"the blood-cell data is not at {folder}; set FPN_ENGINE_SHARED to its folder")
    return folder
