"""The checkpoints that come with the package, so that there is something to run before anything is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fpn_engine.errors import CheckpointError
from fpn_engine.named import BUNDLED

CHECKPOINT = Path(__file__).parent / "models" / f"{BUNDLED}.safetensors"


def find_bundled(name: str = BUNDLED) -> Path:
    """The checkpoint of the model ``name``, whose JSON file lies beside it."""
    return CHECKPOINT.with_name(f"{name}.safetensors")


def hash_bundled(name: str = BUNDLED) -> str:
    """SHA-256 of the checkpoint of ``name`` and of the JSON file beside it, 64 hex digits.

    Raises: CheckpointError if they are not where the package should have them.
    """
    checkpoint = find_bundled(name)
    try:
        return hashlib.sha256(checkpoint.read_bytes() + checkpoint.with_suffix(".json").read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"the model {name} that comes with fpn-engine cannot be read ({error.filename}: {error.strerror}); install "
            "fpn-engine again"
        ) from None
