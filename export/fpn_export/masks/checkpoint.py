"""Reading a trained mask-proposal model: the weights, and the spec in the JSON file beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpn_engine.errors import CheckpointError, SpecError
from fpn_engine.masks.spec import MODEL, MaskSpec
from fpn_export.checkpoint import DIGEST_SHOWN
from fpn_export.checkpoint_file import read_checkpoint
from fpn_export.masks.model import FpnMasks
from fpn_export.sidecar import read_sidecar
from fpn_export.state_dict import check_fit


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedMasks:
    """A mask-proposal model out of a file.

    Attributes:
        model: fp32, on the CPU, in eval mode. spec: its whole contract; ``source`` is the file's name and digest.
        assumptions: none, as a JSON file says all; there as of other checkpoints. sha256: of the file, 64 hex digits.
    """

    model: FpnMasks
    spec: MaskSpec
    assumptions: list[str]
    sha256: str


def is_mask_checkpoint(path: Path, spec_path: Path | None = None) -> bool:
    """Whether the JSON file beside a checkpoint, or ``spec_path``, is that of a mask-proposal model."""
    beside = spec_path or path.with_suffix(".json")
    return os.path.isfile(beside) and read_sidecar(beside).spec.get("model") == MODEL


def load_mask_model(path: Path) -> FpnMasks:
    """The model of :func:`load_masks` alone."""
    return load_masks(path).model


def load_masks(
    path: Path, *, spec_overrides: Mapping[str, Any] | None = None, spec_path: Path | None = None
) -> LoadedMasks:
    """The model that training wrote as ``path`` (.pth, .safetensors) and ``.json`` beside it.

    Args: spec_overrides: MaskSpec fields as JSON values. spec_path: another JSON file.
    Raises: CheckpointError if a file cannot be read, they do not belong together, or a weight is not finite.
    """
    file = read_checkpoint(path)
    beside = spec_path or path.with_suffix(".json")
    sidecar = read_sidecar(beside)
    if sidecar.sha256 not in (None, file.sha256):
        raise CheckpointError(f"{path} is not the file that {beside} describes; copy both again")
    try:
        source = f"{path.name} sha256:{file.sha256[:DIGEST_SHOWN]}"
        with torch.device("meta"):  # shapes only, until the file is known to fit
            model = FpnMasks(MaskSpec.from_dict({**sidecar.spec, **(spec_overrides or {}), "source": source}))
    except SpecError as error:
        raise CheckpointError(f"{beside}: {error}") from None
    try:
        check_fit(file.tensors, model, f"the mask-proposal model of {beside.name}")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    # A bundled file is of half precision.
    state = {name: t.float() if t.is_floating_point() else t for name, t in file.tensors.items()}
    model.load_state_dict(state, assign=True)
    return LoadedMasks(model=model.eval(), spec=model.spec, assumptions=[], sha256=file.sha256)


def describe_masks(path: Path) -> dict[str, Any]:
    """What ``path`` is, as JSON values for ``fpn-engine info``; raises as :func:`load_masks`."""
    loaded = load_masks(path)
    spec = loaded.spec
    return {
        "kind": "checkpoint",
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": loaded.sha256,
        "model": spec.model,
        "arch": spec.arch,
        "fpn_channels": spec.fpn_channels,
        "categories": [category.name for category in spec.categories],
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "needs": [],
        "spec": spec.to_dict(),
    }
