"""What tactics depend on of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fpn_engine.errors import BackendError
from fpn_kernels.aot import SHARED_LIMIT

# Multiprocessors of a usual GPU of each compute capability: A100, RTX 3090, RTX 4090, H100 and H200, B200, RTX 5090.
PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
TARGETS = tuple(f"sm_{capability}" for capability in PROCESSORS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or a kind of GPU that is not here.

    Attributes:
        name: as the driver has it, empty for a kind. capability: compute capability times ten.
        processors: multiprocessors. shared_bytes: shared memory that a block may have.
    """

    name: str
    capability: int
    processors: int
    shared_bytes: int

    @classmethod
    def of_device(cls, device: torch.device) -> Gpu:
        """The one that is here."""
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin", SHARED_LIMIT[86])
        return cls(
            name=found.name,
            capability=10 * found.major + found.minor,
            processors=found.multi_processor_count,
            shared_bytes=shared,
        )

    @classmethod
    def of_target(cls, target: str) -> Gpu:
        """A usual GPU of a compute capability, such as sm_90. Raises BackendError for one that is not known."""
        if target not in TARGETS:
            raise BackendError(f"there is no target {target!r}; take one of {', '.join(TARGETS)}")
        capability = int(target.removeprefix("sm_"))
        return cls(
            name="",
            capability=capability,
            processors=PROCESSORS[capability],
            shared_bytes=SHARED_LIMIT[capability],
        )
