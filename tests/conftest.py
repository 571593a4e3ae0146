"""Fixtures that all three packages' tests share."""

import os
import signal
from pathlib import Path

import pytest

# Read when torch loads its OpenMP: threads that spin while they wait double the suite's time on two shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Read when triton is imported, which torch does by itself now and then: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A job in the background ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the blood-cell photographs and the checkpoint; skips where it is absent."""
    folder = Path(os.environ.get("FPN_ENGINE_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data" / "bccd").is_dir():
        pytest.skip(f"the blood-cell data is not at {folder}; set FPN_ENGINE_SHARED to its folder")
    return folder
