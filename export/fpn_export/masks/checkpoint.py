"""Reading a trained mask-proposal model: the weights, and the spec in the JSON file beside them."""

from __future__ import annotations

from pathlib import Path

from fpn_engine.errors import CheckpointError, SpecError
from fpn_engine.masks.spec import MaskSpec
from fpn_export.checkpoint_file import read_checkpoint
from fpn_export.masks.model import FpnMasks
from fpn_export.sidecar import read_sidecar
from fpn_export.state_dict import check_fit


def load_mask_model(path: Path) -> FpnMasks:
    """The model that training wrote as ``path`` (.pth) and ``.json`` beside it, in eval mode.

    Raises: CheckpointError if either cannot be read, they do not belong together, or a weight is not finite.
    """
    file = read_checkpoint(path)
    beside = path.with_suffix(".json")
    sidecar = read_sidecar(beside)
    if sidecar.sha256 not in (None, file.sha256):
        raise CheckpointError(f"{path} is not the file that {beside} describes; copy both again")
    try:
        model = FpnMasks(MaskSpec.from_dict(sidecar.spec))
    except SpecError as error:
        raise CheckpointError(f"{beside}: {error}") from None
    try:
        check_fit(file.tensors, model, f"the mask-proposal model of {beside.name}")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    model.load_state_dict(file.tensors)
    return model.eval()
