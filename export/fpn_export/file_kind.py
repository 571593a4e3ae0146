"""What a model file is: a checkpoint, an ONNX file or a plan."""

from __future__ import annotations

import enum
import os
import zipfile
from pathlib import Path

from fpn_engine.errors import CheckpointError, FpnEngineError
from fpn_engine.plan import MANIFEST
from fpn_export.checkpoint_file import SAFETENSORS_SUFFIX, TORCH_SUFFIXES


class FileKind(enum.Enum):
    """The three forms of a model."""

    CHECKPOINT = enum.auto()
    ONNX = enum.auto()
    PLAN = enum.auto()


def find_kind(path: Path) -> FileKind:
    """By the suffix; of a plan by the contents too.

    Raises: FpnEngineError if there is no such file, CheckpointError if it is none of the three.
    """
    if path.suffix.lower() == ".onnx":
        return FileKind.ONNX
    if path.suffix == ".plan" or _holds_manifest(path):
        return FileKind.PLAN
    if path.suffix in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        return FileKind.CHECKPOINT
    if not os.path.exists(path):
        raise FpnEngineError(f"there is no file {path}")
    raise CheckpointError(
        f"{path} is no checkpoint (.pth, .pt, .safetensors), ONNX file (.onnx) or plan by its name or contents"
    )


def _holds_manifest(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except zipfile.BadZipFile:
        return False
