"""The checkpoint that comes with the package, so that there is something to run before anything is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fpn_engine.errors import CheckpointError

CHECKPOINT = Path(__file__).parent / "models" / "demo.safetensors"


def hash_bundled() -> str:
    """SHA-256 of the checkpoint and of the JSON file beside it, 64 hex digits.

    Raises: CheckpointError if they are not where the package should have them.
    """
    try:
        return hashlib.sha256(CHECKPOINT.read_bytes() + CHECKPOINT.with_suffix(".json").read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"the model that comes with fpn-engine cannot be read ({error.filename}: {error.strerror}); install "
            "fpn-engine again"
        ) from None
