"""Fixtures for kernels, on the GPU or in Triton's interpreter."""

import os
from collections.abc import Iterator

# Read with cuBLAS's first product on a GPU: without it deterministic algorithms, which poison memory, warn of products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch

from tests.threads import one_thread

__all__ = ["one_thread"]


@pytest.fixture(autouse=True)
def silent_numpy() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of the infinities and NaNs that kernels are tested on."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN and of the largest integers: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
