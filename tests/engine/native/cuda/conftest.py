"""Kernels run in Triton's interpreter where there is no GPU; small tensors: one thread."""

from tests.kernels.triton.conftest import silent_numpy
from tests.threads import one_thread

__all__ = ["one_thread", "silent_numpy"]
