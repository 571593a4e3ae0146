"""Checkpoints of either kind: a detector, or a mask-proposal model, which its JSON file tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto

from fpn_export.checkpoint import LoadedCheckpoint, describe_checkpoint, load_checkpoint
from fpn_export.masks.checkpoint import LoadedMasks, describe_masks, is_mask_checkpoint, load_masks
from fpn_export.masks.onnx_export import export_mask_onnx
from fpn_export.onnx_export import export_onnx

Loaded = LoadedCheckpoint | LoadedMasks


def load_any(path: Path, *, spec_overrides: Mapping[str, Any] | None = None, spec_path: Path | None = None) -> Loaded:
    """As :func:`fpn_export.checkpoint.load_checkpoint` or :func:`fpn_export.masks.checkpoint.load_masks`."""
    load = load_masks if is_mask_checkpoint(path, spec_path) else load_checkpoint
    loaded: Loaded = load(path, spec_overrides=spec_overrides, spec_path=spec_path)
    return loaded


def describe_any(path: Path) -> dict[str, Any]:
    """What a checkpoint is, as JSON values for ``fpn-engine info``."""
    return describe_masks(path) if is_mask_checkpoint(path) else describe_checkpoint(path)


def export_any(loaded: Loaded, *, on_progress: Callable[[str], None] = lambda step: None) -> ModelProto:
    """The end-to-end ONNX file."""
    if isinstance(loaded, LoadedMasks):
        return export_mask_onnx(loaded.model, on_progress=on_progress)
    return export_onnx(loaded.model, loaded.spec, on_progress=on_progress)
