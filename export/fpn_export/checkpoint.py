"""Checkpoint import: a file that somebody trained years ago to a detector and its specification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpn_engine.errors import CheckpointError, SpecError
from fpn_engine.spec import ModelSpec
from fpn_export.assumptions import complete_spec, merge_values
from fpn_export.checkpoint_file import CheckpointFile, read_checkpoint
from fpn_export.detector import FpnDetector, make_detector
from fpn_export.detector_shape import DetectorShape, infer_shape
from fpn_export.published import find_published
from fpn_export.sidecar import Sidecar, read_sidecar
from fpn_export.state_dict import check_fit, drop_extra_branches, normalize_names

KINDS = {"faster_rcnn": "a Faster R-CNN", "fast_rcnn": "a Fast R-CNN", "rpn": "an RPN"}
DIGEST_SHOWN = 16  # hex digits of the SHA-256 in ModelSpec.source


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A detector out of a file.

    Attributes:
        model: fp32, on the CPU, in eval mode.
        spec: its whole contract; ``source`` is the file's name and digest.
        assumptions: a sentence for each value that neither tensors, overrides nor JSON gave.
        shape: what the tensors themselves showed.
        sha256: digest of the file, 64 hex digits.
    """

    model: FpnDetector
    spec: ModelSpec
    assumptions: list[str]
    shape: DetectorShape
    sha256: str


def load_checkpoint(
    path: str | Path,
    *,
    spec_overrides: Mapping[str, Any] | None = None,
    spec_path: str | Path | None = None,
) -> LoadedCheckpoint:
    """Load a Fast or Faster R-CNN or an RPN on a ResNet, named as torchvision names it.

    Architecture, widths and counts come from the tensors' shapes. What they do not show comes from
    ``spec_overrides``, else from the JSON file, else from ModelSpec's defaults, which are torchvision's;
    those are listed in ``assumptions``.

    Args:
        path: .pth or .pt (a state dict or a training checkpoint around one), or .safetensors.
        spec_overrides: ModelSpec fields as JSON values.
        spec_path: JSON file with a spec; by default ``NAME.json`` beside ``NAME.pth`` if there is one.

    Raises: CheckpointError for a file that is missing, damaged, not such a detector, not the one that the JSON
        describes, or at odds with its specification; SpecError for unknown keys and values out of range.
    """
    path = Path(path)
    sidecar = _find_sidecar(path, spec_path)
    file = read_checkpoint(path)
    _check_digest(file, sidecar)
    published = find_published(path.name, file.sha256)
    stated = merge_values(sidecar.spec if sidecar else {}, spec_overrides or {})
    if published:
        stated = published.spec_values() | stated
    stated["source"] = f"{path.name} sha256:{file.sha256[:DIGEST_SHOWN]}"
    try:
        state, branches = drop_extra_branches(normalize_names(file.tensors))
        shape = infer_shape(state)
        spec, assumptions = complete_spec(shape, stated)
        for branch, wanted in (("rpn", spec.has_rpn), ("roi_heads", spec.has_box_head)):
            if not wanted and any(name.startswith(f"{branch}.") for name in state):
                state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{branch}.")}
                branches.append(branch)
        model = _build_model(spec, shape, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except SpecError as error:
        where = f"{path} with {sidecar.path}" if sidecar else str(path)
        raise SpecError(f"{where}: {error}") from None
    if published:
        assumptions = []
    assumptions += [f"left out the {branch} branch, which {KINDS[spec.model]} does not have" for branch in branches]
    return LoadedCheckpoint(model=model, spec=spec, assumptions=assumptions, shape=shape, sha256=file.sha256)


def describe_checkpoint(path: str | Path) -> dict[str, Any]:
    """What ``path`` is, as JSON values for ``fpn-engine info``; raises as :func:`load_checkpoint`.

    ``needs`` lists what the file leaves to assumption, to be stated in ``NAME.json`` or by options.
    """
    path = Path(path)
    loaded = load_checkpoint(path)
    spec, shape = loaded.spec, loaded.shape
    return {
        "kind": "checkpoint",
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": loaded.sha256,
        "model": spec.model,
        "arch": spec.arch,
        "pyramid": spec.pyramid,
        "fpn_channels": spec.feature_channels,
        "representation_size": shape.representation_size,
        "rpn_depth": shape.rpn_depth,
        "categories": [category.name for category in spec.categories],
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "needs": loaded.assumptions,
        "spec": spec.to_dict(),
    }


def _find_sidecar(path: Path, spec_path: str | Path | None) -> Sidecar | None:
    if spec_path is not None:
        return read_sidecar(Path(spec_path))
    beside = path.with_suffix(".json")
    return read_sidecar(beside) if os.path.isfile(beside) else None


def _check_digest(file: CheckpointFile, sidecar: Sidecar | None) -> None:
    if sidecar and sidecar.sha256 is not None and str(sidecar.sha256).lower() != file.sha256:
        raise CheckpointError(
            f"{file.path} is not the file that {sidecar.path} describes: its sha256 is {file.sha256}, not "
            f"{sidecar.sha256}; copy the checkpoint again or correct about.sha256"
        )


def _build_model(spec: ModelSpec, shape: DetectorShape, state: Mapping[str, Tensor]) -> FpnDetector:
    state = {name: _to_fp32(tensor) for name, tensor in state.items()}
    with torch.device("meta"):  # shapes only: nothing is allocated or drawn before the file is known to fit
        model = make_detector(spec, representation_size=shape.representation_size, rpn_depth=shape.rpn_depth)
    check_fit(state, model, KINDS[spec.model])
    model.load_state_dict(state, assign=True)
    return model.eval()


def _to_fp32(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous() if tensor.is_floating_point() else tensor
