"""Checkpoint files as they lie on disk: a digest and a mapping of tensors, nothing executed."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fpn_engine.errors import CheckpointError

TORCH_SUFFIXES = (".pth", ".pt")
SAFETENSORS_SUFFIX = ".safetensors"

# Where training scripts put the state dict inside what they save, most common first.
WRAPPERS = ("model", "state_dict", "model_state_dict")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """A file's tensors under the names that the file gives them, and the SHA-256 of the file in hex."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]


def hash_checkpoint(path: Path) -> str:
    """SHA-256 of a checkpoint file, 64 hex digits.

    Raises: CheckpointError if ``path`` is missing, not a regular file, empty, unreadable or not .pth, .pt or
        .safetensors.
    """
    if path.suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        raise CheckpointError(f"{path} is not a checkpoint by its name: expected .pth, .pt or .safetensors")
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty: copy or download it again")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_checkpoint(path: Path) -> CheckpointFile:
    """Read the tensors of ``path`` onto the CPU; pickled code is refused, never run.

    A state dict inside a training checkpoint (``WRAPPERS``) is taken out; optimizer state, counters and
    other entries that are not tensors are left behind.

    Raises: CheckpointError, also for a damaged file, pickled objects and a file without tensors.
    """
    sha256 = hash_checkpoint(path)
    content = _load_safetensors(path) if path.suffix == SAFETENSORS_SUFFIX else _load_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = _unwrap(content)
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(str(key) for key in list(state)[:3]) or "nothing"
        raise CheckpointError(f"{path} holds no tensors but {keys}: expected a detector's state dict")
    return CheckpointFile(path=path, sha256=sha256, tensors=tensors)


def _unwrap(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    for key in WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping):
            return inner
    return content


def _load_torch(path: Path) -> Any:
    try:
        # torchvision's reference training saves its command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the damaged bytes make it do
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds pickled objects ({refused[1]}), and only tensors are loaded, since a pickle can "
                "run code: save it again as torch.save(model.state_dict(), path) where you trust it"
            ) from error
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint: copy or download it again") from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError is not exported as a public name
        raise CheckpointError(f"{path} is damaged or not a safetensors file: copy or download it again") from error
